"""What `refreshkv eval` prints: the table of a run, the list of tasks and methods, the recipe of a task."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refreshkv.cli import common
from refreshkv.tasks import GROUPS, TASKS, expand, options_of, task_class

if TYPE_CHECKING:
    from rich.table import Table

    from refreshkv.evals.summary import Summary

NOTES = (
    "Scores are in per cent, perplexity is not; in brackets the 95 % bootstrap interval. Tokens: decoded, in the mean."
    " Full: the share of steps with full attention."
)
KV_READ = (
    "KV read: the share of keys and values that the decode steps read, against full attention."
)
ALONE = "No ratio, agreement and KL of the perplexity: they are against full attention; add full to --methods."


def show(summaries: Sequence[Summary], out: Path) -> None:
    """Under each task and mode a row a method, then where the report is; fits 80 columns."""
    from refreshkv.evals.summary import (
        BESIDE_FULL,
        BESIDE_FULL_NOTE,
        beside_full,
        figures,
        is_perplexity,
    )
    from refreshkv.stats import KV_READ_NOTE

    fed = [row for row in summaries if is_perplexity(row.task)]
    beside = [row for row in fed if row.ratio is not None]
    rows = []
    for row in summaries:
        if row in beside:
            continue
        title = row.task
        if row.mode != "free" and not is_perplexity(row.task):
            title += f", {row.mode}"
        score, low, high = figures(row)
        shares = ("-" if s is None else f"{s:.1%}" for s in (row.kv_read_share, row.full_share))
        cells = (score, f"[{low}, {high}]", f"{row.output_tokens:.0f}", *shares)
        rows.append((title, (row.method, *cells)))
    console = common.console()
    if rows:
        console.print(sections(("score", "95 %", "tokens", "KV read", "full"), rows))
    if beside:
        shown = [(row.task, (row.method, *beside_full(row))) for row in beside]
        console.print(sections(BESIDE_FULL, shown))
    said = {
        NOTES: rows,
        BESIDE_FULL_NOTE: beside,
        ALONE: len(beside) < len(fed),
        f"{KV_READ} {KV_READ_NOTE}": True,
    }
    console.print(" ".join(note for note, wanted in said.items() if wanted))
    console.print(f"\nReport: {out / 'report.html'}", soft_wrap=True)


def sections(
    headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], **look: Any
) -> Table:
    """Rows of a name and a number a heading, under their titles; titles that are the same are one section."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    usual = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(**{**usual, **look})
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, title in enumerate(dict.fromkeys(title for title, _ in rows)):
        if number:
            table.add_row()
        table.add_row(Text(title, style="bold"))
        for of, (name, *cells) in rows:
            if of == title:
                table.add_row(f"  {name}", *cells)
    return table


def show_list(as_json: bool) -> None:
    """All tasks and methods with their sources."""
    from refreshkv.methods import METHODS

    if as_json:
        tasks = [{"name": n, "metric": task_class(n).metric, "source": source(n)} for n in TASKS]
        methods = [
            {"name": m.name, "label": m.label, "source": m.source, "note": m.note}
            for m in METHODS.values()
        ]
        common.emit_json({"tasks": tasks, "methods": methods})
        return
    click.echo("Tasks; refreshkv eval --describe TASK says more:")
    for name in TASKS:
        if not any(name in members for members in GROUPS.values()):
            _entry(name, f"Metric: {task_class(name).metric}. Source: {source(name)}")
    for group, members in GROUPS.items():
        _entry(group, f"All of {', '.join(members)}. Source: {source(members[0])}")
    click.echo("\nMethods:")
    for method in METHODS.values():
        note = f" Note: {method.note}" if method.note else ""
        _entry(method.name, f"{method.label}. Source: {method.source}.{note}")


def _entry(name: str, text: str) -> None:
    text = textwrap.fill(text, common.console().width - 24, break_on_hyphens=False)
    click.echo(f"  {name:<20}  " + textwrap.indent(text, " " * 24).lstrip())


def show_task(name: str, as_json: bool) -> None:
    """Recipe, metric and settings of a task, or of each task of a group.

    Raises:
        ValueError: an unknown task, named with its nearest neighbour.
    """
    described = [_describe(task) for task in expand([name])]
    if as_json:
        common.emit_json({"tasks": described})
        return
    for number, task in enumerate(described):
        click.echo(("\n" if number else "") + f"{task['name']}  (metric: {task['metric']})")
        click.echo(textwrap.indent(task["recipe"], "  "))
        click.echo("  Settings, with their defaults:")
        for key, default in task["settings"].items():
            click.echo(f"    {key} = {'none' if default is None else default}")


def source(task: str) -> str:
    """The line of a task's recipe that says where it comes from."""
    lines = task_class(task).recipe.splitlines()
    return next(
        (line.removeprefix("Source: ") for line in lines if line.startswith("Source: ")), ""
    )


def _describe(name: str) -> dict[str, Any]:
    task = task_class(name)
    return {
        "name": name,
        "metric": task.metric,
        "kind": task.kind,
        "recipe": task.recipe,
        "settings": options_of(name),
    }
