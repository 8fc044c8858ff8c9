"""The plot of effective strides: layers by methods."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from refreshkv.evals.plots import LABEL, LETTER, LINE, WIDTH, settings, wrapped
from refreshkv.evals.summary import Record, need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEVER = "never"


def strides(records: Iterable[Record], title: str) -> Figure | None:
    """Effective stride of each layer (steps / full steps, summed over examples), for the methods that mix both.

    A layer without a full step shows as "never". `None` where every method is always full or never.
    """
    counts = layer_counts(records)
    methods = mixed(counts)
    if not methods:
        return None
    layers = sorted({layer for method in methods for layer in counts[method]})
    table = np.full((len(methods), len(layers)), np.nan)
    for i, method in enumerate(methods):
        for layer, (full, steps) in counts[method].items():
            table[i, layers.index(layer)] = steps / full if full else np.inf
    with settings():
        return _heat(table, methods, layers, title)


def layer_counts(records: Iterable[Record]) -> dict[str, dict[int, tuple[float, float]]]:
    """Method -> layer -> (full steps, steps), summed over examples."""
    counts: dict[str, dict[int, tuple[float, float]]] = {}
    for record in records:
        layers = counts.setdefault(record["method"], {})
        for name, layer in record.get("layers", {}).items():
            full, steps = layers.get(int(name), (0.0, 0.0))
            layers[int(name)] = full + layer["full_steps"], steps + layer["steps"]
    return counts


def mixed(counts: dict[str, dict[int, tuple[float, float]]]) -> list[str]:
    """The methods with full steps and others."""
    sums = {
        method: np.sum(list(layers.values()), axis=0) for method, layers in counts.items() if layers
    }
    return [method for method, (full, steps) in sums.items() if 0 < full < steps]


def _heat(table: np.ndarray, methods: list[str], layers: list[int], title: str) -> Figure:
    """Methods x layers, numbers in the cells where there is room for them."""
    colours = need("matplotlib.colors")
    longest = max(len(line) for method in methods for line in wrapped(method))
    left, top, bottom, right = longest * LETTER + 0.15, 0.36, 0.5, 0.75
    row = max(0.26, max(len(wrapped(method)) for method in methods) * LINE + 0.08)
    height = top + bottom + row * len(methods)
    figure = need("matplotlib.figure").Figure(figsize=(WIDTH, height))
    inside = WIDTH - left - right
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, inside / WIDTH, row * len(methods) / height)
    )
    axes.grid(visible=False)
    axes.set_facecolor("#f4f4f4")
    axes.patch.set_hatch("////")
    known = table[np.isfinite(table)]
    norm = colours.LogNorm(1, max(2.0, float(known.max())))
    shades = need("matplotlib").colormaps["cividis"]
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(table), cmap=shades, norm=norm, edgecolors="white", linewidth=1
    )
    if inside / len(layers) >= 0.27:
        for (i, j), stride in np.ndenumerate(table):
            if math.isnan(stride):
                continue
            text = (
                f"{stride:.1f}"
                if stride < 10
                else f"{stride:.0f}"
                if math.isfinite(stride)
                else NEVER
            )
            dark = math.isfinite(stride) and norm(stride) < 0.5
            small = 5.5 if text == NEVER and inside / len(layers) < 0.4 else 7
            axes.text(
                j + 0.5,
                i + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=small,
                color="white" if dark else "black",
            )
    axes.invert_yaxis()
    axes.set_yticks(
        np.arange(len(methods)) + 0.5,
        ["\n".join(wrapped(method)) for method in methods],
        fontsize=LABEL,
        parse_math=False,
    )
    every = math.ceil(len(layers) / 16)
    axes.set_xticks(np.arange(0, len(layers), every) + 0.5, [str(n) for n in layers[::every]])
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", parse_math=False)
    side = figure.add_axes(
        (
            (WIDTH - right + 0.12) / WIDTH,
            bottom / height,
            0.12 / WIDTH,
            row * len(methods) / height,
        )
    )
    bar = figure.colorbar(mesh, cax=side)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick <= norm.vmax]
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_linewidth(0.4)
    side.set_ylabel("stride")
    return figure
