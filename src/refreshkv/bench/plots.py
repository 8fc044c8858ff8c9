"""Plots of timings: milliseconds over bytes and the roof of the bandwidth; cost over context, rows, K and stride."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreshkv.bench.scale import FITTED
from refreshkv.bench.variants import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


def check(path: Path) -> None:
    """Raises `ValueError`, with the remedy, where nothing could be plotted to `path`: to be asked before timing."""
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install '.[eval]' in a checkout of refreshkv")
    if not path.parent.is_dir():
        raise ValueError(f"cannot plot to {path}: there is no folder {path.parent}; make it first")


def draw(path: Path, record: Mapping[str, Any]) -> None:
    """The plot of a record: `scale` for one of `bench scale`, the roofline of what was timed otherwise."""
    if "fits" in record:
        scale(path, record)
        return
    if "kernels" in record:
        points = {one["kernel"]: (one["bytes"], one["ms"]) for one in record["kernels"]}
    else:
        timed = {name: ms for name, ms in record["ms"].items() if ms is not None}
        points = {
            name: (size, timed[name]) for name, size in record["bytes"].items() if name in timed
        }
    size = f"{record['batch']} x {record['context']}, K {record['budget']}"
    roofline(path, f"{record['shape']}, {size}, {record['dtype']}", points, record["bandwidth"])


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, saved as a PNG afterwards; without pyplot, so that nothing stays open."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=150, format="png")


def roofline(
    path: Path, title: str, points: Mapping[str, tuple[float, float]], bandwidth: float
) -> None:
    """A PNG of `(bytes, ms)` by name: nothing can lie below the line, which is reading at full `bandwidth`."""
    with _figure(path, 6.0, 4.2) as figure:
        axes = figure.subplots()
        sizes = [size for size, _ in points.values()]
        ends = [min(sizes) / 1.5, max(sizes) * 1.5]
        roof = [size / bandwidth * 1e3 for size in ends]
        axes.plot([size / 1e6 for size in ends], roof, color="#000000", label="measured bandwidth")
        for (name, (size, ms)), marker in zip(points.items(), cycle("osD^vP<X>hp*d")):
            axes.plot(size / 1e6, ms, marker, linestyle="none", markersize=5, label=name)
        axes.set(xscale="log", yscale="log", xlabel="MB moved", ylabel="ms", title=title)
        figure.legend(loc="outside right upper")


def scale(path: Path, record: Mapping[str, Any]) -> None:
    """A PNG of a record of `scale.run`: four panels, the points and the fitted lines."""
    with _figure(path, 9.0, 6.4) as figure:
        panels = figure.subplots(2, 2).ravel()
        for axes, varied in zip(panels[:3], ("context", "batch", "budget"), strict=True):
            _panel(axes, varied, record)
        strides = sorted(record["strides"], key=lambda one: one["stride"])
        where = [one["stride"] for one in strides]
        panels[3].plot(where, [one["over_own_dense"] for one in strides], "o-", label="measured")
        panels[3].plot(where, [one["ideal"] for one in strides], "--", label="by bytes")
        panels[3].set(xlabel="stride", ylabel="times our full attention")
        for axes in panels:
            axes.legend()
        figure.suptitle(f"{record['shape']}, {record['dtype']}, {record['device']}")


def _panel(axes: Axes, varied: str, record: Mapping[str, Any]) -> None:
    """ms over one setting, for the points that share the others with the base."""
    others = [name for name in ("context", "batch", "budget") if name != varied]
    points = [p for p in record["points"] if all(p[name] == record[name] for name in others)]
    points.sort(key=lambda point: point[varied])
    where = [point[varied] for point in points]
    for name in FITTED:
        (line,) = axes.plot(where, [point["ms"][name] for point in points], "o", label=NAMES[name])
        fixed, speed = (record["fits"][name][part] for part in ("fixed_ms", "bytes_per_s"))
        if speed is not None:
            fitted = [fixed + point["bytes"][name] / speed * 1e3 for point in points]
            axes.plot(where, fitted, "-", color=line.get_color(), linewidth=0.8)
    axes.set(xlabel=varied, ylabel="ms", ylim=(0, None))
