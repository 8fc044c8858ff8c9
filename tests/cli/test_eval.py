"""`refreshkv eval` as a user meets it: runs, stops, several processes, every bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "REFRESHKV_DEBUG": "", "OMP_NUM_THREADS": "1"}
COLUMNS = (
    "task,mode,method,metric,score,ci_low,ci_high,examples,output_tokens,answer_tokens,kv_read_share,full_share,"
    "effective_stride,kv_read_most,same_as_full,passes_per_token,ratio,ratio_low,ratio_high,agreement,kl"
)


@pytest.fixture
def args(stand_in: Path) -> Callable[..., list[str]]:
    """A small evaluation, with options on top; `None` leaves one out."""

    def make(out: Path | None, *more: object, **replaced: object) -> list[str]:
        options = {
            "model": stand_in,
            "tasks": "key-value",
            "methods": "full,refreshkv-paper",
            "length": 300,
            "limit": 3,
            "task_option": "key-value.keys=1",
            "out": out,
            **replaced,
        }
        given = [
            part
            for name, value in options.items()
            if value is not None
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        return ["eval", *given, *map(str, more)]

    return make


def lines(out: Path) -> list[dict[str, Any]]:
    """Without what differs from run to run."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in record if name != "seconds"} for record in found]


def test_a_run(
    args: Any, run: Callable[..., Any], last_json: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run(*args(out, "--json", mode="both", batch=2))
    found = last_json(result)
    assert found["out"] == str(out)
    assert [(row["method"], row["mode"]) for row in found["results"]] == [
        (method, mode) for method in ("full", "refreshkv-paper") for mode in ("free", "forced")
    ]
    assert all(row["examples"] == 3 for row in found["results"])
    assert ",".join(found["results"][0]) == COLUMNS
    with (out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == COLUMNS
    assert [row["method"] for row in rows] == [row["method"] for row in found["results"]]
    assert len(lines(out)) == 12
    assert all(280 < record["prompt_tokens"] <= 301 for record in lines(out))
    table = result.stdout
    for shown in ("key-value", "key-value, forced", "refreshkv-paper", "100.0%", "report.html"):
        assert shown in table
    assert (out / "report.html").exists()
    # Nothing is left to do, and the table is that of the directory.
    again = run(*args(out, "--json", mode="both"))
    assert last_json(again) == found


def test_perplexity_beside_full_attention(
    args: Any, run: Callable[..., Any], last_json: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"key{i % 7} is {i}." for i in range(300)))
    option = {"tasks": "perplexity", "task_option": f"perplexity.data={tmp_path / 'a.txt'}"}
    methods = "full,snapkv:budget=0.5,snapkv:budget=4096"
    result = run(*args(tmp_path / "run", "--json", methods=methods, **option))
    full, half, whole = last_json(result)["results"]
    assert (full["ratio"], full["agreement"], full["kl"]) == (1, 1, 0)
    assert whole["ratio"] == pytest.approx(1, abs=1e-4) and whole["agreement"] > 0.99
    assert half["kl"] > 10 * whole["kl"] >= 0
    assert half["ratio_low"] == half["ratio"] == half["ratio_high"]  # one document
    assert half["ratio"] == pytest.approx(half["score"] / full["score"]) != 1
    assert f"{half['ratio']:.4f}" in result.stdout and "Agree:" in result.stdout
    alone = run(*args(tmp_path / "alone", "--json", methods="snapkv", **option))
    assert last_json(alone)["results"][0]["agreement"] is None
    assert "add full to --methods" in " ".join(alone.stdout.split())


def test_the_budget_of_each_method(args: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    """The lossless method has its own, unless --budget says another for all."""
    methods = "full,refreshkv-paper,refreshkv"
    for given, expected in ((None, [0.125, 0.0625]), (24, [24, 24])):
        out = tmp_path / str(given)
        assert run(*args(out, methods=methods, limit=1, budget=given)).exit_code == 0
        full, paper, exact = lines(out)
        assert [paper["budget"], exact["budget"]] == expected
        assert exact["output"] == full["output"]


def test_a_kill_loses_no_line_and_repeats_none(
    args: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    size = {"limit": 12, "methods": "full,snapkv-1", "batch": 2}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "refreshkv.cli", *args(killed, **size)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        for _ in range(3000):
            time.sleep(0.01)
            results = killed / "results.jsonl"
            if results.exists() and results.read_bytes().count(b"\n") >= 4:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    before = results.read_bytes()
    before = before[: before.rindex(b"\n") + 1]
    assert 4 <= before.count(b"\n") < 24
    assert run(*args(killed, **size)).exit_code == 0
    after = results.read_bytes().splitlines()
    assert set(before.splitlines()) <= set(after)  # the seconds too: nothing was done again
    assert run(*args(whole, **size)).exit_code == 0
    assert lines(killed) == lines(whole)
    for name in ("summary.csv", "config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_give_the_numbers_of_one(
    args: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    # With --cpu, accelerate starts one process, whatever --num_processes says.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [
        sys.executable,
        "-m",
        *launch.split(),
        "--dynamo_backend",
        "no",
        "-m",
        "refreshkv.cli",
    ]
    done = subprocess.run(
        [*command, *args(two, "--json", "--device", "cpu", limit=5, batch=2, mode="both")],
        env={**ENVIRONMENT, "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert run(*args(one, limit=5, mode="both")).exit_code == 0
    assert [json.loads((d / "config.json").read_text())["processes"] for d in (two, one)] == [2, 1]
    assert lines(two) == lines(one)
    assert (two / "summary.csv").read_bytes() == (one / "summary.csv").read_bytes()
    assert done.stdout.count("Report:") == 1  # the main process alone speaks
    assert json.loads(done.stdout.splitlines()[-1])["results"][0]["examples"] == 5
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())


@pytest.mark.parametrize("name", ["key-value", "perplexity", "ruler-vt"])
def test_describe(name: str, run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    result = run("eval", "--describe", name)
    assert result.exit_code == 0
    (task,) = last_json(run("eval", "--describe", name, "--json"))["tasks"]
    assert task["name"] == name
    for said in (name, task["metric"], *task["recipe"].splitlines()):
        assert said in result.stdout
    for setting in task["settings"]:
        assert f"    {setting} = " in result.stdout


def test_describe_a_group(run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    assert len(last_json(run("eval", "--describe", "ruler", "--json"))["tasks"]) == 13


def test_list(run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    from refreshkv.methods import METHODS
    from refreshkv.tasks import TASKS

    shown = run("eval", "--list").stdout
    found = last_json(run("eval", "--list", "--json"))
    assert [task["name"] for task in found["tasks"]] == list(TASKS)
    assert [method["name"] for method in found["methods"]] == list(METHODS)
    for entry in (*found["tasks"], *found["methods"]):
        assert entry["name"] in shown
        assert entry["source"], f"{entry['name']} names no source"


BAD = [
    ({"tasks": "key-valu"}, 2, "unknown task 'key-valu'; did you mean 'key-value'? "),
    ({"tasks": ","}, 2, "--tasks names nothing; 'refreshkv eval --list' shows what there is"),
    ({"tasks": None}, 2, "Missing option '--tasks'. (see 'refreshkv eval --help')"),
    ({"out": None}, 2, "Missing option '--out'. "),
    ({"methods": "full,refreskv"}, 2, "unknown method 'refreskv'; did you mean 'refreshkv'? "),
    ({"methods": "refreshkv:strid=5"}, 2, "method 'refreshkv:strid=5': .*'strid'.*'stride'"),
    ({"methods": "refreshkv:stride=0"}, 2, "method 'refreshkv:stride=0': stride must be an integ"),
    (
        {"methods": "full,refreshkv", "mode": "both"},
        2,
        "method 'refreshkv' says only what .* task key-value feeds it an answer; use --mode free, or .*refreshkv-paper",
    ),
    ({"budget": "0"}, 2, "budget must be at least 1 token, "),
    ({"limit": 0}, 2, "Invalid value for '--limit': 0 is not in the range 1<=x<=1000000"),
    ({"batch": 0}, 2, "Invalid value for '--batch': 0 is not in the range 1<=x<=65536"),
    ({"mode": "fed"}, 2, "Invalid value for '--mode': 'fed' is not one of"),
    ({"length": 4}, 2, "key-value: .*raise the length"),
    (
        {"length": 9000},
        2,
        "key-value: prompts of 9000 tokens, but the model has 8192 positions; lower the",
    ),
    ({"task_option": "keys=1"}, 2, "--task-option 'keys=1' is not TASK.NAME=VALUE, for example"),
    (
        {"task_option": "key-value.key=1"},
        2,
        "unknown setting of key-value 'key'; did you mean 'keys",
    ),
    ({"task_option": "key-value.keys=0"}, 2, "key-value: keys must be an integer >= 1; got 0"),
    ({"task_option": "key-value.keys=two"}, 2, "keys must be an integer >= 1; got 'two'"),
    ({"task_option": "key-value.keys=true"}, 2, "keys must be an integer >= 1; got True"),
    (
        {"task_option": "chain-of-key.keys=4"},
        2,
        "chain-of-key is not among --tasks; add it, or lea",
    ),
    ({"task_option": "chain.keys=4"}, 2, "unknown task 'chain'"),
    ({"tasks": "perplexity", "task_option": None}, 2, "perplexity: no data; give perplexity.data"),
    ({"chat": ""}, 2, "no chat template; leave out --chat"),
    ({"describe": "chain-of-keys"}, 2, "unknown task 'chain-of-keys'; did you mean 'chain-of-key'"),
]


@pytest.mark.parametrize("changes, code, message", BAD)
def test_bad_input(
    changes: dict[str, Any],
    code: int,
    message: str,
    args: Any,
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    options = {"out": tmp_path / "run", **changes}
    flags = [f"--{name}" for name, value in options.items() if value == ""]
    given = {name: value for name, value in options.items() if value != ""}
    result = run(*args(given.pop("out"), *flags, **given))
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.match(f"refreshkv: error: .*{pattern}", result.stderr), result.stderr
    assert not (tmp_path / "run").exists()


def test_a_directory_with_other_settings(
    args: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    assert run(*args(tmp_path, limit=1)).exit_code == 0
    before = (tmp_path / "results.jsonl").read_bytes()
    result = run(*args(tmp_path, seed=1))
    assert result.exit_code == 2
    assert "was made with seed 0, now it is 1; use another --out" in result.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_full_disk(
    args: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("refreshkv.evals.store.os.write", full)
        result = run(*args(tmp_path))
    assert result.exit_code == 1
    assert re.fullmatch(
        r"refreshkv: error: cannot write '.*results\.jsonl' \(No space left on device\); the results so far are"
        r" kept: make room, then run the same command again to go on\n",
        result.stderr,
    )
    assert run(*args(tmp_path)).exit_code == 0
    assert len(lines(tmp_path)) == 6
