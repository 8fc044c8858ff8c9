"""Continued pre-training on a real model: what refreshing loses before and after, in the form of the paper's Table 5.

The texts are sources of Python's standard library, one kind of text as in the paper. Of ten files nine are trained on;
pieces of the tenth are what is measured. Each run is one of `refreshkv train`, each table one of `refreshkv eval`.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from experiments import grids
from experiments.tables import markdown
from refreshkv.config import unknown
from refreshkv.evals.results import BASELINE
from refreshkv.evals.summary import interval, read_results, write_whole

# Characters of a file, of a held-out piece, and taken of a file.
LEAST, PIECE, MOST = 6_000, 5_000, 16_000
APART = {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
LENGTH, SCORED, BUDGET = 512, 50, 128  # a sixteenth of the paper's; K is a quarter of L there too
# What each recipe asks of `refreshkv train`, and what both do; sequences have equally many tokens.
RECIPES: Mapping[str, Mapping[str, object]] = {
    "paper": {"length": 512, "tail": 50, "keep": "all"},
    "ordinary": {"length": 512, "tail": 50, "keep": "all", "budget": 562},
    "segments": {"length": 212, "tail": 350, "stride": 50, "keep": "budget"},
}
COMMON = {
    "budget": BUDGET,
    "micro-batch": 2,
    "warmup": 8,
    "log-every": 5,
    "save-every": 50,
    "device": "cpu",
}
TRAINING, HELD_OUT = "training.jsonl", "held-out.jsonl"


def show(
    model: str,
    *,
    recipes: tuple[str, ...] = ("paper", "ordinary", "segments"),
    steps: int = 100,
    batch: int = 8,
    rate: float = 1e-4,
    limit: int = 40,
    precision: str = "bfloat16",
    out: Path = Path("out") / "continued",
    processes: int = 2,
) -> None:
    """Continue a model with each recipe and print Table 5's form: before, after, and what refreshing loses.

    Args:
        model: a folder, a hub id or a name.
        recipes: paper, segments (refreshed inside the tail), ordinary (no partial cache, to compare with).
        steps: of the optimiser.
        batch: sequences of a step.
        rate: the highest learning rate.
        limit: held-out texts.
        precision: of the training's arithmetic; weights, and what is measured, are float32.
        out: where texts, runs and tables are.
        processes: of an evaluation, at once.

    Raises:
        ValueError: an unknown recipe, or a run that ended with an error.
    """
    for name in recipes:
        if name not in RECIPES:
            raise ValueError(unknown("recipe", name, RECIPES))
    texts(out)
    runs = {"before": measure(model, "before", out, limit, processes)}
    for name in recipes:
        given = {"steps": steps, "batch": batch, "rate": rate, "precision": precision}
        trained = train(model, name, out, **given)
        runs[name] = measure(str(trained), name, out, limit, processes)
    for length in (LENGTH, 2 * LENGTH):
        print(f"### {length} tokens\n\n{table({name: of[length] for name, of in runs.items()})}\n")


def texts(out: Path) -> None:
    """Write both files of texts, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / HELD_OUT).exists():
        return
    training, held = [], []
    for number, text in enumerate(sources()):
        if number % 10:
            training.append(text[:MOST])
        else:
            held += [text[at : at + PIECE] for at in range(0, len(text[:MOST]) - PIECE + 1, PIECE)]
    for name, found in ((TRAINING, training), (HELD_OUT, held)):
        write_whole(
            out / name, "".join(json.dumps({"text": text}) + "\n" for text in found).encode()
        )


def sources() -> Iterator[str]:
    """The longer modules of the standard library, in an order that has nothing to do with their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in root.rglob("*.py"):
        if not APART & set(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= LEAST:
                found[hashlib.sha256(text.encode()).hexdigest()] = text
    yield from (found[digest] for digest in sorted(found))


def train(model: str, recipe: str, out: Path, **options: object) -> Path:
    """`refreshkv train` in a folder of its own; returns the trained model's. A stopped run goes on."""
    where = out / recipe
    options |= {"model": model, "data": out / TRAINING, "out": where, **COMMON, **RECIPES[recipe]}
    line = grids.line_of(options)
    grids.call(["-m", "refreshkv.cli", "train", *line, "--no-evaluate"], where)
    return where / "model"


def measure(model: str, name: str, out: Path, limit: int, processes: int) -> dict[int, Path]:
    """Perplexity of the last tokens at the length of the training and at twice that: length -> run directory."""
    found = {}
    for length in (LENGTH, 2 * LENGTH):
        given = {"model": model, "length": length, "limit": limit, "batch": 8, "budget": BUDGET}
        given["task_option"] = [f"perplexity.scored={SCORED}", f"perplexity.data={out / HELD_OUT}"]
        found[length] = grids.evaluate(
            "continued-pretraining", out, processes, name=f"{name}-{length}", **given
        )
    return found


def table(runs: Mapping[str, Path]) -> str:
    """A row a method: perplexity in each run; what it loses to full attention, in nats a token, and how that shrank.

    Args:
        runs: run directories by name; the others are compared with the first. Intervals are 95 %, and the bootstrap
            draws texts, so both runs and both methods are paired.
    """
    found = {name: _scores(folder) for name, folder in runs.items()}
    first, *others = found
    rows = []
    for method, before in found[first].items():
        cells = [f"{np.exp(of[method].mean()):.3f}" for of in found.values()]
        if method == BASELINE:
            cells += ["", *(_change(found[name][method] - before) for name in others)]
        else:
            lost = {name: of[method] - of[BASELINE] for name, of in found.items()}
            cells += [
                f"{lost[first].mean():+.4f}",
                *(_shrinks(lost[first], lost[n]) for n in others),
            ]
        rows.append([f"`{method}`", *cells])
    texts = len(found[first][BASELINE])
    return markdown([f"{texts} texts", *found, *(f"loss, {name}" for name in found)], rows)


def _scores(folder: Path) -> dict[str, np.ndarray]:
    """Mean loss of each text in nats a token, by method."""
    found: dict[str, dict[str, float]] = {}
    for record in read_results(folder):
        found.setdefault(record["method"], {})[record["example"]] = record["score"]
    return {name: np.array([of[at] for at in sorted(of)]) for name, of in found.items()}


def _change(apart: np.ndarray) -> str:
    """Of full attention itself, in nats a token; below 0 it got better."""
    low, high = interval([apart])
    return f"{apart.mean():+.4f} nats [{low:+.4f}, {high:+.4f}]"


def _shrinks(before: np.ndarray, after: np.ndarray) -> str:
    """The mean loss after, and by what share it fell."""

    def share(old: np.ndarray, new: np.ndarray, axis: int = -1) -> np.ndarray:
        return 1 - new.mean(axis=axis) / old.mean(axis=axis)

    ends = bootstrap(
        (before, after), share, paired=True, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return f"{after.mean():+.4f}, {share(before, after):.0%} [{ends.low:.0%}, {ends.high:.0%}]"
