"""The tables say what the paper says, and every one of them is runs that can be made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refreshkv.reproduce import paper, tables
from refreshkv.reproduce.jobs import Job, Request, make_jobs, placeholders
from refreshkv.reproduce.tables import REASONING, TABLES, Measure, Table, find

EVERY = (*TABLES, REASONING)


def jobs(table: Table, **given: Any) -> list[Job]:
    request = Request(table=table, out=Path("out"), model="m", trained="t", **given)
    data = {**placeholders(request), **({"own": "p.jsonl"} if table is REASONING else {})}
    return make_jobs(Request(**{**vars(request), "data": {**data, **request.data}}))


def job(table: Table, name: str, **given: Any) -> Job:
    return next(one for one in jobs(table, **given) if one.measure.name == name)


@pytest.mark.parametrize(
    "family, column, row, number",
    [
        ("llama", "arxiv", "full", 2.22),
        ("llama", "arxiv", "streaming-llm", 2.62),
        ("llama", "arxiv", "stride-5", 2.27),
        ("llama", "arxiv", "no-reselection", 2.50),
        ("llama", "book", "h2o", 7.60),
        ("llama", "book", "stride-10", 7.41),
        ("llama", "ruler", "snapkv-1", 79),
        ("llama", "ruler", "stride-10", 80),
        ("llama", "govreport", "h2o", 27.41),
        ("llama", "qmsum", "full", None),
        ("llama", "novelsumm", "snapkv-1", 29.23),
        ("llama", "html-to-tsv", "stride-5", 17),
        ("llama", "chain-of-key", "stride-10", 15),
        ("llama", "html-0.5k", "no-full-attention", 16),
        ("llama", "html-0.5k", "dynamic", 30),
        ("llama", "html-0.5k", "fixed", 17),
        ("llama", "html-8k", "stride-5", 4),
        ("llama", "html-8k", "stride-10", None),
        ("llama", "8k-before", "fixed-50", 3.13),
        ("llama", "8k-after", "fixed-50", 3.05),
        ("llama", "16k-after", "fixed-10", 2.56),
        ("llama", "16k-after", "fixed-25", None),
        ("qwen", "arxiv", "stride-5", 2.39),
        ("qwen", "book", "snapkv-1", 9.18),
        ("qwen", "ruler", "full", 79),
        ("qwen", "novelsumm", "stride-5", 19.70),
        ("qwen", "chain-of-key", "full", 83),
        ("qwen", "html-2k", "full", None),
        ("qwen", "arxiv", "h2o", None),
    ],
)
def test_numbers_of_the_paper(family: str, column: str, row: str, number: float | None) -> None:
    assert paper.number(family, column, row) == number


def test_every_number_has_a_cell() -> None:
    places = {(c.name, row.name) for t in TABLES for c in t.columns for row in t.rows_of(c)}
    known = {(c, row) for family in paper.NUMBERS.values() for c in family for row in family[c]}
    assert known <= places
    assert known  # and the other way round there are gaps, which are shown as "-"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_table_has_a_number_and_a_name(table: Table) -> None:
    assert find(str(table.number)) is find(table.name) is table


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match="unknown table 'long-from'; did you mean 'long-form'"):
        find("long-from")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("table", EVERY, ids=lambda table: table.name)
def test_every_table_is_runs(table: Table, small: bool) -> None:
    made = jobs(table, small=small)
    assert len({one.folder for one in made}) == len(made)
    for one in made:
        form = one.measure.form(small)
        assert one.grid.limit == form.limit and one.grid.budget == form.budget
        own = [row for row in table.rows_of(one.column) if row.like is None]
        assert [spec.name for spec in one.grid.methods] == [r.method.split(":")[0] for r in own]
        for task in one.grid.tasks:
            assert getattr(task, "length", form.prompt) == form.prompt
            assert form.new >= getattr(task, "scored", 0)


def measures() -> Iterator[tuple[str, Measure]]:
    for table in TABLES:
        for column in table.columns:
            yield from ((measure.name, measure) for measure in column.measures)


def test_what_two_tables_measure_is_measured_alike() -> None:
    """A folder of runs never means two things."""
    found: dict[str, Measure] = {}
    for name, measure in measures():
        assert found.setdefault(name, measure) == measure


@pytest.mark.parametrize("family, threshold", [("llama", 0.85), ("qwen", 0.95), (None, 0.85)])
def test_the_papers_settings(family: str | None, threshold: float) -> None:
    arxiv = job(tables.LANGUAGE, "arxiv", family=family)
    (task,) = arxiv.grid.tasks
    assert (task.length, task.scored, task.data) == (16_384, 256, "arxiv")  # type: ignore[attr-defined]
    assert (arxiv.grid.budget, arxiv.grid.limit) == (2048, 100)
    configs = {spec.text: spec.config(2048) for spec in arxiv.grid.methods}
    for stride in (5, 10):
        config = configs[f"refreshkv-paper:stride={stride}:threshold={threshold}"]
        assert (config.stride, config.threshold, config.pool_kernel) == (stride, threshold, 7)
        assert (config.budget, config.window, config.recent) == (2048, 1, 0)
    snapkv = configs["snapkv-1"]
    assert (snapkv.window, snapkv.pool_kernel) == (1, 7)  # type: ignore[attr-defined]
    assert configs["streaming-llm"].sinks == 4  # type: ignore[attr-defined]


def test_the_sizes_of_the_paper() -> None:
    novel = job(tables.LONG_FORM, "novelsumm")
    assert (novel.grid.limit, novel.grid.budget) == (103, 4096)
    assert vars(novel.grid.tasks[0]) == {
        "length": 100_000,
        "data": "novelsumm",
        "max_new_tokens": 1000,
    }
    report = job(tables.LONG_FORM, "govreport").grid.tasks[0]
    assert (report.length, report.max_new_tokens) == (10_000, 700)  # type: ignore[attr-defined]
    assert len(job(tables.LANGUAGE, "ruler").grid.tasks) == 13
    assert {one.grid.limit for one in jobs(tables.LEVELS)} == {50}
    for name, length in (("8k-before", 8192), ("16k-after", 16_384)):
        one = job(tables.TRAINING, name)
        assert vars(one.grid.tasks[0]) == {"length": length, "scored": 50, "data": "arxiv"}
        assert one.grid.budget == 2048
        assert one.grid.model == ("t" if "after" in name else "m")


def test_own_data_take_the_place_of_a_set(tmp_path: Path) -> None:
    one = job(tables.LEVELS, "html-0.5k", data={"html-0.5k": "a.json"}).grid.tasks[0]
    assert one.data == "a.json"  # type: ignore[attr-defined]
    own = job(tables.LEVELS, "html-0.5k", data={"html-0.5k": "generated"}).grid.tasks[0]
    assert own.data is None  # type: ignore[attr-defined]
    for size in ("8k", "16k"):
        both = job(tables.TRAINING, f"{size}-before", data={"arxiv": "b"}).grid.tasks[0]
        assert both.data == "b"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"only": ["arxive"]}, "unknown column of Table 2, .*did you mean 'arxiv'"),
        ({"data": {"arxive": "a"}}, "unknown data set of Table 2, .*did you mean 'arxiv'"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_requests_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs(tables.LANGUAGE, **given)


def test_missing_data_are_named() -> None:
    with pytest.raises(ValueError, match=r"--data html-0.5k=PATH, where PATH is LongProc's"):
        make_jobs(Request(table=tables.LEVELS, out=Path("out"), model="m"))


def test_columns_after_training_need_a_trained_model() -> None:
    request = Request(table=tables.TRAINING, out=Path("out"), model="m")
    assert [column.name for column in request.columns] == ["8k-before", "16k-before"]
    with pytest.raises(ValueError, match="need --trained"):
        Request(table=tables.TRAINING, out=Path("out"), model="m", only=["8k-after"])
