"""Run directories of `refreshkv eval` -> the tables and plots of docs/fidelity.md (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refreshkv.evals import plots
from refreshkv.evals.summary import Summary, read_results, scale, summarize, write_whole
from refreshkv.tasks.breadth import PREFIX
from refreshkv.text import visible

COLUMNS = ("score", "95 %", "same text", "KV read", "worst", "passes")


def show(runs: tuple[Path, ...], *, plots_in: Path | None = None) -> None:
    """Print a Markdown table of each run: of the breadth families a row a family, else a row a task and method.

    Args:
        runs: directories given to --out.
        plots_in: write a plot of each task into this folder.

    Raises:
        ValueError: a directory without results, or a line that is none.
    """
    for run in runs:
        summaries = [row for row in summarize(read_results(run)) if row.mode == "free"]
        families = all(row.task.startswith(PREFIX) for row in summaries)
        shown = (family_table if families else task_table)(summaries)
        print(visible(f"### {run.name}\n\n{shown}\n", keep="\n"))
        if plots_in is not None:
            plots_in.mkdir(parents=True, exist_ok=True)
            look = plots.styles(row.method for row in summaries)
            for task in dict.fromkeys(row.task for row in summaries):
                figure = plots.pareto([row for row in summaries if row.task == task], look, task)
                if figure is not None:
                    write_whole(plots_in / f"{run.name}-{task}.svg", plots.render(figure))


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
                "1" if row.passes_per_token is None else f"{row.passes_per_token:.2f}",
            ]
        )
    return markdown(["", *COLUMNS], rows)


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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
