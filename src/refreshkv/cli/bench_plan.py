"""`refreshkv bench plan`: finds the model's sizes and the device, and asks the byte model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refreshkv.cli import common
from refreshkv.cli.common import BadInput


def planned(
    model: str,
    dtype: str,
    *,
    context: int,
    batch: int,
    budget: int | float,
    stride: int | str,
    draft: int,
    acceptance: float,
    device: str,
    bandwidth: float | None,
    fixed_ms: float,
) -> dict[str, Any]:
    """The record of a plan: settings, `modes` and `memory` as `bench.plan.plan` gives them.

    Raises:
        BadInput: an unknown device or model, or a model that RefreshKV does not support.
    """
    from refreshkv.bench import plan
    from refreshkv.config import RefreshConfig, unknown

    if device not in plan.DEVICES:
        raise BadInput(unknown("device", device, plan.DEVICES))
    place = plan.DEVICES[device]
    if bandwidth is not None:
        place = plan.Device(bandwidth * 1e9, place.memory)
    every = None if stride == common.STRIDE.word else int(stride)
    with common.bad_input():
        config = RefreshConfig(budget=budget, stride=every)
        settings = {
            "context": context,
            "batch": batch,
            "budget": config.resolve_budget(context),
            "stride": every,
            "draft": draft,
            "acceptance": acceptance,
        }
        found = plan.plan(sizes(model, dtype), **settings, device=place, fixed_ms=fixed_ms)
    about = {"device": device, "bandwidth": place.bandwidth, "fixed_ms": fixed_ms, "dtype": dtype}
    return {"model": model, **settings, **about, **found}


def checked(path: Path) -> dict[str, Any]:
    """`rows`: predictions beside the rows of a file, as `bench.plan.check` gives them; and their median errors.

    Raises:
        BadInput: a file that `bench decode` did not write.
    """
    import statistics

    from refreshkv.bench import plan
    from refreshkv.bench.record import read

    with common.bad_input():
        rows = read(path)
    if not rows or not {"ms.exact", "bytes.mix", "draft"} <= set(rows[0]):
        raise BadInput(f"{path} has no rows of `bench decode`: give another file")
    known = {(row["shape"], row["dtype"]) for row in rows}
    # A row's sizes follow from its shape and dtype; a file mixes dtypes rarely, so they are looked at in turn.
    found = []
    for shape, dtype in sorted(known):
        alike = [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)]
        found += plan.check(alike, {shape: sizes(shape, dtype)})
    errors = {
        f"median_{name}": statistics.median(values) if values else None
        for name in ("error_by_bytes", "error_by_fit")
        for values in [[abs(one[name]) for one in found if one[name] is not None]]
    }
    return {"file": str(path), "rows": found, **errors}


def sizes(model: str, dtype: str) -> Any:
    """Bytes of a shape, or of a model of which only the config is read.

    Raises:
        BadInput: no such model, or one that is not supported.
    """
    import torch

    from refreshkv.bench.roofline import sizes_of
    from refreshkv.bench.shapes import SHAPES, config_of, outline
    from refreshkv.cli.loading import load_config, reading
    from refreshkv.cli.locate import locate

    kind = getattr(torch, dtype)
    if model in SHAPES:
        return sizes_of(outline(config_of(model), kind))
    source = locate(model, weights=False)
    config, support = load_config(source)
    if not support.ok:
        raise BadInput(f"model {model!r} is not supported: {support.reason}")
    with reading(source, "config"):
        return sizes_of(outline(config, kind))
