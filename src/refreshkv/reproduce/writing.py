"""What a table says, as cells of text, and its three files: table.md, table.csv, table.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refreshkv.evals.store import cannot_write
from refreshkv.evals.summary import write_whole
from refreshkv.reproduce.comparison import FIELDS, Cell, by_column
from refreshkv.reproduce.tables import REASONING, Table

FORMAT = "refreshkv-reproduce-1"
ABOUT = "table.json"
# What may not change in a folder: its files would no longer say what they are.
_FIXED = ("table", "small", "model", "seed")
HEADINGS = ("ours", "95 %", "paper", "apart", "95 %", "kept", "paper")
OF_PROBLEMS = ("score", "95 %", "tokens", "ended", "KV read", "same text")
NOTE = (
    "Perplexities as they are, all else in per cent. Apart: ours - the paper's; its interval is ours alone. Kept:"
    " over full attention, ours and the paper's, which transfers between models; of a perplexity, lower is better."
    " Speed is not measured here: refreshkv bench."
)
NOTE_OF_PROBLEMS = (
    "Scores are in per cent. Tokens: decoded, in the mean. Ended: outputs that the model ended by itself; the others"
    " were cut off."
)


def headings(table: Table) -> tuple[str, ...]:
    """Over the figures of `figures`."""
    return OF_PROBLEMS if table is REASONING else HEADINGS


def note(table: Table) -> str:
    """What the figures are."""
    return NOTE_OF_PROBLEMS if table is REASONING else NOTE


def figures(table: Table, cell: Cell) -> tuple[str, ...]:
    """A cell for people."""
    fed = cell.metric == "perplexity"

    def number(value: float | None, sign: str = "") -> str:
        if value is None:
            return "-"
        if abs(value) >= 1000:
            return f"{value:{sign}.3g}"
        return f"{value:{sign}.{2 if fed and abs(value) < 100 else 1}f}"

    def share(value: float | None) -> str:
        if value is None or not fed:
            return "-" if value is None else f"{value:.0%}"
        return f"{value:.3f}" if value < 10 else f"{value:.3g}"

    ours = (number(cell.ours), f"[{number(cell.low)}, {number(cell.high)}]")
    if table is REASONING:
        shares = (share(s) for s in (cell.ended, cell.kv_read_share, cell.same_as_full))
        return (*ours, f"{cell.output_tokens:.0f}", *shares)
    ends = f"[{number(cell.difference_low)}, {number(cell.difference_high)}]"
    apart = ("-", "-") if cell.difference is None else (number(cell.difference, "+"), ends)
    return (*ours, number(cell.paper), *apart, share(cell.kept), share(cell.paper_kept))


def check(out: Path, about: Mapping[str, Any]) -> None:
    """Before a run: the folder is new, or of the same table.

    Raises:
        ValueError: it is of another one, or its table.json is none.
    """
    path = out / ABOUT
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"'{out}' cannot be used ({error.strerror}); use another --out") from None
    except ValueError:
        old = None
    if not isinstance(old, dict) or old.get("format") != FORMAT:
        raise ValueError(f"'{path}' was not written by reproduce; use another --out")
    for name in _FIXED:
        if old.get(name) != about[name]:
            raise ValueError(
                f"'{out}' was made with {name} {old.get(name)!r}, now it is {about[name]!r}; use another --out"
            )


def write(
    out: Path,
    about: Mapping[str, Any],
    table: Table,
    lines: Sequence[str],
    about_columns: Mapping[str, str],
    found: Sequence[Cell],
) -> None:
    """The three files, each whole or not at all.

    Args:
        about: what was asked for.
        lines: the title, and what a reader has to know.
        about_columns: what has to be known of a column, by its name; may be empty.

    Raises:
        RunError: the disk is full.
    """
    record = {"format": FORMAT, **about, "notes": list(lines), "cells": [asdict(c) for c in found]}
    files = {
        "table.md": _markdown(table, lines, about_columns, found),
        "table.csv": _csv(found),
        ABOUT: json.dumps(record, indent=1) + "\n",
    }
    for name, text in files.items():
        try:
            write_whole(out / name, text.encode())
        except OSError as error:
            raise cannot_write(out / name, error) from error


def _markdown(
    table: Table, lines: Sequence[str], about_columns: Mapping[str, str], found: Sequence[Cell]
) -> str:
    title, *rest = lines
    parts = [f"# {title}\n", *(f"{line}\n" for line in rest)]
    for name, own in by_column(found).items():
        parts.append(f"## {table.title_of(name)}\n")
        if said := about_columns.get(name):
            parts.append(f"{said}\n")
        heads = ("", *headings(table), "examples")
        rows = [heads, ("---", *["---:"] * (len(heads) - 1))]
        rows += [(cell.label, *figures(table, cell), str(cell.examples)) for cell in own]
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join([*parts, f"{note(table)}\n"])


def _csv(found: Sequence[Cell]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    for cell in found:
        values = (getattr(cell, name) for name in FIELDS)
        writer.writerow(f"{v:.8g}" if isinstance(v, float) else v for v in values)
    return text.getvalue()
