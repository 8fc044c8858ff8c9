"""Run directories of `refreshkv eval` -> the tables and plots of docs/fidelity.md: what is kept, and what is read.

`python -m experiments.fidelity RUN [RUN ...] [--plots DIR]` prints a Markdown table of each run (ours): of a run of
`evals.breadth` a row a family, otherwise a row a task and method.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from refreshkv.evals.report import save_pareto
from refreshkv.evals.summary import Summary, read_results, scale, summarize
from refreshkv.text import one_line, visible

_FAMILY = "breadth-"  # how their tasks are called
COLUMNS = ("score", "95 %", "same text", "KV read", "worst", "passes")


def table(summaries: Sequence[Summary]) -> str:
    """Markdown: a row a task and method. Shares in per cent; "worst" is the largest KV read of an example."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    task = None
    for row in summaries:
        if row.task != task:
            task = row.task
            lines.append(f"| **{task}**, {row.examples} prompts |" + " |" * len(COLUMNS))
        factor = scale(row.task)
        cells = (
            f"{factor * row.score:.1f}",
            f"{factor * row.ci_low:.1f}-{factor * row.ci_high:.1f}",
            _percent(row.same_as_full),
            _percent(row.kv_read_share),
            _percent(row.kv_read_most),
            "1" if row.passes_per_token is None else f"{row.passes_per_token:.2f}",
        )
        lines.append(f"| `{row.method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def family_table(summaries: Sequence[Summary]) -> str:
    """Markdown of a run of `evals.breadth`: a row a family.

    Of every method but full attention: prompts whose whole text is that of full attention, KV read share (both in per
    cent), and passes a token where there are drafts.
    """
    families: dict[str, dict[str, Summary]] = {}
    for row in summaries:
        families.setdefault(row.task.removeprefix(_FAMILY), {})[row.method] = row
    methods = [name for name in next(iter(families.values())) if name != "full"]
    lines = [
        f"| | full solves | {' | '.join(f'`{name}`' for name in methods)} |",
        "|---|" + "---:|" * (1 + len(methods)),
    ]
    for family, rows in families.items():
        cells = [_kept(rows[name]) for name in methods]
        lines.append(f"| {family} | {100 * rows['full'].score:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kept(row: Summary) -> str:
    shares = f"{100 * (row.same_as_full or 0):.0f}, {100 * (row.kv_read_share or 0):.0f}"
    return shares if row.passes_per_token is None else f"{shares}, {row.passes_per_token:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories given to --out")
    parser.add_argument("--plots", type=Path, help="write a plot of each task here")
    given = parser.parse_args()
    for run in given.runs:
        try:
            records = read_results(run)
        except ValueError as error:
            parser.exit(2, f"error: {one_line(str(error))}\n")
        summaries = [row for row in summarize(records) if row.mode == "free"]
        families = all(row.task.startswith(_FAMILY) for row in summaries)
        shown = (family_table if families else table)(summaries)
        print(visible(f"### {run.name}\n\n{shown}", keep="\n"))
        if given.plots is not None:
            given.plots.mkdir(parents=True, exist_ok=True)
            for task in dict.fromkeys(row.task for row in summaries):
                save_pareto(given.plots / f"{run.name}-{task}.svg", records, task, "free")


if __name__ == "__main__":
    main()
