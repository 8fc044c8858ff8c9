"""The plots of a run: quality against KV read, and quality by position in the output.

A plot is a matplotlib `Figure` made without pyplot, so nothing stays open. Colours are the families of methods, from
Okabe and Ito's palette, which colour-blind readers can tell apart; within a family the marker and the dashes differ.
The same records give the same bytes.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from refreshkv.evals.summary import Record, Summary, is_perplexity, need, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 10  # of the output, where its length differs between examples
_SIZE = (6.6, 3.9)  # inches
_LABEL = 32  # letters a line of a method's spec
_EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.5}
_RC = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.hashsalt": "refreshkv",  # ids of clip paths would be random
    "svg.fonttype": "none",  # text that can be searched and read aloud
    "hatch.color": "#bdbdbd",
    "hatch.linewidth": 0.6,
}
# family -> colour; the first family of which a name in the tuple begins the method's name
_FAMILIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("full",), "#000000"),
    (("refreshkv",), "#0072b2"),
    (("no-",), "#b0588f"),
    (("oracle", "quest", "kascade", "squeezed", "hip"), "#007a5a"),
    (
        ("streaming", "h2o", "snapkv", "pyramid", "tova", "citrus", "cascading", "subgen"),
        "#c75000",
    ),
)
_OTHER = "#6b6b6b"
_MARKERS = "osD^vP<X>hp*d"
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (2, 3)))


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in every plot of a run."""

    colour: str
    marker: str
    dashes: Any


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """One style a method, all different as long as a family has no more methods than there are markers."""
    seen: dict[str, int] = {}
    found = {}
    for method in dict.fromkeys(methods):
        colour = next((c for names, c in _FAMILIES if method.startswith(names)), _OTHER)
        index = seen.setdefault(colour, 0)
        seen[colour] += 1
        found[method] = Style(
            colour, _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)]
        )
    return found


def pareto(summaries: Sequence[Summary], look: dict[str, Style], title: str) -> Figure | None:
    """Score against KV read share for one task and mode: a point with its interval for each method.

    Better is up (the axis of a perplexity is turned round), cheaper is left. `None` where nothing was read.
    """
    points = [s for s in summaries if s.kv_read_share]
    if not points:
        return None
    with settings():
        factor = scale(points[0].task)
        figure, axes = _panel(title)
        for s in sorted(points, key=lambda s: s.score, reverse=not is_perplexity(points[0].task)):
            style = look[s.method]
            axes.errorbar(
                s.kv_read_share,
                factor * s.score,
                yerr=[
                    [factor * max(0, s.score - s.ci_low)],
                    [factor * max(0, s.ci_high - s.score)],
                ],
                fmt=style.marker,
                color=style.colour,
                markersize=5.5,
                elinewidth=0.9,
                alpha=0.9,
                label=textwrap.fill(s.method, _LABEL),
                **_EDGE,
            )
        _axis_of_shares(axes, [s.kv_read_share for s in points if s.kv_read_share])
        _axis_of_scores(axes, points[0].task, points[0].metric, [factor * s.score for s in points])
        _legend(figure)
        return figure


def positions(records: Sequence[Record], look: dict[str, Style], title: str) -> Figure | None:
    """Mean quality of the parts of an output by their place in it, for one task and mode: a line for each method.

    The place is the part's number where all outputs have as many parts; else it is relative, in `BINS` bins, and a
    part counts for each bin as far as it lies in it. `None` where no output has two parts.
    """
    parts: dict[str, list[Sequence[float]]] = {}
    for record in sorted(records, key=lambda record: record["example"]):
        if record.get("parts"):
            parts.setdefault(record["method"], []).append(record["parts"])
    lengths = {len(one) for several in parts.values() for one in several}
    if not parts or max(lengths) < 2:
        return None
    counted = len(lengths) == 1
    methods = [method for method in dict.fromkeys(r["method"] for r in records) if method in parts]
    with settings():
        figure, axes = _panel(title)
        lines = {}
        for method in methods:
            rows = parts[method] if counted else [rebin(one, BINS) for one in parts[method]]
            lines[method] = 100 * np.mean(np.array(rows, dtype=float), axis=0)
        for method, line in sorted(lines.items(), key=lambda item: -item[1][-1]):
            places = np.arange(1, len(line) + 1) if counted else (np.arange(BINS) + 0.5) / BINS
            style = look[method]
            axes.plot(
                places,
                line,
                color=style.colour,
                linestyle=style.dashes,
                linewidth=1.4,
                marker=style.marker,
                markersize=4,
                label=textwrap.fill(method, _LABEL),
                **_EDGE,
            )
        axes.set_xlabel("part of the output" if counted else "relative position in the output")
        if counted:
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:
            axes.set_xlim(0, 1)
        axes.set_ylabel("parts right, %")
        axes.set_ylim(-4, 104)
        _legend(figure)
        return figure


def rebin(parts: Sequence[float], bins: int) -> np.ndarray:
    """The step function of `parts` over [0, 1], averaged in `bins` equal bins. [bins]"""
    whole = np.concatenate([[0.0], np.cumsum(parts)]) / len(parts)
    edges = np.linspace(0, 1, bins + 1)
    return np.diff(np.interp(edges, np.linspace(0, 1, len(parts) + 1), whole)) * bins


def render(figure: Figure) -> bytes:
    """The figure as an SVG file, without a date."""
    file = io.BytesIO()
    with settings():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def inline(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element for a page; its ids begin with `prefix`, as ids are unique in a page."""
    text = render(figure).decode()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text[text.index("<svg") :])
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)


def settings() -> Any:
    """Our settings of matplotlib, and everybody else's again afterwards."""
    return need("matplotlib").rc_context(_RC)


def _panel(title: str) -> tuple[Figure, Axes]:
    """A figure with its axes."""
    figure = need("matplotlib.figure").Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", parse_math=False)
    return figure, axes


def _legend(figure: Figure) -> None:
    """The methods beside the axes, in the order in which they were drawn: the best first."""
    legend = figure.legend(loc="outside right upper", frameon=False, fontsize=7.5)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _axis_of_shares(axes: Axes, shares: Sequence[float]) -> None:
    """Logarithmic, with the ticks that people read."""
    low, high = min(shares) / 1.15, max(1.0, *shares) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0) if low <= t <= high]
    axes.set_xticks(ticks, [f"{100 * tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("KV read, % of full attention")


def _axis_of_scores(axes: Axes, task: str, metric: str, scores: Sequence[float]) -> None:
    if is_perplexity(task):
        if max(scores) > 10 * min(scores):
            axes.set_yscale("log")
        axes.invert_yaxis()
        axes.set_ylabel("perplexity (axis turned: up is better)")
    else:
        axes.set_ylabel(f"{metric}, %", parse_math=False)
        if max(scores) > 60:
            axes.set_ylim(-4, 104)
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if min(scores) < 5 else None)
