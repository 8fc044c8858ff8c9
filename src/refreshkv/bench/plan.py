"""What a mode will cost on a machine that is not here, by the byte model; and how far off the model was so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refreshkv.bench import roofline
from refreshkv.bench.record import Row, rounded
from refreshkv.bench.roofline import Reads, Sizes
from refreshkv.bench.scale import fit

# What a row must share with another to be predicted from it.
_ALIKE = ("shape", "device", "dtype", "threads")
_CHECKED = ("mix", "exact")


@dataclass(frozen=True)
class Device:
    """Bytes a second of its memory and its size in bytes, by the vendor's data sheet."""

    bandwidth: float
    memory: float


DEVICES = {
    "a100": Device(2.039e12, 80e9),
    "h100": Device(3.35e12, 80e9),
    "h200": Device(4.8e12, 141e9),
    "b200": Device(8.0e12, 180e9),
}


def modes(
    context: int, budget: int, stride: int | None, draft: int, acceptance: float
) -> dict[str, Reads]:
    """What a token of each mode reads."""
    return {
        "full": roofline.dense(context),
        "snapkv": roofline.partial(context, budget),
        "mix": roofline.mix(context, budget, stride),
        "fast": roofline.fast(context, budget),
        "exact": roofline.exact(context, budget, draft, acceptance),
    }


def plan(
    sizes: Sizes,
    *,
    context: int,
    batch: int,
    budget: int,
    stride: int | None,
    draft: int = roofline.DRAFT,
    acceptance: float = roofline.ACCEPTANCE,
    device: Device,
    fixed_ms: float = 0.0,
) -> dict[str, Any]:
    """Milliseconds, speed-up and memory by the byte model.

    Args:
        fixed_ms: what a pass costs beside its bytes, as `bench scale` fits it; negative where a byte of weights costs
            less than one of the cache.

    Returns:
        `modes`: by name `ms`, `tokens_per_s`, `speed_up` over full attention, `bytes`; `memory` in bytes: `weights`,
        `cache`, `partial`, their sum `total`, `available`, and whether it `fits`.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, reads in modes(context, budget, stride, draft, acceptance).items():
        moved = reads.bytes(sizes, batch)
        ms = milliseconds(reads, moved, device.bandwidth, fixed_ms)
        found[name] = {"ms": ms, "tokens_per_s": batch * 1e3 / ms, "bytes": moved}
    for one in found.values():
        one["speed_up"] = found["full"]["ms"] / one["ms"]  # type: ignore[operator]
    cache = batch * context * sizes.entry
    # A selection keeps copies of its entries.
    partial = batch * min(budget, context) * sizes.entry
    total = sizes.stored + cache + partial
    return {
        "modes": {name: rounded(one, 5) for name, one in found.items()},
        "memory": {
            "weights": sizes.stored,
            "cache": cache,
            "partial": partial,
            "total": total,
            "available": round(device.memory),
            "fits": total <= device.memory,
        },
    }


def milliseconds(reads: Reads, moved: float, bandwidth: float, fixed_ms: float) -> float:
    """A token: its share of the passes' fixed cost, and its bytes."""
    return reads.passes * fixed_ms + moved / bandwidth * 1e3


def check(rows: Sequence[Row], sizes_of: Mapping[str, Sizes]) -> list[dict[str, Any]]:
    """Predictions beside rows of `bench decode` (as `record.read` gives them): speed-ups over our dense step.

    `by_bytes` is the ratio of bytes, which is what the planner says of a machine it knows nothing of. `by_fit` adds the
    fixed cost and bandwidth that the dense and partial steps of the *other* rows of this machine and shape show; it is
    `None` with fewer than two of them. Errors are prediction / measurement - 1.
    """
    found = []
    for row in rows:
        reads = modes(row["context"], row["budget"], row["stride"], row["draft"], row["acceptance"])
        sizes, batch = sizes_of[row["shape"]], row["batch"]
        fitted = _fit_of_others(row, rows)
        for mode in _CHECKED:
            dense, measured = row["ms.own_dense"], row[f"ms.{mode}"]
            if dense is None or measured is None:
                continue
            full, moved = reads["full"].bytes(sizes, batch), reads[mode].bytes(sizes, batch)
            by_fit = None
            if fitted is not None:
                by_fit = milliseconds(reads["full"], full, *fitted)
                by_fit /= milliseconds(reads[mode], moved, *fitted)
            ratio = dense / measured
            numbers = {"measured": ratio, "by_bytes": full / moved, "by_fit": by_fit}
            found.append(
                {
                    **{name: row[name] for name in ("shape", "context", "batch", "budget")},
                    "mode": mode,
                    **rounded(numbers),
                    "error_by_bytes": round(full / moved / ratio - 1, 4),
                    "error_by_fit": None if by_fit is None else round(by_fit / ratio - 1, 4),
                }
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
    if line["bytes_per_s"] is None or line["fixed_ms"] is None:
        return None
    return line["bytes_per_s"], line["fixed_ms"]
