"""Numbers as cells of a table, the same for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """What a column shows: `factor` times the entry `key` of a row, in the `form` of `str.format`."""

    key: str
    form: str = "{}"
    factor: float = 1


# Three digits, however large.
THREE = "three digits"


def cells(row: Row, columns: Mapping[str, Column]) -> list[str]:
    """The row under `columns` (by heading); "-" where it has nothing."""
    return [_cell(row.get(key), form, factor) for key, form, factor in columns.values()]


def markdown(first: str, rows: Iterable[tuple[str, Row]], columns: Mapping[str, Column]) -> str:
    """A table of `(name, row)`, whose first column is headed `first`."""
    lines = [f"| {first} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells(row, columns))} |" for name, row in rows]
    return "\n".join(lines)


def _cell(value: Any, form: str, factor: float) -> str:
    if value is None:
        return "-"
    value = value * factor if factor != 1 else value
    if form == THREE:
        form = f"{{:.{0 if value >= 100 else 1 if value >= 10 else 2}f}}"
    return form.format(value)
