"""What the tests of runs share: a recipe, its model, and what a run has written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from refreshkv import RefreshConfig
from refreshkv.training.recipe import Recipe

LENGTH, TAIL = 40, 8
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "length": LENGTH,
    "tail": TAIL,
    "config": RefreshConfig(budget=6, stride=None),
    "batch": 4,
    "micro_batch": 2,
    "rate": 1e-2,
    "warmup": 2,
    "steps": 6,
}
# The same on the command line.
OPTIONS: list[Any] = ["--length", LENGTH, "--tail", TAIL, "--budget", 6, "--batch", 4]
OPTIONS += ["--micro-batch", 2, "--rate", 1e-2, "--warmup", 2, "--steps", 6]
OFTEN: list[Any] = ["--log-every", 1, "--save-every", 2, "--device", "cpu"]


def recipe(documents: Path, **changes: Any) -> Recipe:
    return Recipe(**{**SETTINGS, "data": str(documents), **changes})


def model_of(tiny: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def metrics(out: Path) -> list[dict[str, float]]:
    """What does not depend on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


class Killed(BaseException):
    pass
