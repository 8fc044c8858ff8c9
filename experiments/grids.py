"""The runs that docs/evaluation.md and docs/fidelity.md report, as data, and what makes them again (ours)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import recall, tables, text_model
from refreshkv.training.evaluation import METHODS

_ORDINARY = (
    "full",
    "oracle-topk",
    "quest",
    "token-select",
    "refreshkv:budget=0.0625:confidence=0.9",
)
_LOSSY = ("refreshkv-lse-drop", "refreshkv-paper")
_TRIO = ("full", "refreshkv:budget=0.0625:confidence=0.9", "refreshkv-lse-drop")
# The mixed mode, and its cheaper setting.
_MIXED = ("refreshkv-fast", "refreshkv-fast:budget=0.03:skip=0.1")
_MIXED_DRAFTS = "drafter=mixed:budget=0.03:skip=0.1"
_DRAFTS = tuple(f"refreshkv:draft={most}:confidence=0.9" for most in (2, 4, 8, 16, 32))
_SURE = tuple(f"refreshkv:confidence={least}" for least in (0.5, 0.3, 0.1, 0.0))
_COPIES = ("int4-keys:budget=0.0625", "int2-keys:budget=0.0625")
# The neighbours of RefreshKV that evict, search, or make the prompt sparse.
_NEIGHBOURS = ("kascade", "squeezed", "hip", "citrus", "cascading", "subgen", "critiprefill")
_THREE = "chain-of-key,html-to-tsv,key-value"


def _fixed(*strides: int) -> tuple[str, ...]:
    return tuple(f"refreshkv-fixed:stride={stride}" for stride in strides)


_DEMO_4096: Mapping[str, Any] = {
    "tasks": "chain-of-key,html-to-tsv",
    "length": 4096,
    "dtype": "bfloat16",
    "batch": 8,
}
# Options of `refreshkv eval`, by the name of the run's directory.
RUNS: Mapping[str, Mapping[str, Any]] = {
    "demo-4096-free": _DEMO_4096
    | {
        "methods": (
            *(*_ORDINARY, *_LOSSY, "refreshkv-paper:stride=10", *_fixed(2, 5, 10)),
            *("no-full-attention", "no-reselection", "no-refresh"),
            *("snapkv-1", "snapkv", "pyramidkv", "h2o", "tova", "streaming-llm"),
            *_NEIGHBOURS,
        ),
    },
    "demo-4096-forced": _DEMO_4096
    | {
        "mode": "forced",
        "methods": (
            *("full", *_LOSSY, "refreshkv-paper:stride=10", "refreshkv-paper:threshold=0.5"),
            *(*_fixed(5, 6, 7), "no-full-attention", "no-refresh"),
        ),
    },
    "fidelity-2048": {
        "tasks": _THREE,
        "length": 2048,
        "limit": 200,
        "batch": 20,
        "methods": (
            *(*_TRIO, "refreshkv-paper", "refreshkv-paper:stride=1:threshold=0.5"),
            *("refreshkv-paper:stride=1:threshold=0.3", "snapkv", "quest", "token-select"),
            "oracle-topk",
        ),
    },
    "mixed-2048": {
        "tasks": _THREE,
        "length": 2048,
        "limit": 200,
        "batch": 20,
        "methods": ("full", *_MIXED),
    },
    "drafters-2048": {
        "tasks": _THREE,
        "length": 2048,
        "limit": 40,
        "batch": 20,
        "methods": (
            *("full", _TRIO[1], "refreshkv:budget=0.0625:confidence=0.5"),
            *(f"refreshkv:{_MIXED_DRAFTS}:confidence={least}" for least in (0.9, 0.5)),
        ),
    },
    "breadth-1024": {
        "tasks": "breadth",
        "length": 1024,
        "limit": 12,
        "batch": 12,
        "methods": (
            *("full", "refreshkv:budget=0.25:confidence=0.9", _TRIO[1]),
            *("refreshkv:budget=0.03125:confidence=0.9", *_LOSSY),
        ),
    },
    "rounded-2048": {
        "tasks": _THREE,
        "length": 2048,
        "limit": 20,
        "batch": 20,
        "methods": ("full", *_COPIES),
    },
    "drafts-2048": {
        "tasks": _THREE,
        "length": 2048,
        "limit": 10,
        "batch": 10,
        "methods": ("full", *_DRAFTS, "refreshkv:confidence=0.5", "refreshkv:confidence=0.3"),
    },
    "breadth-2048": {"tasks": "breadth", "length": 2048, "limit": 1, "methods": _TRIO},
    "breadth-4096": {"tasks": "breadth", "length": 4096, "limit": 1, "methods": _TRIO},
    "text-2048": {
        "tasks": "perplexity",
        "length": 2048,
        "limit": 24,
        "batch": 8,
        "methods": (
            *("full", *_LOSSY, "snapkv", "streaming-llm", "oracle-topk:budget=0.0625", *_COPIES),
        ),
    },
    # Of natural text, on any model (experiments/real.py): lengths and texts are given there.
    "text": {
        "tasks": "perplexity",
        "dtype": "bfloat16",
        "methods": (*("full", *_MIXED, *_LOSSY, "snapkv", "kivi-4", "kivi-2"),),
    },
    # The form of the paper's Table 5 (experiments/continued.py).
    "continued-pretraining": {"tasks": "perplexity", "dtype": "float32", "methods": METHODS},
    "continued": {
        "tasks": "continuation",
        "dtype": "float32",
        "methods": (
            *("full", "refreshkv:confidence=0.9", "refreshkv:confidence=0.5"),
            *(f"refreshkv:{_MIXED_DRAFTS}:confidence={least}" for least in (0.5, 0.3)),
        ),
    },
}


def evaluate(run: str, out: Path, processes: int, *, name: str | None = None, **more: Any) -> Path:
    """Make or go on with a run of `RUNS` in `out`, with `more` options; returns its directory.

    Args:
        name: of the directory; that of the run where not given.
        more: as `line_of` takes them.

    Raises:
        ValueError: it ended with an error, which it has said itself.
    """
    where = out / (name or run)
    options = {"device": "cpu", "model": "demo", **RUNS[run], **more, "out": where}
    command, environment = ["-m", "refreshkv.cli", "eval", *line_of(options)], {}
    if processes > 1:  # otherwise it has all threads
        command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *command]
        environment["OMP_NUM_THREADS"] = "1"
    call(command, where, environment)
    return where


def line_of(options: Mapping[str, Any]) -> list[str]:
    """Options on a command line: a tuple is joined with commas, the values of a list are given one by one."""
    line = []
    for option, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            text = ",".join(each) if isinstance(each, tuple) else str(each)
            line += [f"--{option.replace('_', '-')}", text]
    return line


def call(arguments: Sequence[str], where: Path, environment: Mapping[str, str] = {}) -> None:
    """Run Python with arguments. Raises `ValueError`, with the run's directory `where`, if it ends with an error."""
    try:
        subprocess.run([sys.executable, *arguments], check=True, env={**os.environ, **environment})
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"the run {where} ended with exit code {error.returncode}; its reason stands above"
        ) from None


def report(*, limit: int = 16, out: Path = Path("out"), processes: int = 2) -> None:
    """Evaluate every method on the bundled model: about 25 minutes on two cores.

    Args:
        limit: prompts a task; a higher one goes on from there.
        out: where the run directories are.
        processes: at once.
    """
    for run in ("demo-4096-free", "demo-4096-forced"):
        evaluate(run, out, processes, limit=limit)


def fidelity(*, out: Path = Path("out"), processes: int = 2) -> None:
    """The lossless mode and the lossy ones, 200 prompts a task, then a few of many kinds: about an hour.

    Args:
        out: where the run directories and the plots are.
        processes: at once.
    """
    names = ("mixed-2048", "drafters-2048", "fidelity-2048", "breadth-1024")
    runs = tuple(evaluate(run, out, processes) for run in names)
    tables.show(runs, plots_in=out / "plots")


def fidelity_wide(*, out: Path = Path("out"), processes: int = 2) -> None:
    """The shorter tables of docs/fidelity.md: small copies of the keys, drafts, longer prompts, recall.

    Args:
        out: where the run directories are.
        processes: at once.
    """
    wide = ("rounded-2048", "drafts-2048", "breadth-2048", "breadth-4096")
    tables.show(tuple(evaluate(run, out, processes) for run in wide))
    recall.show(limit=4)


def fidelity_text(
    *, minutes: float = 20, out: Path = Path("out"), limit: int = 24, processes: int = 1
) -> None:
    """Train the text model, then its perplexity and what methods make of its texts: about 40 minutes.

    Args:
        minutes: of training.
        out: where model and run directory are.
        limit: documents.
        processes: at once.
    """
    text_model.run(out=out / "text", minutes=minutes)
    model, data = str(out / "text" / "model"), str(out / "text" / "held-out")
    option = f"perplexity.data={data}"
    perplexity = evaluate("text-2048", out, processes, model=model, limit=limit, task_option=option)
    continued = ["continuation.scored=128", f"continuation.data={data}"]
    given = {"model": model, "limit": limit, "batch": 8, "length": 1800, "task_option": continued}
    given["methods"] = ("full", "refreshkv:confidence=0.9", *_SURE)
    tables.show((perplexity, evaluate("continued", out, processes, **given)))
