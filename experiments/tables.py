"""Run directories of `refreshkv eval` -> the tables and plots of docs/fidelity.md and docs/evaluation.md (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.documents import NAME
from refreshkv.evals import plots
from refreshkv.evals.summary import (
    Record,
    Summary,
    is_perplexity,
    read_results,
    scale,
    summarize,
    write_whole,
)
from refreshkv.tasks.breadth import PREFIX
from refreshkv.tasks.continuation import Continuation
from refreshkv.text import visible

COLUMNS = ("score", "95 %", "same text", "KV read", "worst", "passes")
BESIDE_FULL = ("perplexity", "of full attention's", "95 %", "agreement", "KL", "KV read")


def show(runs: tuple[Path, ...], *, plots_in: Path | None = None) -> None:
    """Print a Markdown table of each run: of the breadth families a row a family, else a row a task and method.

    Perplexities are shown beside full attention, and continuations without a score.

    Args:
        runs: directories given to --out.
        plots_in: write a plot of each task into this folder.

    Raises:
        ValueError: a directory without results, or a line that is none.
    """
    for run in runs:
        records = read_results(run)
        every = summarize(records)
        summaries = [row for row in every if row.mode == "free"]
        shown = [table(rows) for rows in (summaries, [row for row in every if row.ratio]) if rows]
        shown.append(kinds_table([r for r in records if is_perplexity(r["task"])]))
        print(visible("\n\n".join((f"### {run.name}", *filter(None, shown))) + "\n", keep="\n"))
        if plots_in is not None:
            plots_in.mkdir(parents=True, exist_ok=True)
            look = plots.styles(row.method for row in summaries)
            for task in dict.fromkeys(row.task for row in summaries):
                figure = plots.pareto([row for row in summaries if row.task == task], look, task)
                if figure is not None:
                    write_whole(plots_in / f"{run.name}-{task}.svg", plots.render(figure))


def table(summaries: Sequence[Summary]) -> str:
    """The one that fits."""
    if all(row.ratio is not None for row in summaries):
        return beside_full_table(summaries)
    if all(row.task.startswith(PREFIX) for row in summaries):
        return family_table(summaries)
    if all(row.task == Continuation.name for row in summaries):
        return continuation_table(summaries)
    return task_table(summaries)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column is text and the others numbers; a short row is filled up."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [*map(str, row), *[""] * (len(head) - len(row))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("|  ", "| ")


def task_table(summaries: Sequence[Summary]) -> str:
    """A row a task and method. Shares in per cent; "worst" is the largest KV read of an example."""
    rows: list[list[str]] = []
    task = None
    for row in summaries:
        if row.task != task:
            task = row.task
            rows.append([f"**{task}**, {row.examples} prompts"])
        factor = scale(row.task)
        rows.append(
            [
                f"`{row.method}`",
                f"{factor * row.score:.1f}",
                f"{factor * row.ci_low:.1f}-{factor * row.ci_high:.1f}",
                *map(_percent, (row.same_as_full, row.kv_read_share, row.kv_read_most)),
                _passes(row),
            ]
        )
    return markdown(["", *COLUMNS], rows)


def beside_full_table(summaries: Sequence[Summary]) -> str:
    """A row a method whose perplexity was measured beside full attention's. Shares in per cent, KL in nats."""
    rows = (
        [
            f"`{row.method}`",
            f"{row.score:.2f}",
            f"{row.ratio:.4f}",
            f"{row.ratio_low:.4f}-{row.ratio_high:.4f}",
            _percent(row.agreement),
            "-" if row.kl is None else f"{row.kl:.4f}",
            _percent(row.kv_read_share),
        ]
        for row in summaries
    )
    return markdown([f"{summaries[0].examples} documents", *BESIDE_FULL], rows)


def kinds_table(records: Sequence[Record]) -> str:
    """Of perplexities a row a method, a column a kind of `documents`: ratio to full attention's, agreement (per cent).

    Empty where the texts are others.
    """
    kinds: dict[str, list[Record]] = {}
    for record in records:
        found = NAME.fullmatch(Path(record.get("source") or "").name)
        if found is None:
            return ""
        kinds.setdefault(found[1], []).append(record)
    rows: dict[str, dict[str, str]] = {}
    for kind in sorted(kinds):
        for row in summarize(kinds[kind]):
            shown = "-" if row.ratio is None else f"{row.ratio:.4f}, {_percent(row.agreement)}"
            rows.setdefault(row.method, {})[kind] = shown
    if not rows:
        return ""
    cells = (
        [f"`{name}`", *(of.get(kind, "-") for kind in sorted(kinds))] for name, of in rows.items()
    )
    return markdown(["", *sorted(kinds)], cells)


def continuation_table(summaries: Sequence[Summary]) -> str:
    """A row a method: texts that are those of full attention, KV read and its most (per cent), passes a token."""
    rows = (
        [
            f"`{row.method}`",
            "-"
            if row.same_as_full is None
            else f"{row.same_as_full * row.examples:.0f}/{row.examples}",
            *map(_percent, (row.kv_read_share, row.kv_read_most)),
            _passes(row),
        ]
        for row in summaries
    )
    return markdown(["", *COLUMNS[2:]], rows)


def family_table(summaries: Sequence[Summary]) -> str:
    """A row a family of `tasks.breadth`.

    Of every method but full attention: prompts whose whole text is that of full attention, KV read share (both in per
    cent), and passes a token where there are drafts.
    """
    families: dict[str, dict[str, Summary]] = {}
    for row in summaries:
        families.setdefault(row.task.removeprefix(PREFIX), {})[row.method] = row
    methods = [name for name in next(iter(families.values())) if name != "full"]
    rows = (
        [family, f"{100 * of['full'].score:.0f}", *(_kept(of[name]) for name in methods)]
        for family, of in families.items()
    )
    return markdown(["", "full solves", *(f"`{name}`" for name in methods)], rows)


def _kept(row: Summary) -> str:
    shares = f"{100 * (row.same_as_full or 0):.0f}, {100 * (row.kv_read_share or 0):.0f}"
    return shares if row.passes_per_token is None else f"{shares}, {row.passes_per_token:.2f}"


def _passes(row: Summary) -> str:
    return "1" if row.passes_per_token is None else f"{row.passes_per_token:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
