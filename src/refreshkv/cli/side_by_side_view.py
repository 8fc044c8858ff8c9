"""How `refreshkv demo` looks: one table of figures, then one example a task, line against line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from refreshkv.cli import common
from refreshkv.cli.eval_view import sections
from refreshkv.cli.side_by_side import METHODS, Excerpt, Report, Row
from refreshkv.text import visible

LINES_SHOWN = 6
TITLE: dict[str, Any] = {"title_style": "bold", "title_justify": "left"}
NARROW = 118  # a narrower terminal gets no column for full attention

NOTES = (
    "A line that is not the expected one starts with an x. Tokens: how many were decoded. KV read: the share of"
    " keys and values that the decode steps read, against full attention. Full: the share of steps with full"
    " attention. Stride: steps per full step. Seconds: of decoding."
)


def show(report: Report, length: int) -> None:
    """Print the report to stdout."""
    from refreshkv.stats import KV_READ_NOTE

    console = common.console()
    console.print(figures(report.rows, length))
    for example in report.shown:
        console.print()
        console.print(excerpt(example, console.width))
    console.print()
    console.print(f"{NOTES} {KV_READ_NOTE}")


def figures(rows: Sequence[Row], length: int) -> Table:
    """A row a task and method; fits 80 columns."""
    labels = {method.name: method.label for method in METHODS}
    shown = []
    for row in rows:
        cells = (
            f"{row.lines_right} of {row.lines_total}",
            str(row.output_tokens),
            share(row.kv_read_share),
            share(row.full_share),
            "never" if row.effective_stride is None else f"{row.effective_stride:.1f}",
            f"{row.decode_s:.1f}",
        )
        shown.append((row.task, (labels[row.method], *cells)))
    headings = ("lines right", "tokens", "KV read", "full", "stride", "seconds")
    return sections(headings, shown, title=f"Prompts of about {length} tokens, greedy", **TITLE)


def share(value: float | None) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{value:.0%}"


def excerpt(example: Excerpt, width: int) -> Table:
    """The first lines of the expected answer, and of each method's, in columns of equal width."""
    # Without padding the longest heading has its twelve places in 80 columns.
    title = f"{example.task}, prompt {example.seed}: the first lines"
    look = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": 0, "expand": True, **TITLE}
    table = Table(title=title, **look)
    names = [name for name in example.outputs if width >= NARROW or name != "full"]
    labels = {method.name: method.label.replace(" (", "\n(") for method in METHODS}
    for heading in ("expected", *(labels[name] for name in names)):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", ratio=1)
    gold = example.expected.splitlines()
    answers = [example.outputs[name].splitlines() for name in names]
    for index, expected in enumerate(gold[:LINES_SHOWN]):
        cells = [line(own[index] if index < len(own) else "", expected) for own in answers]
        table.add_row(plain(f"  {expected}"), *cells)
    return table


def line(got: str, expected: str) -> Text:
    """One line of an answer: marked, and red where colours are shown, if it is not the expected one."""
    if got == expected:
        return plain(f"  {got}")
    return plain(f"x {got}", style="red")


def plain(text: str, style: str = "") -> Text:
    """Generated text as it is: no markup, and no control characters that a terminal would obey."""
    return Text(visible(text.replace("\t", " ")), style=style)
