"""Ours beside the paper's: each cell from the records of its runs, the difference, and what is kept of full attention.

Perplexities are as they are, all else is in per cent. Intervals are those of `refreshkv.evals.summary`, 95 % over
examples; the interval of a difference is that of our number, for the paper gives none for its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refreshkv.evals.summary import Summary, average, scale
from refreshkv.reproduce import paper
from refreshkv.reproduce.jobs import Request, following, records_of
from refreshkv.reproduce.tables import Column


@dataclass(frozen=True)
class Cell:
    """One number, ours and the paper's.

    Attributes:
        ours, low, high: the mean over examples, and the ends of its 95 % interval.
        paper: the paper's number; `None` where we do not know one.
        difference, difference_low, difference_high: ours - paper's.
        kept, paper_kept: over the number of full attention in the same column; of a perplexity the lower the better.
            `None` without one, or where that is 0.
        output_tokens: decoded, mean.
        ended: share of the outputs that the model ended by itself; 1 where an answer is fed.
        kv_read_share, same_as_full: as `Summary` says.
    """

    column: str
    row: str
    label: str
    method: str
    metric: str
    examples: int
    ours: float
    low: float
    high: float
    paper: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    kept: float | None
    paper_kept: float | None
    output_tokens: float
    ended: float
    kv_read_share: float | None
    same_as_full: float | None


def cells(request: Request, beside: str) -> list[Cell]:
    """All cells whose runs are there, also of columns that were run before and are not asked for now.

    Args:
        beside: the family whose numbers of the paper stand beside.

    Raises:
        ValueError: a results file with a line that is no result.
    """
    return [cell for column in request.table.columns for cell in _of(request, column, beside)]


def _of(request: Request, column: Column, beside: str) -> list[Cell]:
    records = [_records(request, column, i) for i in range(len(column.measures))]
    if not all(records):  # a mean of fewer is another number
        return []
    every = [record for part in records for record in part]
    summaries = {
        summary.method: summary for summary in average(every, _name(every[0], column.name))
    }
    ended = {
        method: [bool(record.get("ended", True)) for record in every if record["method"] == method]
        for method in summaries
    }
    methods = request.methods(column)
    full = summaries.get("full")
    found = []
    for row in request.table.rows_of(column):
        method = methods.get(row.name) or following(request, column, row)
        if method in summaries:
            theirs = paper.number(beside, column.name, row.name)
            of_full = paper.number(beside, column.name, "full")
            own = _compared(summaries[method], full, theirs, of_full)
            share = sum(ended[method]) / len(ended[method])
            found.append(Cell(column.name, row.name, row.label, method, ended=share, **own))
    return found


def _compared(
    ours: Summary, full: Summary | None, theirs: float | None, their_full: float | None
) -> dict[str, Any]:
    score, low, high = (scale(ours.task) * x for x in (ours.score, ours.ci_low, ours.ci_high))
    apart = (None,) * 3 if theirs is None else tuple(x - theirs for x in (score, low, high))
    return {
        "metric": ours.metric,
        "examples": ours.examples,
        "ours": score,
        "low": low,
        "high": high,
        "paper": theirs,
        **dict(zip(("difference", "difference_low", "difference_high"), apart, strict=True)),
        "kept": ours.score / full.score if full is not None and full.score else None,
        "paper_kept": None if theirs is None or not their_full else theirs / their_full,
        "output_tokens": ours.output_tokens,
        "kv_read_share": ours.kv_read_share,
        "same_as_full": ours.same_as_full,
    }


def _records(request: Request, column: Column, place: int) -> list[dict[str, Any]]:
    """Of one measure; the tasks of several get names of their own, or they would be one."""
    measure = column.measures[place]
    found = records_of(request, measure)
    if len(column.measures) == 1:
        return found
    return [{**record, "task": _name(record, measure.name)} for record in found]


def _name(record: Mapping[str, Any], name: str) -> str:
    """A task's name from which it still can be told what its score is."""
    return f"{record['task']} {name}"


FIELDS = tuple(Cell.__dataclass_fields__)


def by_column(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each column that has any, in their order."""
    return {
        name: [c for c in found if c.column == name]
        for name in dict.fromkeys(c.column for c in found)
    }
