"""Run directories of `refreshkv eval` -> the tables and plots of docs/fidelity.md: what is kept, and what is read.

`python -m refreshkv.evals.fidelity RUN [RUN ...] [--plots DIR]` prints a Markdown table of each run (ours).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from refreshkv.evals.report import save_pareto
from refreshkv.evals.summary import Summary, read_results, scale, summarize

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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories given to --out")
    parser.add_argument("--plots", type=Path, help="write a plot of each task here")
    given = parser.parse_args()
    for run in given.runs:
        records = read_results(run)
        summaries = [row for row in summarize(records) if row.mode == "free"]
        print(f"### {run.name}\n\n{table(summaries)}")
        if given.plots is not None:
            given.plots.mkdir(parents=True, exist_ok=True)
            for task in dict.fromkeys(row.task for row in summaries):
                save_pareto(given.plots / f"{run.name}-{task}.svg", records, task, "free")


if __name__ == "__main__":
    main()
