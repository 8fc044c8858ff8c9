"""What `refreshkv reproduce` prints: a table beside the paper's, the list of tables, a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreshkv.cli import common
from refreshkv.cli.eval_view import sections
from refreshkv.reproduce.tables import REASONING, TABLES, Form, Table

if TYPE_CHECKING:
    from refreshkv.reproduce.comparison import Cell
    from refreshkv.reproduce.estimate import Cost
    from refreshkv.reproduce.jobs import Request


_COUNTS = ("examples", "prompt", "new", "methods", "decoded")
_PLAN = (*_COUNTS, "cache", "GB", "hours")


def show(
    table: Table,
    lines: Sequence[str],
    about_columns: Mapping[str, str],
    found: Sequence[Cell],
    out: Path,
) -> None:
    """The title and notes, under each column a row a method, then where the files are; fits 80 columns."""
    from refreshkv.reproduce.comparison import by_column
    from refreshkv.reproduce.writing import figures, headings, note
    from refreshkv.stats import KV_READ_NOTE

    console = common.console()
    for line in lines:
        console.print(line, soft_wrap=line == lines[0])
    rows = [
        (table.title_of(name), (cell.label, *figures(table, cell)))
        for name, own in by_column(found).items()
        for cell in own
    ]
    console.print(sections(headings(table), rows, padding=0))
    for name in by_column(found):
        if said := about_columns.get(name):
            console.print(f"{table.title_of(name)}: {said}")
    console.print(note(table) + (f" {KV_READ_NOTE}" if table is REASONING else ""))
    console.print(f"\nTable: {out / 'table.md'}", soft_wrap=True)


def show_list(as_json: bool) -> None:
    """Every table with its columns, data and methods."""
    described = [_describe(table) for table in (*TABLES, REASONING)]
    if as_json:
        common.emit_json({"tables": described})
        return
    console = common.console()
    console.print(
        "Numbers are the paper's as this project knows them, which we could not check again; the names do as well."
    )
    for table in described:
        number = "--reasoning" if table["number"] is None else f"{table['number']}"
        console.print(f"\n{number}  {table['name']}: {table['about']}")
        for column in table["columns"]:
            console.print(f"  {column['name']}: {column['title']}")
            for one in column["measures"]:
                limit = "all" if one["limit"] is None else one["limit"]
                console.print(
                    f"    {limit} examples, prompts of {one['prompt']} tokens, {one['new']} new, K {one['budget']};"
                    f" data: {one['data'] or 'generated'}"
                )
        console.print(f"  methods: {'; '.join(table['methods'])}")


def _describe(table: Table) -> dict[str, Any]:
    columns = [
        {
            "name": column.name,
            "title": column.title,
            "note": column.note,
            "measures": [_measured(m.full, m.data) for m in column.measures],
        }
        for column in table.columns
    ]
    about = {"number": table.number, "name": table.name, "about": table.about}
    return {**about, "columns": columns, "methods": [row.label for row in table.rows]}


def _measured(form: Form, data: Any) -> dict[str, Any]:
    where = data and (
        f"{data.name}, from the hub" if data.hub else f"--data {data.name}=PATH, {data.local}"
    )
    names = ("limit", "prompt", "new", "budget")
    return {**{name: getattr(form, name) for name in names}, "data": where}


def show_plan(
    request: Request, found: Sequence[Cost], assumed: Mapping[str, Any], dtype: str
) -> None:
    """A row a measure, and the sum."""
    from rich import box
    from rich.table import Table as Shown

    console = common.console()
    title = f"{request.table.title}, on {request.model}, {dtype}: an estimate, nothing was run"
    console.print(title, soft_wrap=True)
    shown = Shown(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", overflow="fold")
    for heading in _PLAN:
        shown.add_column(heading, justify="right", no_wrap=True)
    for cost in found:
        shown.add_row(cost.name, *_cells(cost))
    console.print(shown)
    for line in _said(found, assumed):
        console.print(line)


def _cells(cost: Cost) -> tuple[str, ...]:
    return (
        "all" if cost.examples is None else str(cost.examples),
        *map(str, (cost.prompt, cost.new, cost.methods)),
        "-" if cost.decoded is None else f"{cost.decoded / 1e6:.3g}M",
        f"{cost.cache / 1e9:.3g}",
        f"{cost.memory / 1e9:.3g}{'' if cost.fits else '!'}",
        "-" if cost.hours is None else f"{cost.hours:.3g}",
    )


def _said(found: Sequence[Cost], assumed: Mapping[str, Any]) -> Iterator[str]:
    hours = sum(cost.hours or 0 for cost in found)
    yield f"In all about {hours:.3g} hours; weights {found[0].weights / 1e9:.3g} GB."
    if not all(cost.fits for cost in found):
        yield f"!: more than the {assumed['memory'] / 1e9:.4g} GB of {assumed['machine']}."
    yield (
        "Cache: GB of keys and values of a batch. GB: with weights and what a method keeps; activations not counted."
        f" Hours: an estimate for {assumed['machine']} at {assumed['bandwidth'] / 1e9:.4g} GB/s,"
        f" {assumed['flops'] / 1e12:.4g} TFLOP/s (prompts at 40 % of it) and {assumed['fixed_ms']:g} ms a step beside"
        " its bytes (--machine, --bandwidth, --flops, --fixed-ms), every output of full length."
    )
