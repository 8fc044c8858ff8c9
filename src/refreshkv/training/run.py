"""A training run on transformers' `Trainer`: the objective's loss, metrics, checkpoints that survive a kill.

A run's folder holds `recipe.json`, `data/`, `metrics.jsonl`, `checkpoints/` and, at the end, `model/`, an ordinary
model in safetensors with its card. The same call goes on where it was stopped, bit for bit on the same machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer

from refreshkv.evals.encoding import positions_in
from refreshkv.evals.launch import Team
from refreshkv.training import checkpoints
from refreshkv.training.card import card
from refreshkv.training.data import ABOUT, Collator, Sequences, prepare
from refreshkv.training.folder import (
    CHECKPOINTS,
    METRICS,
    MODEL,
    Records,
    arguments,
    begin,
    clear,
    disk_full_is_said,
)
from refreshkv.training.objective import PartialTail, tail_losses
from refreshkv.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA = "data"


class TailTrainer(Trainer):
    """`Trainer` with the loss of a tail; its logs tell the two parts apart, in nats a token."""

    def __init__(self, *args: Any, tail: int, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        self._tail = tail
        # Sums of losses, and of how many tokens, of both parts; while it trains and while it validates.
        self._sums = {mode: torch.zeros(4, device=self.args.device) for mode in (True, False)}

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The mean over the tokens of an optimiser step, where their number is told."""
        # Nothing predicts the first token, so any will do in its place.
        losses = tail_losses(outputs.logits, labels.clamp(min=0), self._tail)
        parts = torch.stack([losses.first, losses.tail]).detach().float()
        counts = parts.new_tensor([losses.first_tokens, losses.tail_tokens])
        self._sums[self.model.training] += torch.cat([parts, counts])
        return (
            losses.mean
            if num_items_in_batch is None
            else (losses.first + losses.tail) / num_items_in_batch
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `Trainer.log`."""
        for prefix, training in (("", True), ("eval_", False)):
            if f"{prefix}loss" in logs:
                total = self.accelerator.reduce(self._sums[training].clone(), "sum").tolist()
                self._sums[training].zero_()
                for part, name in enumerate(("first", "tail")):
                    logs[f"{prefix}{name}_loss"] = total[part] / max(total[part + 2], 1)
        super().log(logs, *args, **kwargs)


class Run:
    """A checked run in the folder `out`, with its data ready; `train` it.

    Args:
        model: with its weights in float32.
        team: the processes of a launch.
        bfloat16: compute in it, under autocast; the weights stay as they are.
        checkpointing: compute activations a second time instead of keeping them.
        optimizer: a name that `TrainingArguments` knows; `None`: AdamW in 8 bits (the paper's) where there are a GPU
            and bitsandbytes, else in 32.
        log_every, save_every: optimiser steps. Validation comes with each checkpoint, of which two are kept.
        validate: sequences that it reads at most.

    Raises:
        ValueError: sequences longer than the model's positions, data or an optimiser that will not do, a folder made
            with another recipe, or a checkpoint that is damaged.
        UnsupportedModelError: see `PartialTail`.
        OSError: the disk is full.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        out: Path,
        *,
        team: Team | None = None,
        bfloat16: bool = False,
        checkpointing: bool = False,
        optimizer: str | None = None,
        log_every: int = 10,
        save_every: int = 100,
        validate: int = 256,
    ) -> None:
        self.model, self.tokenizer, self.recipe, self.out = model, tokenizer, recipe, out
        self.team = team = Team() if team is None else team
        width, positions = recipe.length + recipe.tail, positions_in(model)
        if positions is not None and width > positions:
            raise ValueError(
                f"sequences of {recipe.length} + {recipe.tail} tokens, but the model has {positions} positions: lower"
                " --length"
            )
        PartialTail(model, recipe.of_tail())  # it may refuse
        if recipe.lora is not None:
            try:
                importlib.import_module("peft")
            except ModuleNotFoundError as error:
                raise ValueError("--lora needs peft: pip install peft, or leave it out") from error
        self.facts = {**recipe.described(), "bfloat16": bfloat16}
        self.facts["optimizer"] = optimizer = optimizer or _optimizer(model)
        self.facts |= {"processes": team.size, "parameters": model.num_parameters()}
        self._arguments = arguments(
            out,
            device=model.device,
            bfloat16=bfloat16,
            per_device_train_batch_size=recipe.micro_batch,
            per_device_eval_batch_size=recipe.micro_batch,
            gradient_accumulation_steps=recipe.accumulation(team.size),
            learning_rate=recipe.rate,
            lr_scheduler_type="linear",
            warmup_steps=recipe.warmup,
            weight_decay=0.0,
            optim=optimizer,
            num_train_epochs=recipe.epochs,
            max_steps=-1 if recipe.steps is None else recipe.steps,
            logging_steps=log_every,
            eval_strategy="steps",
            eval_steps=save_every,
            prediction_loss_only=True,
            save_strategy="steps",
            save_steps=save_every,
            seed=recipe.seed,
        )
        try:
            Trainer.get_optimizer_cls_and_kwargs(self._arguments, model)
        except ImportError as error:
            raise ValueError(f"--optimizer {optimizer} cannot be used: {error}") from error
        self._checkpointing, self._validate = checkpointing, validate
        with disk_full_is_said(out):
            if team.is_main:
                # A recipe binds once something was made by it; a wrong path to the data can be mended.
                begin(out, self.facts, changeable=() if (out / DATA).exists() else self.facts)
                prepare(recipe, tokenizer, out / DATA)
            team.wait()
            self._resume, self.done = checkpoints.last_whole(out / CHECKPOINTS)

    def train(self, progress: Callable[[int, int], None] | None = None) -> Path:
        """Do what is left; returns the folder of the trained model.

        Args:
            progress: called with the steps that are done, and all.

        Raises:
            OSError: the disk is full; the last whole checkpoint is intact.
            RunError: a loss that is not finite.
        """
        recipe, out, team = self.recipe, self.out, self.team
        width = recipe.length + recipe.tail
        with disk_full_is_said(out):
            team.wait()
            if team.is_main:
                clear(out, self.done)
            team.wait()
            self._arguments.eval_on_start = self._resume is None
            if self._checkpointing:
                older = self.model.gradient_checkpointing_enable  # its name before 5.23
                getattr(self.model, "activation_checkpointing_enable", older)()
            model = _with_adapters(self.model, recipe, self._checkpointing)
            trainer = TailTrainer(
                model=model,
                args=self._arguments,
                data_collator=Collator(recipe),
                train_dataset=Sequences(out / DATA / "training.bin", width),
                eval_dataset=Sequences(out / DATA / "validation.bin", width, self._validate),
                tail=recipe.tail,
                callbacks=[Records(out / METRICS, team, progress)],
            )
            trainer.remove_callback(PrinterCallback)
            with PartialTail(model, recipe.of_tail()):
                trainer.train(
                    resume_from_checkpoint=None if self._resume is None else str(self._resume)
                )
            return self._finish(trainer)

    def _finish(self, trainer: TailTrainer) -> Path:
        """The trained model as an ordinary folder, written aside and then renamed."""
        team, aside, final = self.team, self.out / f"{MODEL}.tmp", self.out / MODEL
        if team.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        team.wait()
        if self.recipe.lora is None:
            trainer.save_model(str(aside))
        elif team.is_main:
            whole = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            whole.save_pretrained(aside)
        team.wait()
        if team.is_main:
            data = json.loads((self.out / DATA / ABOUT).read_text())
            self.tokenizer.save_pretrained(aside)
            (aside / "README.md").write_text(card(self.facts, data, trainer.state.log_history))
            # A pickle, and recipe.json says it all.
            (aside / "training_args.bin").unlink(missing_ok=True)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
        team.wait()
        return final


def _optimizer(model: PreTrainedModel) -> str:
    eight_bits = model.device.type == "cuda" and importlib.util.find_spec("bitsandbytes")
    return "adamw_8bit" if eight_bits else "adamw_torch"


def _with_adapters(model: PreTrainedModel, recipe: Recipe, checkpointing: bool) -> Any:
    """The model, or adapters around it."""
    if recipe.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    if checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(recipe.seed)  # of the adapters' first values
    return get_peft_model(
        model, LoraConfig(r=recipe.lora, lora_alpha=2 * recipe.lora, target_modules="all-linear")
    )
