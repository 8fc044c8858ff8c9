"""Cells against an independent few lines, from records as a run writes them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refreshkv.evals.results import line_of
from refreshkv.reproduce import tables, writing
from refreshkv.reproduce.comparison import Cell, cells
from refreshkv.reproduce.jobs import Request, following, make_jobs, matched
from refreshkv.reproduce.tables import Table


def request(table: Table, out: Path, **given: Any) -> Request:
    return Request(table=table, out=out, model="m", family="llama", **given)


def record(task: str, method: str, example: int, score: float, **more: Any) -> dict[str, Any]:
    place = {"task": task, "method": method, "mode": "free", "example": f"{example:04d}"}
    about = {"key": "|".join(place.values()), "prompt_sha256": "0", "metric": "row F1"}
    return {**place, **about, "score": score, "output_tokens": 10, "ended": True, **more}


def write(out: Path, measure: str, records: Iterable[dict[str, Any]]) -> None:
    folder = out / "runs" / measure
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(map(line_of, records)))


def bootstrap(scores: np.ndarray) -> tuple[float, float]:
    drawn = np.random.default_rng(7).choice(scores, (20_000, len(scores))).mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def by_row(found: list[Cell], column: str) -> dict[str, Cell]:
    return {cell.row: cell for cell in found if cell.column == column}


def test_a_score_beside_the_papers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = {"full": rng.random(40) * 0.6 + 0.2, "snapkv-1": rng.random(40) * 0.2}
    every = [record("html-to-tsv", m, i, float(x)) for m in scores for i, x in enumerate(scores[m])]
    write(tmp_path, "html-0.5k", every)
    asked = request(tables.LEVELS, tmp_path, data={"html-0.5k": "generated"})
    found = by_row(cells(asked, "llama"), "html-0.5k")
    assert list(found) == ["full", "snapkv-1"]
    full, snapkv = found.values()
    assert full.ours == pytest.approx(100 * scores["full"].mean())
    assert (full.paper, full.examples, full.kept, full.paper_kept) == (43, 40, 1, 1)
    assert full.difference == pytest.approx(100 * scores["full"].mean() - 43)
    low, high = bootstrap(scores["full"])
    assert full.low == pytest.approx(100 * low, abs=0.5)
    assert full.high == pytest.approx(100 * high, abs=0.5)
    assert full.difference_low == pytest.approx(full.low - 43)
    assert full.difference_high == pytest.approx(full.high - 43)
    assert snapkv.kept == pytest.approx(scores["snapkv-1"].mean() / scores["full"].mean())
    assert snapkv.paper_kept == 0
    assert {cell.paper for cell in cells(asked, "qwen")} == {None}


def test_a_perplexity_beside_the_papers(tmp_path: Path) -> None:
    nats = {
        "full": np.array([0.7, 0.9, 0.8]),
        "refreshkv-fixed:stride=10": np.array([0.8, 1.0, 1.2]),
    }
    every = [
        record("perplexity", method, i, float(x), mode="forced", metric="perplexity")
        for method, values in nats.items()
        for i, x in enumerate(values)
    ]
    for one in every:
        one["key"] = "|".join(one[name] for name in ("task", "method", "mode", "example"))
    write(tmp_path, "8k-before", every)
    found = by_row(cells(request(tables.TRAINING, tmp_path), "llama"), "8k-before")
    fixed = found["fixed-10"]
    assert fixed.ours == pytest.approx(math.e)
    assert fixed.kept == pytest.approx(math.exp(0.2))
    assert (fixed.paper, fixed.paper_kept) == (2.83, pytest.approx(2.83 / 2.70))
    assert fixed.difference == pytest.approx(math.e - 2.83)
    assert fixed.low <= fixed.ours <= fixed.high
    assert writing.figures(tables.TRAINING, fixed)[0] == "2.72"


def test_a_mean_of_levels_weighs_each_level_once(tmp_path: Path) -> None:
    for level, count, score in (("0.5k", 1, 0.9), ("2k", 8, 0.3)):
        write(
            tmp_path,
            f"html-{level}",
            [record("html-to-tsv", "full", i, score) for i in range(count)],
        )
    asked = request(tables.LONG_FORM, tmp_path)
    assert cells(asked, "llama") == []  # two levels of three are another number
    write(tmp_path, "html-8k", [record("html-to-tsv", "full", 0, 0.0)])
    (cell,) = cells(asked, "llama")
    assert (cell.column, cell.examples, cell.paper) == ("html-to-tsv", 10, 33)
    assert cell.ours == pytest.approx(40) and cell.low == cell.high


def test_the_fixed_stride_is_the_mean_one_of_the_row_before(tmp_path: Path) -> None:
    dynamic = "refreshkv-paper:stride=5:threshold=0.85"
    layers = {"0": {"steps": 60, "full_steps": 10}, "1": {"steps": 60, "full_steps": 2}}
    asked = request(tables.ABLATIONS, tmp_path, data={"html-0.5k": "generated"})
    job = make_jobs(asked)[1]
    assert matched(asked, job) is None  # nothing is known yet
    write(tmp_path, "html-0.5k", [record("html-to-tsv", dynamic, 0, 1.0, layers=layers)])
    more = matched(asked, job)
    assert more is not None and more.folder == job.folder
    assert [spec.text for spec in more.grid.methods] == ["refreshkv-fixed:stride=10"]
    assert matched(asked, make_jobs(asked)[0]) is None  # the column of perplexities has no such row


def test_a_stride_that_was_never(tmp_path: Path) -> None:
    dynamic = "refreshkv-paper:stride=5:threshold=0.85"
    layers = {"0": {"steps": 60, "full_steps": 0}}
    asked = request(tables.ABLATIONS, tmp_path, data={"html-0.5k": "generated"})
    write(tmp_path, "html-0.5k", [record("html-to-tsv", dynamic, 0, 1.0, layers=layers)])
    column = tables.ABLATIONS.columns[1]
    assert following(asked, column, tables.ABLATIONS.rows[-1]) == "no-refresh"
    assert matched(asked, make_jobs(asked)[1]) is not None  # a method that can be run


def test_the_share_of_outputs_that_ended(tmp_path: Path) -> None:
    every = [
        record("reasoning", "full", i, 0.0, ended=i < 3, output_tokens=100 * i) for i in range(4)
    ]
    write(tmp_path, "aime-2024", every)
    (cell,) = cells(request(tables.REASONING, tmp_path), "llama")
    assert (cell.ended, cell.output_tokens, cell.same_as_full) == (0.75, 150, 1)
    assert writing.figures(tables.REASONING, cell) == (
        "0.0",
        "[0.0, 0.0]",
        "150",
        "75%",
        "-",
        "100%",
    )


ABOUT = {"table": "html-levels", "model": "m", "small": True, "seed": 0}


def test_files(tmp_path: Path) -> None:
    write(tmp_path, "html-0.5k", [record("html-to-tsv", "full", i, 0.5) for i in range(2)])
    found = cells(request(tables.LEVELS, tmp_path, small=True), "llama")
    writing.write(
        tmp_path, ABOUT, tables.LEVELS, ["Title", "A note."], {"html-0.5k": "Known."}, found
    )
    text = (tmp_path / "table.md").read_text()
    for line in ("# Title", "A note.", "## HTML to TSV 0.5k, row F1", "Known."):
        assert f"{line}\n" in text
    assert (
        "| full attention | 50.0 | [50.0, 50.0] | 43.0 | +7.0 | [7.0, 7.0] | 100% | 100% | 2 |"
        in text
    )
    (row,) = csv.DictReader((tmp_path / "table.csv").open())
    assert (row["ours"], row["paper"], row["difference"], row["examples"]) == ("50", "43", "7", "2")
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["cells"][0]["ours"] == 50 and stored["table"] == "html-levels"
    writing.check(tmp_path, ABOUT)
    with pytest.raises(ValueError, match="was made with seed 0, now it is 1; use another --out"):
        writing.check(tmp_path, {**ABOUT, "seed": 1})
    (tmp_path / "table.json").write_text("[")
    with pytest.raises(ValueError, match="was not written by reproduce"):
        writing.check(tmp_path, ABOUT)
