"""How the cost of a step grows with context, rows, K and stride: one at a time, fitted by ms = a + b * bytes.

1 / b is the bandwidth that reading more of the cache reaches. a is what a step costs beside its bytes (launches,
Python); it is negative where the weights are read faster than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refreshkv.bench import decode
from refreshkv.bench.record import Row, rounded
from refreshkv.bench.roofline import mean
from refreshkv.bench.variants import VARIANTS

FITTED = ("own_dense", "partial", "full")
_SKIP = tuple(name for name in VARIANTS if name not in FITTED)
_SIZE = ("context", "batch", "budget")
_KEPT = ("time", "shape", *_SIZE, "device", "dtype", "threads", "bandwidth", "versions")


def run(
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    budgets: Sequence[int],
    strides: Sequence[int],
    **options: Any,
) -> dict[str, Any]:
    """The first value of each list is the base, from which one at a time is varied; `options` go to `decode.run`.

    Returns the settings of the base, `points` (one a size), `fits` by variant and `strides`; rows have the columns of
    `bench decode`.

    Raises:
        ValueError: fewer than two sizes, and what `decode.run` raises.
    """
    sizes = grid(contexts, batches, budgets)
    if len(sizes) < 2:
        raise ValueError("a fit needs two sizes: give several contexts, batches or budgets")
    options |= {"stride": strides[0], "skip": _SKIP}
    found = [decode.run(**dict(zip(_SIZE, size, strict=True)), **options) for size in sizes]
    points = [
        {
            **{name: record[name] for name in _SIZE},
            **{part: {name: record[part][name] for name in FITTED} for part in ("ms", "bytes")},
        }
        for record in found
    ]
    return {
        **{name: found[0][name] for name in _KEPT},
        "points": points,
        "fits": {
            name: fit([(point["bytes"][name], point["ms"][name]) for point in points])
            for name in FITTED
        },
        "strides": [at_stride(found[0], stride) for stride in strides],
    }


def grid(
    contexts: Sequence[int], batches: Sequence[int], budgets: Sequence[int]
) -> list[tuple[int, int, int]]:
    """`(context, batch, budget)`: the base, then every other value with the base of the rest."""
    base = (contexts[0], batches[0], budgets[0])
    sizes = [base]
    for place, values in enumerate((contexts, batches, budgets)):
        sizes += [(*base[:place], value, *base[place + 1 :]) for value in values[1:]]
    return list(dict.fromkeys(sizes))


def fit(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Least squares through `(bytes, ms)`.

    Returns `fixed_ms` (a), `bytes_per_s` (1 / b), `worst` (the largest relative error of a point) and `points`; the
    first three are `None` where the bytes are all the same, or more of them take less time.
    """
    size, ms = np.array(points, dtype=float).T
    slope, fixed = np.polyfit(size, ms, 1) if np.ptp(size) else (0.0, 0.0)
    numbers = dict.fromkeys(("fixed_ms", "bytes_per_s", "worst"))
    if slope > 0:
        worst = np.max(np.abs(fixed + slope * size - ms) / ms)
        numbers = rounded({"fixed_ms": fixed, "bytes_per_s": 1e3 / slope, "worst": worst})
    return {**numbers, "points": len(points)}


def at_stride(record: Row, stride: int) -> dict[str, float | None]:
    """The mix at another stride, from the partial and full steps of a run, and what the bytes would allow."""
    ms, ideal = (
        {**part, "mix": mean(part["partial"], part["full"], stride)}
        for part in (record["ms"], record["bytes"])
    )
    ratios = {
        "over_own_dense": ms["own_dense"] / ms["mix"],
        "ideal": ideal["own_dense"] / ideal["mix"],
    }
    return {"stride": stride, **rounded({"ms": ms["mix"], **ratios})}
