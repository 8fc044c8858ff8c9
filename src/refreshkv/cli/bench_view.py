"""Tables of `refreshkv bench`; each fits 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refreshkv.cli import common

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]


def decode(record: Record) -> None:
    """Milliseconds, bytes and what they allow, by variant; what each is; then the ratios and the curve."""
    from refreshkv.bench.report import NAMES

    settings = ("context", "batch", "budget", "stride", "draft", "acceptance", "dtype", "threads")
    columns = ("variant", "ms", "range", "tokens/s", "MB", "band-\nwidth", "of\nideal")
    table = _table(record, settings, columns)
    for name, ms in record["ms"].items():
        ends = record["ms_range"].get(name)
        table.add_row(
            name,
            _number(ms, ".2f"),
            "" if ends is None else f"{ends[0]:.2f} - {ends[1]:.2f}",
            _number(record["tokens_per_s"].get(name), ".4g"),
            f"{record['bytes'][name] / 1e6:.6g}" if name in record["bytes"] else "",
            _number(record["bandwidth_share"].get(name), ".0%"),
            _number(record["share_of_ideal"].get(name), ".0%"),
        )
    console = common.console()
    console.print(table)
    for name in record["ms"]:
        console.print(f"  {name:<12}  {record['notes'].get(name, NAMES[name])}", soft_wrap=True)
    console.print()
    for name, ratio in record["ratios"].items():
        console.print(f"  {name:<22} {_number(ratio, '.3f')}")
    points = [
        f"{one['acceptance']:g}: {one['exact_over_own_dense']:.2f} ({one['ideal']:.2f})"
        for one in record["acceptance_curve"]
        if one["exact_over_own_dense"] is not None
    ]
    if points:
        console.print(f"  exact over own dense at acceptance (by bytes): {', '.join(points)}")


def kernels(record: Record) -> None:
    """Microseconds, bandwidth and the fastest other, by kernel."""
    settings = ("context", "batch", "budget", "draft", "dtype", "threads", "backend")
    columns = ("kernel", "us", "band-\nwidth", "fastest other", "its us", "over\nours")
    table = _table(record, settings, columns)
    for one in record["kernels"]:
        table.add_row(
            one["kernel"],
            f"{1e3 * one['ms']:.1f}",
            _number(one["bandwidth_share"], ".0%"),
            one["rival"],
            f"{1e3 * one['rival_ms']:.1f}",
            f"{one['rival_over_ours']:.2f}",
        )
    common.console().print(table)


def scale(record: Record) -> None:
    """The fits, then the strides."""
    from refreshkv.bench.scale import FITTED

    table = _table(
        record,
        ("context", "batch", "budget", "dtype", "threads"),
        ("variant", "fixed ms", "GB/s", "worst error", "sizes", "what"),
    )
    for name, fit in record["fits"].items():
        speed = fit["bytes_per_s"]
        table.add_row(
            name,
            _number(fit["fixed_ms"], ".2f"),
            _number(None if speed is None else speed / 1e9, ".2f"),
            _number(fit["worst"], ".0%"),
            str(fit["points"]),
            FITTED[name],
        )
    console = common.console()
    console.print(table)
    for one in record["strides"]:
        console.print(
            f"  stride {one['stride']}: {one['ms']:.2f} ms, {one['over_own_dense']:.2f}x our full attention,"
            f" {one['ideal']:.2f}x by bytes"
        )


def plan(record: Record) -> None:
    """Speed and memory by mode."""
    settings = ("context", "batch", "budget", "stride", "draft", "acceptance", "dtype")
    about = {**record, "shape": record["model"]}
    table = _table(about, settings, ("mode", "ms a token", "tokens/s", "speed-up", "GB moved"))
    for name, mode in record["modes"].items():
        table.add_row(
            name,
            f"{mode['ms']:.3g}",
            f"{mode['tokens_per_s']:.4g}",
            f"{mode['speed_up']:.2f}",
            f"{mode['bytes'] / 1e9:.3g}",
        )
    console, memory = common.console(), record["memory"]
    console.print(table)
    parts = ", ".join(
        f"{name} {memory[name] / 1e9:.3g}" for name in ("weights", "cache", "partial")
    )
    fits = "fits in" if memory["fits"] else "does not fit in"
    console.print(
        f"  memory: {parts} GB; {memory['total'] / 1e9:.4g} GB {fits} {memory['available'] / 1e9:.4g}"
    )


def plan_check(record: Record) -> None:
    """Predicted and measured speed-ups, row by row."""
    columns = (
        "shape",
        "size",
        "K",
        "mode",
        "meas-\nured",
        "by\nbytes",
        "error",
        "by\nfit",
        "error",
    )
    table = _empty(record["file"], columns)
    for one in record["rows"]:
        table.add_row(
            one["shape"],
            f"{one['batch']}x{one['context']}",
            str(one["budget"]),
            one["mode"],
            f"{one['measured']:.2f}",
            f"{one['by_bytes']:.2f}",
            _number(one["error_by_bytes"], "+.0%"),
            _number(one["by_fit"], ".2f"),
            _number(one["error_by_fit"], "+.0%"),
        )
    console = common.console()
    console.print(table)
    console.print(
        f"  median error: {_number(record['median_error_by_bytes'], '.0%')} by bytes,"
        f" {_number(record['median_error_by_fit'], '.0%')} by the fit of the other rows"
    )


_LEFT = ("variant", "kernel", "mode", "shape", "what", "fastest other")
_FOLDED = ("what", "fastest other")  # the others are never cut


def _table(record: Record, settings: Sequence[str], columns: Sequence[str]) -> Table:
    """An empty table under the settings of a record."""
    where = ", ".join(f"{name} {record[name]}" for name in settings)
    return _empty(f"{record['shape']}, {where}\n{record['device']}", columns)


def _empty(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        side = "left" if name in _LEFT else "right"
        table.add_column(name, justify=side, no_wrap=name not in _FOLDED)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
