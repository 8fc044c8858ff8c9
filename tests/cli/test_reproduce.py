"""`refreshkv reproduce` as a user meets it: every table in its small form, stops, plans, what stands in the files."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from refreshkv.evals.store import Lines
from refreshkv.reproduce.tables import REASONING, TABLES, Table

Run = Callable[..., Any]


@pytest.fixture
def args(stand_in: Path) -> Callable[..., list[object]]:
    """A small form with one example a task."""

    def make(table: object, out: Path, *more: object) -> list[object]:
        model = ("--model", stand_in, "--small", "--limit", 1, "--out", out)
        return ["reproduce", table, *model, "--json", *more]

    return make


def numbers(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "table.json").read_text())["cells"]


def results(out: Path) -> dict[str, str]:
    """The records of each run, without what differs from run to run."""
    found = {}
    for path in sorted(out.glob("runs/*/results.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = json.dumps([{**one, "seconds": 0} for one in records])
    return found


def expected(table: Table, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    return [
        (column.name, row.name)
        for column in table.columns
        for row in table.rows_of(column)
        if column.name not in without
    ]


AFTER = ("8k-after", "16k-after")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_small_form_of_every_table(
    table: Table, args: Any, run: Run, last_json: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(*args(table.number, out))
    found = last_json(result)
    cells = found["cells"]
    assert [(cell["column"], cell["row"]) for cell in cells] == expected(table, AFTER)
    assert found["table"] == table.name and found["small"]
    assert "not comparable with the paper's numbers" in result.stdout.splitlines()[0]
    assert "is not the paper's Llama-3.1-8B" in " ".join(result.stdout.split())
    assert cells == numbers(out)
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["column"], row["row"]) for row in rows] == expected(table, AFTER)
    assert list(rows[0]) == list(cells[0])
    text = (out / "table.md").read_text()
    assert text.startswith(f"# {table.title}, on ") and "| full attention |" in text
    for cell in cells:
        assert cell["low"] <= cell["ours"] <= cell["high"]
        assert cell["kept"] == 1 or cell["row"] != "full" or cell["ours"] == 0
        if cell["paper"] is not None:
            assert cell["difference"] == pytest.approx(cell["ours"] - cell["paper"])


def test_a_stop_changes_no_number(
    args: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the second column; the same command goes on and repeats nothing."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(*args(4, whole)).exit_code == 0
    written = []
    append = Lines.append

    def stop(self: Lines, records: Sequence[Any]) -> None:
        if len(written) == 8:
            raise KeyboardInterrupt
        written.append(records)
        append(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "append", stop)
        result = run(*args(4, stopped))
    assert (result.exit_code, result.stderr.strip()) == (1, "refreshkv: error: interrupted")
    assert not (stopped / "table.md").exists()
    assert run(*args(4, stopped)).exit_code == 0
    # The texts that were made up lie elsewhere.
    assert results(stopped) == {
        name: lines.replace(str(whole), str(stopped)) for name, lines in results(whole).items()
    }
    assert numbers(stopped) == numbers(whole)
    monkeypatch.setattr(Lines, "append", None)  # nothing is left to do
    assert run(*args(4, stopped)).exit_code == 0


def test_a_full_disk_loses_nothing(
    args: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("refreshkv.reproduce.small_data.write_whole", full)
        result = run(*args(4, out, "--only", "arxiv"))
        assert result.exit_code == 1 and "make room" in result.stderr
    with monkeypatch.context() as patch:
        patch.setattr("refreshkv.reproduce.writing.write_whole", full)
        result = run(*args(4, out, "--only", "arxiv"))
        assert result.exit_code == 1 and "the results so far are kept: make room" in result.stderr
    monkeypatch.setattr(Lines, "append", None)
    assert run(*args(4, out, "--only", "arxiv")).exit_code == 0
    assert len(numbers(out)) == 5


def test_the_fixed_stride_follows_the_query(args: Any, run: Run, tmp_path: Path) -> None:
    assert run(*args("ablations", tmp_path / "out", "--only", "html-0.5k")).exit_code == 0
    cells = {cell["row"]: cell for cell in numbers(tmp_path / "out")}
    with (tmp_path / "out" / "runs" / "html-0.5k" / "summary.csv").open() as file:
        stride = {row["method"]: row["effective_stride"] for row in csv.DictReader(file)}
    mean = stride[cells["dynamic"]["method"]]
    assert cells["fixed"]["method"] == f"refreshkv-fixed:stride={round(float(mean))}"


def test_columns_one_after_the_other(args: Any, run: Run, last_json: Run, tmp_path: Path) -> None:
    """What was run before stays in the table."""
    out = tmp_path / "out"
    first = last_json(run(*args(10, out, "--only", "html-2k")))["cells"]
    assert {cell["column"] for cell in first} == {"html-2k"}
    both = last_json(run(*args(10, out, "--only", "html-0.5k")))["cells"]
    assert [cell for cell in both if cell["column"] == "html-2k"] == first
    assert len(both) == 2 * len(first)


def test_before_and_after_training(
    args: Any, run: Run, last_json: Run, stand_in: Path, tmp_path: Path
) -> None:
    """A model that was not changed has the same numbers after; the folder of a run will do, and its test documents."""
    trained = tmp_path / "trained"
    (trained / "data").mkdir(parents=True)
    shutil.copytree(stand_in, trained / "model")
    line = json.dumps({"text": " ".join(f"key{i % 7} is {i}." for i in range(300))}) + "\n"
    (trained / "data" / "test.jsonl").write_text(line)
    out = tmp_path / "out"
    result = run(*args(5, out, "--trained", trained, "--only", "8k-before,8k-after"))
    cells = {(cell["column"], cell["row"]): cell for cell in last_json(result)["cells"]}
    before, after = ([c for c in cells if c[0] == f"8k-{when}"] for when in ("before", "after"))
    assert len(before) == len(after) == 7
    for (_, row), (_, same) in zip(before, after, strict=True):
        assert row == same
        assert cells["8k-before", row]["ours"] == cells["8k-after", row]["ours"]
    for when in ("before", "after"):
        lines = (out / "runs" / f"8k-{when}" / "results.jsonl").read_text().splitlines()
        assert "test.jsonl" in json.loads(lines[0])["source"]


def test_own_texts(args: Any, run: Run, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text(" ".join(f"key{i % 7} is {i}." for i in range(400)))
    more = ("--only", "arxiv", "--data", f"arxiv={text}", "--beside", "qwen")
    result = run(*args(2, tmp_path / "out", *more))
    assert result.exit_code == 0
    line = (tmp_path / "out" / "runs" / "arxiv" / "results.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["source"] == str(text)
    paper = {cell["row"]: cell["paper"] for cell in numbers(tmp_path / "out")}
    assert paper["stride-5"] == 2.39 and paper["h2o"] is None
    assert "is not the paper's Qwen2-7B" in " ".join(result.stdout.split())


def test_problems(args: Any, run: Run, last_json: Run, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    file = tmp_path / "problems.jsonl"
    file.write_text('{"problem": "What is 1 + 1?", "answer": 2}\n')
    more = ("--only", "own", "--data", f"own={file}", "--max-new-tokens", 9, "--budget", 8)
    result = run(*args("--reasoning", tmp_path / "out", *more))
    cells = last_json(result)["cells"]
    assert [(cell["column"], cell["row"]) for cell in cells] == [
        ("own", row.name) for row in REASONING.rows
    ]
    assert all(cell["output_tokens"] <= 9 and 0 <= cell["ended"] <= 1 for cell in cells)
    lossless = next(cell for cell in cells if cell["row"] == "lossless")
    assert lossless["same_as_full"] == 1
    for heading in ("tokens", "ended", "KV read", "same text"):
        assert heading in result.stdout


def test_a_plan_needs_no_weights(run: Run, last_json: Run, tmp_path: Path) -> None:
    """And no data, and no network: a config will do."""
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    plan = ("--model", tmp_path, "--dry-run", "--json")
    result = run("reproduce", "10", *plan)
    found = last_json(result)
    assert [cost["name"] for cost in found["costs"]] == ["html-0.5k", "html-2k", "html-8k"]
    assert found["machine"] == "a100" and "an estimate, nothing was run" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    slow = last_json(run("reproduce", "10", *plan, "--bandwidth", 1, "--flops", 1))["costs"]
    for one, other in zip(found["costs"], slow, strict=True):
        assert one["decoded"] == other["decoded"] and one["hours"] < other["hours"]
    small = last_json(run("reproduce", "10", *plan, "--small", "--fixed-ms", 0))["costs"]
    assert small[0]["prompt"] < found["costs"][0]["prompt"]


def test_a_plan_of_a_shape(run: Run, last_json: Run) -> None:
    found = last_json(run("reproduce", "2", "--model", "llama-3.1-8b", "--dry-run", "--json"))
    assert found["costs"][0]["weights"] == pytest.approx(16.06e9, rel=0.01)


def test_the_list(run: Run, last_json: Run) -> None:
    result = run("reproduce", "--list", "--json")
    found = last_json(result)["tables"]
    assert [table["number"] for table in found] == [2, 3, 4, 5, 10, None]
    text = run("reproduce", "--list").stdout
    for table in TABLES:
        assert f"{table.number}  {table.name}" in text
        assert all(column.name in text for column in table.columns)
    assert "--data html-8k=PATH" in text


def test_a_column_that_cannot_be_run_is_named(args: Any, run: Run, tmp_path: Path) -> None:
    """Before the first token of any."""
    short = tmp_path / "short.txt"
    short.write_text("too short")
    result = run(*args(2, tmp_path / "out", "--data", f"book={short}"))
    assert result.exit_code == 2
    assert result.stderr.startswith("refreshkv: error: column book: perplexity: none of the 1 doc")
    assert results(tmp_path / "out") == {"arxiv": "[]"}
