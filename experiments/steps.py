"""A training planned step by step, on transformers' `Trainer`: which batch, at which rate (ours).

The batch and the rate of a step depend on the recipe and the step alone, so a run that was stopped ends with the same
weights as one that was not (on one kind of device, with one version of the libraries).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer

from experiments.recipe import Phase, Recipe, Stage
from refreshkv.evals.launch import Team
from refreshkv.training import checkpoints
from refreshkv.training.folder import CHECKPOINTS, METRICS, Records, arguments, begin, clear

CLIP = 1.0  # longest gradient of the model
Batch = dict[str, Any]  # arguments of the model


class Step(NamedTuple):
    """One optimiser step: the `index`-th of the `number`-th stage of all; `tokens` have been seen when it is done."""

    phase: Phase
    stage: Stage
    number: int
    index: int
    rate: float
    tokens: int


class Plan(Dataset[Batch]):
    """All steps of all phases, and the batch of each, made when it is asked for."""

    def __init__(self, recipe: Recipe, make: Callable[[np.random.Generator, Stage], Batch]) -> None:
        self.steps: list[Step] = []
        self._seed, self._make = recipe.seed, make
        number = tokens = 0
        for phase in recipe.phases:
            before, tokens_before = len(self.steps), tokens
            for stage in phase.stages:
                for index in range(stage.steps):
                    rate = phase.rate(len(self.steps) - before, tokens - tokens_before)
                    tokens += stage.batch * stage.length
                    self.steps.append(Step(phase, stage, number, index, rate, tokens))
                number += 1

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Batch:
        step = self.steps[index]
        rng = np.random.default_rng([self._seed, step.number, step.index])
        return self._make(rng, step.stage)


class _Trainer(Trainer):
    """Each step has its own rate; the gradient is clipped; what is logged is measured."""

    def __init__(self, *args: Any, measure: Callable[[int], Mapping[str, Any]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._measure, self._norm = measure, torch.zeros(())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Not by a scheduler, whose checkpoint holds the next rate: phases may be added to a run that has ended.
        for group in self.optimizer.param_groups:
            group["lr"] = self.train_dataset.steps[self.state.global_step].rate
        loss = super().training_step(*args, **kwargs)
        # Of the decoder alone: heads that are thrown away must not hold it back.
        self._norm = torch.nn.utils.clip_grad_norm_(self.model.model.parameters(), CLIP)
        return loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        step = self.train_dataset.steps[self.state.global_step - 1]
        logs |= {"grad_norm": float(self._norm), "learning_rate": step.rate}
        logs |= {"phase": step.phase.name, "length": step.stage.length, "tokens": step.tokens}
        super().log(logs | self._measure(step.stage.length), *args, **kwargs)


def train(
    model: PreTrainedModel,
    optimizer: Optimizer,
    recipe: Recipe,
    make: Callable[[np.random.Generator, Stage], Batch],
    measure: Callable[[int], Mapping[str, Any]],
    out: Path,
    *,
    log_every: int,
    save_every: int,
    **facts: Any,
) -> None:
    """Do what is left of a run in the folder `out`, under bf16 autocast. Phases may be added to one that has ended.

    Args:
        model: on its device; trained in place.
        make: a batch for a stage, from random numbers.
        measure: what else a line of `out/metrics.jsonl` says; called with the length of the windows.
        log_every, save_every: steps.
        facts: what decides the weights besides the recipe, as JSON values.

    Raises:
        ValueError: the folder is of another recipe, or its last checkpoint is damaged.
    """
    plan = Plan(recipe, make)
    saved, done = checkpoints.last_whole(out / CHECKPOINTS)
    begun = {step.phase for step in plan.steps[:done]}
    facts |= asdict(recipe)
    facts |= {f"phase {phase['name']}": phase for phase in facts.pop("phases")}
    begin(out, facts, [f"phase {phase.name}" for phase in recipe.phases if phase not in begun])
    clear(out, done)
    given = arguments(
        out,
        device=model.device,
        bfloat16=True,
        per_device_train_batch_size=1,
        max_steps=len(plan),
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=log_every,
        save_steps=save_every,
    )
    trainer = _Trainer(
        model,
        given,
        data_collator=lambda batches: batches[0],
        train_dataset=plan,
        optimizers=(optimizer, None),
        callbacks=[Records(out / METRICS, Team())],
        measure=measure,
    )
    trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
