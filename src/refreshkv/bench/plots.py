"""Plots of timings: milliseconds over bytes and the roof of the bandwidth; cost over context, rows, K and stride."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreshkv.bench.scale import FITTED
from refreshkv.evals.plots import settings
from refreshkv.evals.summary import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (6.0, 4.2)  # inches


def check() -> None:
    """Raises `ModuleNotFoundError`, with the remedy, where nothing can be plotted: to be asked before timing."""
    need("matplotlib.figure")


def roofline(
    path: Path, title: str, points: Mapping[str, tuple[float, float]], bandwidth: float
) -> None:
    """A PNG of `(bytes, ms)` by name: nothing can lie below the line, which is reading at full `bandwidth`."""
    with settings():
        figure = need("matplotlib.figure").Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        ends = [min(size for size, _ in points.values()), max(size for size, _ in points.values())]
        ends = [ends[0] / 1.5, ends[1] * 1.5]
        roof = [size / bandwidth * 1e3 for size in ends]
        axes.plot([size / 1e6 for size in ends], roof, color="#000000", label="measured bandwidth")
        for (name, (size, ms)), marker in zip(points.items(), cycle("osD^vP<X>hp*d")):
            axes.plot(size / 1e6, ms, marker, linestyle="none", markersize=5, label=name)
        axes.set(xscale="log", yscale="log", xlabel="MB moved", ylabel="ms", title=title)
        figure.legend(frameon=False, loc="outside right upper")
        figure.savefig(path, dpi=150, format="png")


def scale(path: Path, record: Mapping[str, Any]) -> None:
    """A PNG of a record of `scale.run`: four panels, the points and the fitted lines."""
    with settings():
        figure = need("matplotlib.figure").Figure(figsize=(9.0, 6.4), layout="constrained")
        panels = figure.subplots(2, 2).ravel()
        for axes, varied in zip(panels[:3], ("context", "batch", "budget"), strict=True):
            _panel(axes, varied, record)
        strides = sorted(record["strides"], key=lambda one: one["stride"])
        where = [one["stride"] for one in strides]
        panels[3].plot(where, [one["over_own_dense"] for one in strides], "o-", label="measured")
        panels[3].plot(where, [one["ideal"] for one in strides], "--", label="by bytes")
        panels[3].set(xlabel="stride", ylabel="times our full attention")
        for axes in panels:
            axes.legend(frameon=False)
        figure.suptitle(f"{record['shape']}, {record['dtype']}, {record['device']}")
        figure.savefig(path, dpi=150, format="png")


def _panel(axes: Axes, varied: str, record: Mapping[str, Any]) -> None:
    """ms over one setting, for the points that share the others with the base."""
    others = [name for name in ("context", "batch", "budget") if name != varied]
    points = [p for p in record["points"] if all(p[name] == record[name] for name in others)]
    points.sort(key=lambda point: point[varied])
    where = [point[varied] for point in points]
    for name, what in FITTED.items():
        (line,) = axes.plot(where, [point["ms"][name] for point in points], "o", label=what)
        fit = record["fits"][name]
        if fit["bytes_per_s"] is not None:
            fitted = [
                fit["fixed_ms"] + point["bytes"][name] / fit["bytes_per_s"] * 1e3
                for point in points
            ]
            axes.plot(where, fitted, "-", color=line.get_color(), linewidth=0.8)
    axes.set(xlabel=varied, ylabel="ms", ylim=(0, None))
