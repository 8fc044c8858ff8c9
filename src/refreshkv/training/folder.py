"""The folder of a training on transformers' `Trainer`: recipe, metrics, checkpoints, and how a run goes on in it.

It holds `recipe.json`, `metrics.jsonl`, `checkpoints/` and what the run itself adds.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from refreshkv.evals.launch import Team
from refreshkv.evals.store import RunError
from refreshkv.evals.summary import write_whole
from refreshkv.text import reason
from refreshkv.training import checkpoints

RECIPE, METRICS, CHECKPOINTS, MODEL = "recipe.json", "metrics.jsonl", "checkpoints", "model"
_FULL = os.strerror(errno.ENOSPC)


def begin(out: Path, facts: Mapping[str, Any], changeable: Collection[str] = ()) -> None:
    """Write the recipe of a new run, or see that the folder is of the same.

    Args:
        facts: JSON values that decide what is trained.
        changeable: names among them whose values nothing depends on yet.

    Raises:
        ValueError: the folder is of another recipe, or something else, or cannot be made.
    """
    path = out / RECIPE
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in json.loads(json.dumps(facts)).items():
            if before.get(name) != value and name not in changeable:
                raise ValueError(
                    f"'{out}' holds a run with {name} {before.get(name)}, not {value}: use another --out, or the same"
                    " settings to go on"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"'{out}' is something else than a training run: use another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise ValueError(f"'{out}' cannot be made ({reason(error)}): use another --out") from error
    write_whole(path, (json.dumps(facts, indent=2) + "\n").encode())


def clear(out: Path, done: int) -> None:
    """Drop what a stopped run has left of steps after the `done`, which will be done again."""
    checkpoints.drop_unfinished(out / CHECKPOINTS)
    path = out / METRICS
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if done and line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= done]
        write_whole(path, "".join(kept).encode())


def arguments(out: Path, *, device: torch.device, bfloat16: bool, **more: Any) -> TrainingArguments:
    """What all runs have in common, and `more`. One process uses one GPU, however many there are."""
    made = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        bf16=bfloat16,
        use_cpu=device.type != "cuda",
        save_total_limit=2,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        logging_nan_inf_filter=False,
        dataloader_pin_memory=device.type == "cuda",
        **more,
    )
    # `Trainer` would spread a batch over all GPUs by DataParallel, and make it so many times as large.
    made._n_gpu = min(made.n_gpu, 1)
    return made


class Records(TrainerCallback):
    """A line of metrics a log, and the mark that a checkpoint is whole. Written by the main process."""

    def __init__(
        self, path: Path, team: Team, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._path, self._team, self._progress = path, team, progress
        self._begun = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """See `TrainerCallback`."""
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(
                    f"{name} is {value} at step {state.global_step}: give another --out and a lower --rate"
                )
        if self._team.is_main:
            seconds = round(time.perf_counter() - self._begun, 2)
            line = json.dumps({"step": state.global_step, **logs, "seconds": seconds})
            with self._path.open("a") as file:
                file.write(line + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See `TrainerCallback`."""
        if self._progress is not None and self._team.is_main:
            self._progress(state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See `TrainerCallback`."""
        self._team.wait()
        if self._team.is_main:
            checkpoints.mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")


@contextmanager
def disk_full_is_said(out: Path) -> Iterator[None]:
    """safetensors and torch have errors of their own for it; here it is an `OSError`."""
    try:
        yield
    except Exception as error:
        if _FULL in str(error) and not isinstance(error, OSError):
            raise OSError(errno.ENOSPC, _FULL, str(out)) from error
        raise
