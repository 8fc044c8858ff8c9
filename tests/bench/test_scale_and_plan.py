"""Fits and predictions on numbers that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from refreshkv.bench import plan, plots, record, scale
from refreshkv.bench.plan import Device
from refreshkv.bench.roofline import Load, Sizes

SIZES = Sizes(weights=1_000_000, entry=100, stored=1_500_000)
# One MB a millisecond.
DEVICE = Device(bandwidth=1e9, memory=10e6)


def test_grid_varies_one_at_a_time() -> None:
    assert scale.grid([10, 20, 30], [1, 2], [4]) == [(10, 1, 4), (20, 1, 4), (30, 1, 4), (10, 2, 4)]
    assert scale.grid([10, 10], [1], [4]) == [(10, 1, 4)]


def test_fit_finds_the_line() -> None:
    found = scale.fit([(1e6, 3.0), (2e6, 5.0), (4e6, 9.0)])  # 1 ms + 2 ms a MB
    assert found["fixed_ms"] == pytest.approx(1.0) and found["bytes_per_s"] == pytest.approx(5e8)
    assert found["worst"] < 1e-6 and found["points"] == 3
    off = scale.fit([(1e6, 3.0), (2e6, 5.0), (3e6, 7.0), (4e6, 18.0)])
    assert off["worst"] > 0.1


@pytest.mark.parametrize("points", [[(1e6, 1.0), (1e6, 2.0)], [(1e6, 2.0), (2e6, 1.0)]])
def test_fit_of_what_does_not_grow(points: list[tuple[float, float]]) -> None:
    assert scale.fit(points)["bytes_per_s"] is None


def test_strides_by_hand() -> None:
    run = {
        "ms": {"partial": 10.0, "full": 30.0, "own_dense": 28.0},
        "bytes": {"partial": 1.0, "full": 3.0, "own_dense": 3.0},
    }
    assert scale.at_stride(run, 2) == {"stride": 2, "ms": 20, "over_own_dense": 1.4, "ideal": 1.5}


def test_plan_by_hand() -> None:
    settings = {"context": 10_000, "batch": 2, "budget": 1000, "stride": 10, "draft": 9}
    found = plan.plan(SIZES, Load(**settings, acceptance=1.0), DEVICE)
    full, mix, mixed, exact = (found["modes"][name] for name in found["modes"] if name != "snapkv")
    assert full["bytes"] == 1_000_000 + 2 * 10_000 * 100 and full["ms"] == 3
    assert full["tokens_per_s"] == pytest.approx(2 / 3e-3, rel=1e-4)
    assert mix["bytes"] == 1_000_000 + 2 * 1900 * 100
    assert mix["speed_up"] == pytest.approx(3 / 1.38, rel=1e-4)
    assert mixed["bytes"] == pytest.approx(1_000_000 + 2 * 1032 * 100 + 281_250, rel=1e-4)
    # ten passes and 9 * 1000 + 10000 entries for ten tokens
    assert exact["bytes"] == 1_000_000 + 2 * 1900 * 100
    memory = found["memory"]
    assert memory["cache"] == 2_000_000 and memory["partial"] == 200_000
    # 4.5 of 32 bits of 20,000 entries, more than the copies of a selection
    assert memory["codes"] == 281_250 and memory["total"] == 3_781_250 and memory["fits"]
    assert not plan.plan(SIZES, Load(**{**settings, "batch": 10}), DEVICE)["memory"]["fits"]


def test_a_fixed_cost_makes_the_modes_alike() -> None:
    load = Load(context=10_000, batch=2, budget=1000, stride=None, draft=10, acceptance=0.93)
    found = plan.plan(SIZES, load, DEVICE, fixed_ms=5.0)["modes"]
    assert found["mix"]["speed_up"] == pytest.approx((5 + 3) / (5 + 1.2), rel=1e-4)
    # the lossless mode makes more than a pass a token
    assert found["exact"]["ms"] > 5.0 * 11 / 10.3


def row(context: int, *, fixed: float = 0.0, speed: float = 1e9) -> dict[str, Any]:
    """A row of a machine that is as the model says."""
    reads = Load(context=context, budget=1000).modes()
    moved = {name: one.bytes(SIZES, 1) for name, one in reads.items()}
    ms = {name: fixed * reads[name].passes + size / speed * 1e3 for name, size in moved.items()}
    ms["own_dense"], moved["own_dense"] = ms["full"], moved["full"]
    ms["partial"], moved["partial"] = ms["snapkv"], moved["snapkv"]
    size = {"context": context, "batch": 1, "budget": 1000, "stride": 10}
    about = {
        "shape": "x",
        "device": "d",
        "dtype": "t",
        "threads": 1,
        "draft": 8,
        "acceptance": 0.85,
    }
    return record.flat({**about, **size, "ms": ms, "bytes": moved})


def test_check_against_rows_that_are_as_the_model_says() -> None:
    found = plan.predictions([row(5000), row(10_000), row(20_000)], lambda *_: SIZES)
    assert len(found) == 9 and {one["mode"] for one in found} == {"mix", "mixed", "exact"}
    assert all(abs(one["error_by_bytes"]) < 1e-3 for one in found)
    assert all(abs(one["error_by_fit"]) < 1e-3 for one in found)


def test_check_tells_a_fixed_cost_by_the_other_rows() -> None:
    rows = [row(context, fixed=4.0) for context in (5000, 10_000, 20_000)]
    for one in plan.predictions(rows, lambda *_: SIZES):
        if one["mode"] == "mix":
            assert one["error_by_bytes"] > 0.05
        assert abs(one["error_by_fit"]) < 1e-3
    assert plan.predictions(rows[:2], lambda *_: SIZES)[0]["by_fit"] is None  # one other is no line
    alone = [{**rows[0], "device": "another"}, *rows[1:]]
    assert plan.predictions(alone, lambda *_: SIZES)[0]["by_fit"] is None


def test_a_run_of_scale(tmp_path: Path) -> None:
    path = tmp_path / "scale.csv"
    found = scale.run(
        contexts=[64, 128],
        batches=[1, 2],
        budgets=[16],
        strides=[10, 2],
        shape="demo",
        device="cpu",
        dtype="float32",
        steps=1,
        results=path,
        progress=False,
    )
    assert [(p["context"], p["batch"]) for p in found["points"]] == [(64, 1), (128, 1), (64, 2)]
    assert set(found["fits"]) == {"own_dense", "partial", "full"}
    assert [one["stride"] for one in found["strides"]] == [10, 2]
    assert len(record.read(path)) == 3
    picture = tmp_path / "scale.png"
    plots.scale(picture, found)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scale_needs_two_sizes() -> None:
    lists = {"contexts": [64], "batches": [1], "budgets": [16], "strides": [10]}
    with pytest.raises(ValueError, match="two sizes"):
        scale.run(**lists, shape="demo", device="cpu", dtype="float32")


def test_roofline_plot(tmp_path: Path) -> None:
    path = tmp_path / "roofline.png"
    plots.roofline(path, "a title", {"partial": (1e6, 2.0), "full": (3e6, 4.0)}, 1e9)
    assert path.read_bytes().startswith(b"\x89PNG")
