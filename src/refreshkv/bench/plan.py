"""What a mode will cost on a machine that is not here, by the byte model; and how far off the model was so far."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from refreshkv.bench.record import Row, read, rounded
from refreshkv.bench.roofline import Load, Sizes
from refreshkv.bench.scale import fit
from refreshkv.config import check_names

# What a row must share with another to be predicted from it.
_ALIKE = ("shape", "device", "dtype", "threads")
_CHECKED = ("mix", "mixed", "exact")
_LOAD = tuple(field.name for field in fields(Load))


@dataclass(frozen=True)
class Device:
    """Bytes a second of its memory and its size in bytes, by the vendor's data sheet.

    `flops` are operations a second on dense matrices in 16 bits.
    """

    bandwidth: float
    memory: float
    flops: float = 0.0


DEVICES = {
    "a100": Device(2.039e12, 80e9, 312e12),
    "h100": Device(3.35e12, 80e9, 989e12),
    "h200": Device(4.8e12, 141e9, 989e12),
    "b200": Device(8.0e12, 180e9, 2250e12),
}


def device_of(name: str, bandwidth: float | None = None) -> Device:
    """One of `DEVICES`, with another `bandwidth` (bytes a second) where one is given.

    Raises:
        ValueError: an unknown device, named with its nearest neighbour.
    """
    check_names("device", [name], DEVICES)
    return DEVICES[name] if bandwidth is None else replace(DEVICES[name], bandwidth=bandwidth)


def plan(sizes: Sizes, load: Load, device: Device, fixed_ms: float = 0.0) -> dict[str, Any]:
    """Milliseconds, speed-up and memory by the byte model.

    Args:
        fixed_ms: what a pass costs beside its bytes, as `bench scale` fits it; negative where a byte of weights costs
            less than one of the cache.

    Returns:
        The settings of the load; `bandwidth` and `fixed_ms`; `modes`: by name `ms`, `tokens_per_s`, `bytes`,
        `speed_up` over full attention; `memory` in bytes: `weights`, `cache`, `partial` and `codes` (what a
        selection and the rounded copy take on top), `total` with the larger of these, `available`, and whether it
        `fits`.
    """
    modes = {}
    full = load.modes()["full"].ms(sizes, load.batch, device.bandwidth, fixed_ms)
    for name, reads in load.modes().items():
        ms = reads.ms(sizes, load.batch, device.bandwidth, fixed_ms)
        mode = {
            "ms": ms,
            "tokens_per_s": load.batch * 1e3 / ms,
            "bytes": reads.bytes(sizes, load.batch),
            "speed_up": full / ms,
        }
        modes[name] = rounded(mode, 5)
    cache = load.batch * load.context * sizes.entry
    # A selection keeps copies of its entries.
    partial = load.batch * min(load.budget, load.context) * sizes.entry
    codes = round(load.batch * load.context * sizes.codes)
    total = sizes.stored + cache + max(partial, codes)
    return {
        **asdict(load),
        "bandwidth": device.bandwidth,
        "fixed_ms": fixed_ms,
        "modes": modes,
        "memory": {
            "weights": sizes.stored,
            "cache": cache,
            "partial": partial,
            "codes": codes,
            "total": total,
            "available": round(device.memory),
            "fits": total <= device.memory,
        },
    }


def check(path: Path, sizes_of: Callable[[str, str], Sizes]) -> dict[str, Any]:
    """The model beside the rows of a CSV file of `bench decode`.

    Args:
        sizes_of: the sizes of a shape in a dtype.

    Returns:
        `file`, `rows` (`predictions`), `median_error_by_bytes` and `median_error_by_fit` of the absolute errors.

    Raises:
        ValueError: a file that `bench decode` did not write.
    """
    rows = read(path)
    if not rows or not {"ms.exact", "ms.mixed", "bytes.mix", *_LOAD} <= set(rows[0]):
        raise ValueError(f"{path} has no rows of `bench decode`: give another file")
    found = predictions(rows, functools.cache(sizes_of))
    medians = {}
    for name in ("error_by_bytes", "error_by_fit"):
        values = [abs(one[name]) for one in found if one[name] is not None]
        medians[f"median_{name}"] = statistics.median(values) if values else None
    return {"file": str(path), "rows": found, **medians}


def predictions(rows: Sequence[Row], sizes_of: Callable[[str, str], Sizes]) -> list[dict[str, Any]]:
    """Speed-ups over our dense step beside those measured, for each mode of rows as `record.read` gives them.

    `by_bytes` is the ratio of bytes, which is what the planner says of a machine it knows nothing of. `by_fit` adds the
    fixed cost and bandwidth that the dense and partial steps of the *other* rows of this machine and shape show; it is
    `None` with fewer than two of them. Errors are prediction / measurement - 1.
    """
    found = []
    for row in rows:
        load = Load(**{name: row[name] for name in _LOAD})
        sizes, fitted = sizes_of(row["shape"], row["dtype"]), _fit_of_others(row, rows)
        modes, moved = load.modes(), load.bytes(sizes)
        for mode in _CHECKED:
            if row["ms.own_dense"] is None or row[f"ms.{mode}"] is None:
                continue
            measured = row["ms.own_dense"] / row[f"ms.{mode}"]
            ratios = {"by_bytes": moved["full"] / moved[mode], "by_fit": math.nan}
            if fitted is not None:
                full, ours = (modes[name].ms(sizes, load.batch, *fitted) for name in ("full", mode))
                ratios["by_fit"] = full / ours
            errors = {f"error_{name}": ratio / measured - 1 for name, ratio in ratios.items()}
            size = {name: row[name] for name in ("shape", "context", "batch", "budget")}
            found.append(
                {**size, "mode": mode, **rounded({"measured": measured, **ratios, **errors})}
            )
    return found


def _fit_of_others(row: Row, rows: Sequence[Row]) -> tuple[float, float] | None:
    """`(bytes per second, fixed ms)` of the rows of the same machine and shape but this one."""
    others = [
        other
        for other in rows
        if other is not row and all(other[name] == row[name] for name in _ALIKE)
    ]
    points = [
        (other[f"bytes.{name}"], other[f"ms.{name}"])
        for other in others
        for name in ("own_dense", "partial")
        if other[f"ms.{name}"] is not None
    ]
    if len(others) < 2 or not points:
        return None
    line = fit(points)
    return None if line["bytes_per_s"] is None else (line["bytes_per_s"], line["fixed_ms"])
