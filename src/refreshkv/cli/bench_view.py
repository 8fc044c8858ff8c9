"""Tables of `refreshkv bench`; each fits 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from refreshkv.cli import common

Record = Mapping[str, Any]


class Column(NamedTuple):
    """What a column shows: `factor` times the entry `key` of a row, in a form of `str.format` or by a function."""

    key: str
    form: str | Callable[[Any], str] = "{}"
    factor: float = 1


def cells(row: Record, columns: Mapping[str, Column]) -> list[str]:
    """The row under `columns` (by heading); "-" where it has nothing."""
    shown = []
    for key, form, factor in columns.values():
        write = form.format if isinstance(form, str) else form
        shown.append("-" if row.get(key) is None else write(row[key] * factor))
    return shown


_DECODE = {
    "variant": Column("variant"),
    "ms": Column("ms", "{:.2f}"),
    "range": Column("ms_range", "{0[0]:.2f} - {0[1]:.2f}"),
    "tokens/s": Column("tokens_per_s", "{:.4g}"),
    "MB": Column("bytes", "{:.6g}", 1e-6),
    "band-\nwidth": Column("bandwidth_share", "{:.0%}"),
    "of\nideal": Column("share_of_ideal", "{:.0%}"),
}
_KERNELS = {
    "kernel": Column("kernel"),
    "us": Column("ms", "{:.1f}", 1e3),
    "band-\nwidth": Column("bandwidth_share", "{:.0%}"),
    "fastest other": Column("rival"),
    "its us": Column("rival_ms", "{:.1f}", 1e3),
    "over\nours": Column("rival_over_ours", "{:.2f}"),
}
_GENERATE = {
    "variant": Column("variant"),
    "prompt s": Column("prefill_s", "{:.3g}"),
    "tokens/s": Column("tokens_per_s", "{:.4g}"),
    "of the\nsecond half": Column("later_tokens_per_s", "{:.4g}"),
    "tokens": Column("new_tokens"),
    "as\nvanilla": Column("same_tokens"),
}
_SCALE = {
    "variant": Column("name"),
    "fixed ms": Column("fixed_ms", "{:.2f}"),
    "GB/s": Column("bytes_per_s", "{:.2f}", 1e-9),
    "worst error": Column("worst", "{:.0%}"),
    "sizes": Column("points"),
    "what": Column("what"),
}
_PLAN = {
    "mode": Column("name"),
    "ms a token": Column("ms", "{:.3g}"),
    "tokens/s": Column("tokens_per_s", "{:.4g}"),
    "speed-up": Column("speed_up", "{:.2f}"),
    "GB moved": Column("bytes", "{:.3g}", 1e-9),
}
_CHECK = {
    "shape": Column("shape"),
    "size": Column("size"),
    "K": Column("budget"),
    "mode": Column("mode"),
    "meas-\nured": Column("measured", "{:.2f}"),
    "by\nbytes": Column("by_bytes", "{:.2f}"),
    "error": Column("error_by_bytes", "{:+.0%}"),
    "by\nfit": Column("by_fit", "{:.2f}"),
    "error\nby fit": Column("error_by_fit", "{:+.0%}"),
}
_LEFT = ("variant", "kernel", "mode", "shape", "what", "fastest other")
_FOLDED = ("what", "fastest other")  # the others are never cut


def decode(record: Record) -> None:
    """Milliseconds, bytes and what they allow, by variant; what each is; then the ratios and the curve."""
    from refreshkv.bench.variants import NAMES

    settings = "context batch budget stride draft acceptance dtype threads"
    parts = [column.key for column in _DECODE.values() if column.key in record]
    rows = [
        {"variant": name, **{part: record[part].get(name) for part in parts}}
        for name in record["ms"]
    ]
    _show(_title(record, settings), rows, _DECODE)
    say = common.console().print
    for name in record["ms"]:
        say(f"  {name:<12}  {record['notes'].get(name, NAMES[name])}", soft_wrap=True)
    parts = {name: size for name, size in record["memory"].items() if size}
    said = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    say(f"  memory by arithmetic, GB: {said}")
    say()
    for name, ratio in record["ratios"].items():
        say(f"  {name:<22} {_number(ratio, '.3f')}")
    points = [
        f"{one['acceptance']:g}: {one['exact_over_own_dense']:.2f} ({one['ideal']:.2f})"
        for one in record["acceptance_curve"]
        if one["exact_over_own_dense"] is not None
    ]
    if points:
        say(f"  exact over own dense at acceptance (by bytes): {', '.join(points)}")


def kernels(record: Record) -> None:
    """Microseconds, bandwidth and the fastest other, by kernel."""
    settings = "context batch budget draft dtype threads backend"
    _show(_title(record, settings), record["kernels"], _KERNELS)
    _notes(record)


def generate(record: Record) -> None:
    """Tokens a second, by variant, and how many tokens are those of transformers' own cache."""
    from refreshkv.bench.endtoend import MODES

    rows = [{"variant": name, **one} for name, one in record["variants"].items()]
    _show(_title(record, "context batch new dtype threads"), rows, _GENERATE)
    for name in record["variants"]:
        common.console().print(f"  {name:<12}  {MODES[name][1]}", soft_wrap=True)
    _notes(record)


def scale(record: Record) -> None:
    """The fits, then the strides."""
    from refreshkv.bench.variants import NAMES

    rows = [{"name": name, "what": NAMES[name], **fit} for name, fit in record["fits"].items()]
    _show(_title(record, "context batch budget dtype threads"), rows, _SCALE)
    for one in record["strides"]:
        common.console().print(
            f"  stride {one['stride']}: {one['ms']:.2f} ms, {one['over_own_dense']:.2f}x our full attention,"
            f" {one['ideal']:.2f}x by bytes"
        )


def plan(record: Record) -> None:
    """Speed and memory by mode."""
    settings = "context batch budget stride draft acceptance dtype"
    rows = [{"name": name, **mode} for name, mode in record["modes"].items()]
    _show(_title({**record, "shape": record["model"]}, settings), rows, _PLAN)
    memory = record["memory"]
    parts = [
        f"{name} {memory[name] / 1e9:.3g}" for name in ("weights", "cache", "partial", "codes")
    ]
    fits = "fits in" if memory["fits"] else "does not fit in"
    common.console().print(
        f"  memory: {', '.join(parts)} GB; {memory['total'] / 1e9:.4g} GB {fits} {memory['available'] / 1e9:.4g}"
    )


def plan_check(record: Record) -> None:
    """Predicted and measured speed-ups, row by row."""
    rows = [{**one, "size": f"{one['batch']}x{one['context']}"} for one in record["rows"]]
    _show(record["file"], rows, _CHECK)
    common.console().print(
        f"  median error: {_number(record['median_error_by_bytes'], '.0%')} by bytes,"
        f" {_number(record['median_error_by_fit'], '.0%')} by the fit of the other rows"
    )


def _notes(record: Record) -> None:
    for name, note in record["notes"].items():
        common.console().print(f"  {name}: {note}", soft_wrap=True)


def _title(record: Record, settings: str) -> str:
    where = ", ".join(f"{name} {record[name]}" for name in settings.split())
    return f"{record['shape']}, {where}\n{record['device']}"


def _show(title: str, rows: Iterable[Record], columns: Mapping[str, Column]) -> None:
    from rich import box
    from rich.table import Table

    form = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_justify="left", **form)
    for name in columns:
        side = "left" if name in _LEFT else "right"
        table.add_column(name, justify=side, no_wrap=name not in _FOLDED)
    for row in rows:
        table.add_row(*cells(row, columns))
    common.console().print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
