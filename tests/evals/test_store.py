"""The run directory: nothing written is lost, whatever happens in between."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from refreshkv.config import RefreshConfig
from refreshkv.evals import store
from refreshkv.evals.records import written
from refreshkv.evals.results import line_of, read_lines
from refreshkv.evals.store import Lines, RunDirectory, RunError
from refreshkv.evals.summary import read_results

CONFIG: dict[str, Any] = {
    "model": "demo",
    "dtype": "float32",
    "seed": 0,
    "budget": 0.125,
    "chat": False,
    "batch": 4,
    "tasks": {"toy": {"words": 30, "path": None}},
    "methods": ["full"],
}


def record(key: str, size: int = 0) -> dict[str, Any]:
    return {
        "key": f"toy|full|free|{key}",
        **{"task": "toy", "method": "full", "mode": "free", "example": key},
        **{"prompt_sha256": "0" * 8, "score": 0.5, "output": "ä" * size},
    }


def keys(path: Path) -> list[str]:
    return [found["example"] for found in read_lines(path)]


@pytest.fixture
def opened(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.open(CONFIG)
    return directory


@pytest.mark.parametrize(
    "rest", ['{"key": "b' + 500 * "x", '{"key": "b"', '{"key": "b"}', "\x00\x00", '{"key": "ä']
)
def test_half_a_line_is_cut_off(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((line_of(record("a")) + rest).encode()[:-1])
    assert keys(path) == ["a"]
    with Lines(path) as lines:
        lines.append([record("c")])
    assert path.read_text() == line_of(record("a")) + line_of(record("c"))


@pytest.mark.parametrize("line", ["no json", '{"id": 1}', "[1]", "5", ""])
def test_a_broken_line_within_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line_of(record("a")) + line + "\n" + line_of(record("b")))
    with pytest.raises(ValueError, match=r"^line 2 of '.*a\.jsonl' is not a result \(.*\); remove"):
        keys(path)


SPOILT = {
    **{f"no {name}": ({name: ...}, f"no '{name}'") for name in record("a") if name != "output"},
    **{
        f"score {score}": ({"score": score}, f"score is {said}, which is no number")
        for score, said in (
            (None, "None"),
            (True, "True"),
            ("0.5", "'0.5'"),
            ([1], r"\[1\]"),
        )
    },
    "score NaN": ({"score": float("nan")}, "NaN is not JSON"),
    "task null": ({"task": None}, "task is None, which is no text"),
    "prompt_sha256 a number": ({"prompt_sha256": 5}, "prompt_sha256 is 5, which is no text"),
    "mode unknown": ({"mode": "fed"}, "mode is 'fed', which is none"),
    "another key": ({"example": "z"}, r"key is 'toy\|.*a', but its parts make 'toy\|.*z'"),
    "tokens null": ({"output_tokens": None}, "output_tokens is None, which is no number"),
    "a token a text": ({"said": [1, "a"]}, r"said is \[1, 'a'\], which is no list of tokens"),
    "KL a text": ({"kl": "0"}, "kl is '0', which is no number"),
    "share a text": ({"kv_read_share": "1"}, "kv_read_share is '1', which is no number"),
    "part a text": ({"parts": [1, "x"]}, r"parts\.1 is 'x', which is no number"),
    "layers a list": ({"layers": []}, r"layers is \[\], which is no object"),
    "layer of nothing": ({"layers": {"0": {}}}, r"layers\.0\.steps is None, which is no number"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_line_that_would_spoil_the_numbers_is_named(name: str, opened: RunDirectory) -> None:
    """By number, before anything is decoded, wherever it is read, and nothing in the file changes."""
    changes, said = SPOILT[name]
    spoilt = {key: value for key, value in {**record("a"), **changes}.items() if value is not ...}
    path = opened.path / "results.jsonl"
    path.write_text(line_of(record("b")) + json.dumps(spoilt) + "\n")
    before = path.read_bytes()
    opened.close()
    line = rf"^line 2 of '.*results\.jsonl' is not a result \(({said})\); remove that line"
    for read in (lambda: RunDirectory(opened.path).open(CONFIG), lambda: read_results(opened.path)):
        with pytest.raises(ValueError, match=line):
            read()
    assert path.read_bytes() == before


def test_a_setting_without_an_end_can_be_written() -> None:
    config = RefreshConfig(trigger="lse-drop", drop=math.inf)
    assert json.loads(line_of({k: written(v) for k, v in vars(config).items()}))["drop"] == "inf"


def test_a_score_that_is_too_large_for_a_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text, said in (("1e999", "score is inf"), ("[" * 10**5, "recursion")):
        path.write_text(line_of(record("a")).replace("0.5", text))
        with pytest.raises(ValueError, match=rf"^line 1 .*{said}"):
            keys(path)


@pytest.mark.parametrize("name", ["task", "method"])
def test_a_line_of_something_never_asked_for_is_named(name: str, opened: RunDirectory) -> None:
    other = {**record("a"), name: "other"}
    other["key"] = "|".join(other[part] for part in ("task", "method", "mode", "example"))
    (opened.path / "results.jsonl").write_text(line_of(other))
    opened.close()
    with pytest.raises(ValueError, match=f"line 1 of .* is of {name} 'other', which config.json"):
        RunDirectory(opened.path).open(CONFIG)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the file's size stands in for the disk: the kernel writes a part, then refuses."""
    path = tmp_path / "a.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Lines(path) as lines:
        lines.append([record("a"), record("b")])
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, before[1]))
        try:
            with pytest.raises(
                RunError, match=r"^cannot write .*a\.jsonl' \(File too large\); the"
            ):
                lines.append([record("c", 1000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == whole
        lines.append([record("d")])
    assert keys(path) == ["a", "b", "d"]


def test_no_space_left_while_rewriting(
    opened: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for rank in (0, 1):
        with opened.lines(rank) as lines:
            lines.append([record(f"{rank}")])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device"):
            opened.tidy(lambda found: found["key"])
    assert [found["example"] for found in opened.tidy(lambda found: found["key"])] == ["0", "1"]


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run' cannot be used \(.*\); use another --out"):
        RunDirectory(tmp_path / "file" / "run").open(CONFIG)
    with pytest.raises(ValueError, match=r"file' cannot be used \(.*\); use another --out"):
        RunDirectory(tmp_path / "file").open(CONFIG)


def test_one_run_at_a_time(opened: RunDirectory) -> None:
    with pytest.raises(ValueError, match=r"another run is writing to '.*'; wait for it"):
        RunDirectory(opened.path).open(CONFIG)
    opened.close()
    RunDirectory(opened.path).open(CONFIG)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"model": "other"}, "model 'demo', now it is 'other'"),
        ({"dtype": "bfloat16"}, "dtype 'float32', now"),
        ({"budget": 128}, r"budget 0\.125, now it is 128"),
        ({"chat": True}, "chat False, now it is True"),
        ({"tasks": {"toy": {"words": 31, "path": None}}}, r"toy\.words 30, now it is 31"),
        ({"tasks": {"toy": {"words": 30, "path": Path("a")}}}, r"toy\.path None, now it is 'a'"),
        ({"tasks": {"toy": {"words": 30, "path": None, "n": 1}}}, r"toy\.n None, now it is 1"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], named: str, opened: RunDirectory
) -> None:
    opened.close()
    before = (opened.path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=f"was made with {named}.*; use another --out$"):
        RunDirectory(opened.path).open({**CONFIG, **changes})
    assert (opened.path / "config.json").read_bytes() == before


def test_more_tasks_and_methods_are_welcome(opened: RunDirectory) -> None:
    opened.close()
    more = {"tasks": {"other": {}}, "methods": ["snapkv", "full"], "batch": 1}
    again = RunDirectory(opened.path)
    again.open({**CONFIG, **more})
    assert list(again.config["tasks"]) == ["toy", "other"]
    assert again.config["methods"] == ["full", "snapkv"]
    assert json.loads((opened.path / "config.json").read_text()) == again.config


@pytest.mark.parametrize("name", ["results.jsonl", "summary.csv", "report.html"])
def test_a_directory_of_somebody_else(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"has {name} but no config.json; use another --out"):
        RunDirectory(tmp_path).open(CONFIG)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # that of a model
    with pytest.raises(ValueError, match="was not written by a run like this; use another --out"):
        RunDirectory(tmp_path).open(CONFIG)
    assert (tmp_path / name).read_text() == "mine"


def test_shards_of_a_killed_launch_are_merged_at_the_next_start(opened: RunDirectory) -> None:
    with opened.lines(None) as lines:
        lines.append([record("a")])
    for rank, key in ((0, "b"), (1, "c")):
        with opened.lines(rank) as lines:
            lines.append([record("a"), record(key)])  # "a": killed between merging and removing
    with (opened.path / "results-1.jsonl").open("a") as file:
        file.write('{"key": "d"')
    opened.close()
    again = RunDirectory(opened.path)
    again.open(CONFIG)
    assert keys(again.path / "results.jsonl") == ["a", "b", "c"]
    assert sorted(path.name for path in again.path.iterdir()) == ["config.json", "results.jsonl"]


def test_tidy_sorts_and_keeps_ties(opened: RunDirectory) -> None:
    with opened.lines(None) as lines:
        lines.append([record(key) for key in ("b2", "a2", "b1", "a1")])
    found = opened.tidy(lambda each: each["example"][0])
    assert [each["example"] for each in found] == ["a2", "a1", "b2", "b1"]
    assert keys(opened.path / "results.jsonl") == ["a2", "a1", "b2", "b1"]


def test_lines_are_strict_json() -> None:
    assert line_of({"text": "ä\n\u2028"}).isascii()
    with pytest.raises(ValueError, match="not JSON compliant"):
        line_of({"score": float("nan")})


def test_a_batch_is_on_the_disk_before_append_returns(
    opened: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    sync = os.fsync
    path = opened.path / "results.jsonl"
    monkeypatch.setattr(
        store.os, "fsync", lambda file: (sync(file), synced.append(path.read_bytes()))
    )
    with opened.lines(None) as lines:
        lines.append([record("a"), record("b")])
        lines.append([record("c")])
    assert [data.count(b"\n") for data in synced] == [2, 3]


def test_what_a_killed_rewrite_leaves_is_removed(opened: RunDirectory) -> None:
    opened.close()
    for name in (".results.jsonl.77.tmp", ".mine.tmp"):
        (opened.path / name).write_text("x")
    RunDirectory(opened.path).open(CONFIG)
    left = sorted(path.name for path in opened.path.iterdir())
    assert left == [".mine.tmp", "config.json", "results.jsonl"]
