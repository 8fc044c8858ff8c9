"""`report.html`: one file without a network, tables in the form of the paper's, plots, and one example a task.

Everything that a model wrote or a user named goes through Jinja's escaping, and control characters and marks that turn
the direction of text are shown, not obeyed. The same records give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refreshkv.evals import plots
from refreshkv.evals.summary import (
    BESIDE_FULL,
    BESIDE_FULL_NOTE,
    Difference,
    Record,
    Summary,
    average,
    beside_full,
    differences,
    figures,
    is_perplexity,
    need,
    scale,
    write_whole,
)
from refreshkv.stats import KV_READ_NOTE
from refreshkv.text import visible

REPORT, CONFIG, TEMPLATE = "report.html", "config.json", "report.html.j2"
_SHOWN = 4000  # characters of an output in the report
_ABLATIONS = ("full", "snapkv-1", "refreshkv", "no-")


@dataclass(frozen=True)
class Cell:
    """A score with its interval, ready to be shown, and what it cost."""

    score: str
    interval: str
    tokens: str
    read: str
    best: bool


@dataclass(frozen=True)
class Table:
    """Methods by tasks; a cell is `None` where there is no result."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class Strides:
    """Steps per full step of each layer; a row is a method, a cell its text and how dark it is, 0 to 1."""

    mode: str
    layers: tuple[int, ...]
    rows: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]


def write_report(
    directory: str | os.PathLike[str], records: Sequence[Record], summaries: Sequence[Summary]
) -> Path:
    """Write `report.html` into a run directory, whole or not at all; returns its path."""
    path = Path(directory) / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    page = Path(directory) / REPORT
    write_whole(page, render(records, summaries, config).encode())
    return page


def render(
    records: Sequence[Record], summaries: Sequence[Summary], config: Mapping[str, Any]
) -> str:
    """The page."""
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_safe,
    )
    return environment.get_template(TEMPLATE).render(
        facts=facts(records, config),
        command=command(config),
        warnings=[warning(found) for found in differences(records) if found.beats],
        tables=list(tables(records, summaries)),
        beside=[(s.task, s.method, *beside_full(s)) for s in summaries if s.ratio is not None],
        beside_columns=("task", "method", *BESIDE_FULL),
        beside_note=BESIDE_FULL_NOTE,
        plots=list(all_plots(records, summaries)),
        strides=list(strides(records)),
        summaries=[(s, _cell(s, best=False)) for s in summaries],
        share=_share,
        examples=list(examples(records)),
        kv_read_note=KV_READ_NOTE,
    )


def facts(records: Sequence[Record], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, as pairs of name and value."""
    first = records[0] if records else {}
    found = {**first, **config}
    versions = found.get("versions", {})
    names = ("model", "dtype", "device", "budget", "seed", "limit", "batch", "chat")
    if config.get("budget") is None:  # each method had its own
        budgets = {record["budget"]: None for record in records if "budget" in record}
        found["budget"] = " or ".join(map(str, budgets)) or None
    pairs = [(name, str(found[name])) for name in names if found.get(name) is not None]
    return [*pairs, ("versions", ", ".join(f"{n} {v}" for n, v in versions.items()))]


def command(config: Mapping[str, Any]) -> str:
    """The command that re-makes a run directory; empty where its settings are not known."""
    if "tasks" not in config:
        return ""
    parts = ["refreshkv", "eval", "--model", config["model"]]
    parts += ["--tasks", ",".join(config["tasks"]), "--methods", ",".join(config["methods"])]
    for name in ("budget", "limit", "seed", "batch", "mode", "dtype"):
        if config.get(name) is not None:
            parts += [f"--{name}", str(config[name])]
    for task, settings in config["tasks"].items():
        for name, value in settings.items():
            if value is not None:
                parts += ["--task-option", f"{task}.{name}={value}"]
    if config.get("chat"):
        parts.append("--chat")
    return shlex.join([*parts, "--out", "DIR"])


def warning(found: Difference) -> str:
    """What a reader has to know of a method that beats full attention."""
    return (
        f"{found.method} beats full attention on {found.task} ({found.mode}) by {found.gain:.3f}"
        f" [{found.ci_low:.3f}, {found.ci_high:.3f}] over {found.examples} examples: suspect the"
        " harness first"
    )


def tables(records: Sequence[Record], summaries: Sequence[Summary]) -> Iterator[Table]:
    """The paper's tables, as far as there are results for them."""
    for mode, how in (("free", "free-running"), ("forced", "gold answer fed")):
        own = [s for s in summaries if s.mode == mode]
        kinds = {
            "perplexity": ("Perplexity", "As the paper's table 1; lower is better."),
            "ruler-": ("RULER", "As the paper's table 2."),
            "summarization": ("Summarisation", "As the paper's table 3."),
            "": (f"Long outputs, {how}", "As the paper's table 4."),
        }
        for kind, (title, note) in kinds.items():
            chosen = [s for s in own if _kind(s.task) == kind]
            if kind == "ruler-" and chosen:
                ruler = [r for r in records if _kind(r["task"]) == kind and r["mode"] == mode]
                chosen = [*average(ruler, "average"), *chosen]
            if chosen:
                yield _table(title, note, chosen)
        if any(s.method.startswith("no-") for s in own):
            chosen = [
                s
                for s in own
                if s.method.startswith(_ABLATIONS) and not s.task.startswith("ruler-")
            ]
            yield _table(f"Ablations, {how}", "As the paper's table 10.", chosen)


def all_plots(records: Sequence[Record], summaries: Sequence[Summary]) -> Iterator[tuple[str, str]]:
    """Inline SVGs and what they show: quality against KV read and by position, free and fed beside each other."""
    look = plots.styles(s.method for s in summaries)
    for task in dict.fromkeys(s.task for s in summaries):
        for mode in dict.fromkeys(s.mode for s in summaries if s.task == task):
            own = [r for r in records if r["task"] == task and r["mode"] == mode]
            chosen = [s for s in summaries if s.task == task and s.mode == mode]
            name = f"{task}, {mode}"
            made = (
                (plots.pareto(chosen, look, name), "quality against KV read"),
                (plots.positions(own, look, name), "quality by position in the output"),
            )
            for kind, (figure, what) in enumerate(made):
                if figure is not None:
                    yield plots.inline(figure, f"{task}-{mode}-{kind}"), f"{name}: {what}"


def strides(records: Sequence[Record]) -> Iterator[Strides]:
    """Of each mode the methods that mix full steps and others; steps and full steps are summed over examples."""
    for mode in dict.fromkeys(record["mode"] for record in records):
        counts: dict[str, dict[int, tuple[float, float]]] = {}
        for record in records:
            layers = counts.setdefault(record["method"], {}) if record["mode"] == mode else {}
            for name, layer in record.get("layers", {}).items():
                full, steps = layers.get(int(name), (0.0, 0.0))
                layers[int(name)] = full + layer["full_steps"], steps + layer["steps"]
        mixed = {
            method: layers
            for method, layers in counts.items()
            if 0 < sum(full for full, _ in layers.values()) < sum(s for _, s in layers.values())
        }
        known = sorted({layer for layers in mixed.values() for layer in layers})
        rows = tuple(
            (m, tuple(_stride(*of.get(k, (0, 0))) for k in known)) for m, of in mixed.items()
        )
        if rows:
            yield Strides(mode, tuple(known), rows)


def _stride(full: float, steps: float) -> tuple[str, float]:
    """As text, and its shade: none for every step, dark from one in a hundred on."""
    if not full:
        return ("never" if steps else "", float(bool(steps)))
    return f"{steps / full:.1f}", min(1.0, math.log(steps / full, 100))


def examples(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The first example of each task and mode with what every method made of it."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        place = record["task"], record["mode"]
        shown = chosen.setdefault(
            place,
            {
                "task": record["task"],
                "mode": record["mode"],
                "example": record["example"],
                "prompt": record.get("prompt_sha256", ""),
                "outputs": [],
            },
        )
        if record["example"] == shown["example"]:
            text = str(record.get("output", ""))
            text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
            score = f"{scale(record['task']) * record['score']:.1f}"
            shown["outputs"].append((record["method"], score, text))
    yield from chosen.values()


def _safe(value: Any) -> Any:
    """What a template inserts. Escapes hold nothing that HTML knows, so markup stays markup."""
    return type(value)(visible(value, keep="\n\t")) if isinstance(value, str) else value


def _kind(task: str) -> str:
    """What the task's name begins with, where that has a table of its own."""
    return next((k for k in ("perplexity", "ruler-", "summarization") if task.startswith(k)), "")


def _table(title: str, note: str, summaries: Sequence[Summary]) -> Table:
    columns = tuple(dict.fromkeys(s.task for s in summaries))
    by_place = {(s.method, s.task): s for s in summaries}
    best = {task: _best([s for s in summaries if s.task == task]) for task in columns}
    rows = []
    for method in dict.fromkeys(s.method for s in summaries):
        own = [by_place.get((method, task)) for task in columns]
        cells = (
            None if s is None else _cell(s, best=s.score == best[s.task] and method != "full")
            for s in own
        )
        rows.append((method, tuple(cells)))
    return Table(title, note, columns, tuple(rows))


def _best(summaries: Sequence[Summary]) -> float | None:
    """The best score besides full attention's."""
    scores = [s.score for s in summaries if s.method != "full"]
    return (min if is_perplexity(summaries[0].task) else max)(scores, default=None)


def _cell(s: Summary, *, best: bool) -> Cell:
    score, low, high = figures(s)
    return Cell(score, f"{low}-{high}", f"{s.output_tokens:.0f}", _share(s.kv_read_share), best)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
