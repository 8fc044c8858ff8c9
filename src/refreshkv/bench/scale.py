"""How the cost of a step grows with context, rows, K and stride: one at a time, fitted by ms = a + b * bytes.

1 / b is the bandwidth that reading more of the cache reaches. a is what a step costs beside its bytes (launches,
Python); it is negative where the weights are read faster than that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refreshkv.bench import decode
from refreshkv.bench.record import Row, rounded
from refreshkv.bench.shapes import build
from refreshkv.bench.variants import VARIANTS

FITTED = {
    "own_dense": "our full attention",
    "partial": "partial step",
    "full": "full step with re-selection",
}
_SKIP = tuple(name for name in VARIANTS if name not in FITTED)


def run(
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    budgets: Sequence[int],
    strides: Sequence[int],
    shape: str,
    device: str,
    dtype: str,
    steps: int = 10,
    threads: int | None = None,
    results: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The first value of each list is the base, from which one at a time is varied.

    Returns the settings of the base, `points` (one a size), `fits` by variant and `strides`; rows go to `results`, with
    the columns of `bench decode`.

    Raises:
        ValueError: fewer than two sizes, and what `decode.run` raises.
    """
    sizes = grid(contexts, batches, budgets)
    if len(sizes) < 2:
        raise ValueError("a fit needs two sizes: give several contexts, batches or budgets")
    builder = functools.cache(build)
    found = [
        decode.run(
            shape=shape,
            context=context,
            batch=batch,
            budget=budget,
            stride=strides[0],
            device=device,
            dtype=dtype,
            steps=steps,
            skip=_SKIP,
            results=results,
            progress=progress,
            threads=threads,
            builder=builder,
        )
        for context, batch, budget in sizes
    ]
    base = found[0]
    names = (
        "time",
        "shape",
        "context",
        "batch",
        "budget",
        "device",
        "dtype",
        "threads",
        "bandwidth",
    )
    return {
        **{name: base[name] for name in names},
        "points": [point(record) for record in found],
        "fits": {name: fit(points_of(found, name)) for name in FITTED},
        "strides": [at_stride(base, stride) for stride in strides],
        "versions": base["versions"],
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


def point(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is plotted of one run: its size, milliseconds and bytes."""
    size = {name: record[name] for name in ("context", "batch", "budget")}
    return {
        **size,
        "ms": {name: record["ms"][name] for name in FITTED},
        "bytes": {name: record["bytes"][name] for name in FITTED},
    }


def points_of(found: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """`(bytes, ms)` of a variant in several runs."""
    return [(record["bytes"][name], record["ms"][name]) for record in found]


def fit(points: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Least squares through `(bytes, ms)`.

    Returns `fixed_ms` (a), `bytes_per_s` (1 / b), `worst` (the largest relative error of a point) and `points`; the
    first three are `None` where the bytes are all the same, or more of them take less time.
    """
    size, ms = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    if np.ptp(size) == 0:
        return {"fixed_ms": None, "bytes_per_s": None, "worst": None, "points": len(points)}
    slope, fixed = np.polyfit(size, ms, 1)
    if slope <= 0:
        return {"fixed_ms": None, "bytes_per_s": None, "worst": None, "points": len(points)}
    worst = np.max(np.abs(fixed + slope * size - ms) / ms)
    numbers = {"fixed_ms": float(fixed), "bytes_per_s": 1e3 / float(slope), "worst": float(worst)}
    return {**rounded(numbers), "points": len(points)}


def at_stride(record: Row, stride: int) -> dict[str, float | None]:
    """The mix at another stride, from the partial and full steps of a run, and what the bytes would allow."""
    ms, moved = record["ms"], record["bytes"]
    mixed = (1 - 1 / stride) * ms["partial"] + ms["full"] / stride
    size = (1 - 1 / stride) * moved["partial"] + moved["full"] / stride
    numbers = {"ms": mixed, "over_own_dense": ms["own_dense"] / mixed}
    return {"stride": stride, **rounded({**numbers, "ideal": moved["own_dense"] / size})}
