"""Train the bundled model: `python -m experiments train --out DIR` (ours).

About 45 minutes on one CPU core. The result is an ordinary Llama folder, `DIR/model`. After each
stage of the recipe `DIR/checkpoint.pt` is replaced; started again with the same `--out`, a run goes
on after the last finished stage and ends with the same weights as an uninterrupted one. Data and
weights depend on the seed only (on one kind of device and with one version of the libraries).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from experiments.objective import LookAhead, hidden_states, next_token_loss, teacher_forced
from experiments.recipe import RECIPES, Phase, Recipe, Stage, llama_config
from experiments.structured_start import structured_start
from experiments.windows import SUBJECTS, Batch, make_batch
from refreshkv.config import unknown
from refreshkv.demo.tokenizer import build_backend, save_tokenizer

CHECKPOINT = "checkpoint.pt"
LOG = "training_log.jsonl"


class Trainer:
    """One training run: model, auxiliary heads, optimiser, and what has been done so far."""

    def __init__(self, recipe: Recipe, out: Path, device: str, log_every: int = 20) -> None:
        self.recipe, self.out, self.device, self.log_every = recipe, out, device, log_every
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(llama_config(recipe))
        structured_start(self.model, recipe.seed)
        self.look_ahead = LookAhead(recipe.hidden_size, recipe.look_ahead)
        self.model.to(device)
        self.look_ahead.to(device)
        self.tokenizer = build_backend()
        self.newline = self.tokenizer.encode("\n", add_special_tokens=False).ids[0]
        self.optimizer = self._make_optimizer()
        self.stages_done, self.step, self.tokens, self.seconds = 0, 0, 0, 0.0

    def _make_optimizer(self) -> torch.optim.AdamW:
        decayed: list[Tensor] = []
        free: list[Tensor] = []
        for name, weight in [*self.model.named_parameters(), *self.look_ahead.named_parameters()]:
            (decayed if weight.ndim == 2 and "embed" not in name else free).append(weight)
        groups = [
            {"params": decayed, "weight_decay": self.recipe.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=self.recipe.betas, fused=True)

    def run(self, stages: int | None = None) -> None:
        """Do what is left of the first `stages` stages (default: all), checkpointing after each."""
        plan = self.recipe.stages()[:stages]
        for number in range(self.stages_done, len(plan)):
            phase, index, stage = plan[number]
            self._run_stage(number, phase, index, stage)
            self.stages_done = number + 1
            self.save_checkpoint()

    def _run_stage(self, number: int, phase: Phase, index: int, stage: Stage) -> None:
        begun = time.perf_counter()
        steps_before = sum(s.steps for s in phase.stages[:index])
        tokens_before = sum(s.tokens for s in phase.stages[:index])
        losses: list[float] = []
        for i in range(stage.steps):
            rate = phase.rate(steps_before + i, tokens_before + i * stage.batch * stage.length)
            # A generator a step: a resumed run draws the same windows as an uninterrupted one.
            rng = np.random.default_rng([self.recipe.seed, number, i])
            batch = make_batch(rng, self.tokenizer, stage)
            losses.append(self._step(batch, rate))
            self.step += 1
            self.tokens += stage.batch * stage.length
            if (i + 1) % self.log_every == 0 or i + 1 == stage.steps:
                mean_loss = float(np.mean(losses[-self.log_every :]))
                seconds = self.seconds + time.perf_counter() - begun
                self._log(phase, stage, rate, mean_loss, seconds)
        self.seconds += time.perf_counter() - begun

    def _step(self, batch: Batch, rate: float) -> float:
        """One optimiser step; the next-token loss (nats a token) before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, answer, positions = self._tensors(batch)
        with torch.autocast(self.device, torch.bfloat16):
            hidden = hidden_states(self.model, tokens[:, :-1], positions)
            loss = next_token_loss(self.model, hidden, tokens, answer)
            extra = self.look_ahead.loss(self.model, hidden, tokens, answer)
        (loss + self.recipe.look_ahead_weight * extra).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _log(self, phase: Phase, stage: Stage, rate: float, loss: float, seconds: float) -> None:
        """Append one JSON line to the log and print it."""
        record = {
            "step": self.step,
            "phase": phase.name,
            "length": stage.length,
            "tokens": self.tokens,
            "loss": round(loss, 4),
            "rate": round(rate, 6),
            "seconds": round(seconds, 1),
            "lines_right": self._held_out(stage),
        }
        log_line(self.out / LOG, record)

    def _held_out(self, stage: Stage, windows: int = 4) -> dict[str, float]:
        """Share of whole lines right per task, gold tokens fed, on windows never trained on."""
        shares = {}
        for task in SUBJECTS:
            rng = np.random.default_rng([self.recipe.seed, 10**6, stage.length])
            mix = tuple(float(task == name) for name in SUBJECTS)
            shown = Stage(stage.length, windows, 1, mix)
            batch = make_batch(rng, self.tokenizer, shown, gaps=False)
            if not batch.answer.any():  # too short for a question of this kind
                continue
            with torch.autocast(self.device, torch.bfloat16):
                shares[task] = teacher_forced(self.model, *self._tensors(batch), self.newline)
        return {task: round(share, 3) for task, share in shares.items()}

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        arrays = (batch.tokens, batch.answer, batch.positions)
        tokens, answer, positions = (torch.from_numpy(a).to(self.device) for a in arrays)
        return tokens, answer, positions

    def save_checkpoint(self) -> None:
        """Replace `checkpoint.pt` (written aside first, so that a crash leaves the old one)."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "look_ahead": self.look_ahead.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": (self.stages_done, self.step, self.tokens, self.seconds),
        }
        aside = self.out / (CHECKPOINT + ".tmp")
        torch.save(state, aside)
        os.replace(aside, self.out / CHECKPOINT)

    def load_checkpoint(self) -> None:
        """Go on from `checkpoint.pt`; `ValueError` if another recipe or seed led to it.

        What a recipe says about stages still to come may have changed.
        """
        state = torch.load(self.out / CHECKPOINT, map_location=self.device, weights_only=True)
        done = state["done"][0]
        if _decided_by(state["recipe"], done) != _decided_by(asdict(self.recipe), done):
            raise ValueError(f"{self.out / CHECKPOINT} was made by another recipe or seed")
        self.model.load_state_dict(state["model"])
        self.look_ahead.load_state_dict(state["look_ahead"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stages_done, self.step, self.tokens, self.seconds = state["done"]
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop log lines after the checkpoint: their steps will be done again."""
        log = self.out / LOG
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def export(self, folder: Path) -> None:
        """Write the model as an ordinary Llama folder: bf16 weights and tokenizer."""
        from transformers import GenerationConfig

        folder.mkdir(parents=True, exist_ok=True)
        config = self.model.config
        model = LlamaForCausalLM(config)
        model.load_state_dict(self.model.state_dict())
        model.generation_config = GenerationConfig(
            do_sample=False,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(folder)


def _decided_by(recipe: dict[str, Any], stages: int) -> tuple[dict[str, Any], list[Any]]:
    """What of a recipe (as a dict) decides the weights after so many stages.

    The learning rate of a stage depends on its whole phase, so a phase that was begun counts whole.
    """
    phases: list[Any] = []
    for phase in recipe["phases"]:
        if stages > 0:
            phases.append(phase)
        stages -= len(phase["stages"])
    return {name: value for name, value in recipe.items() if name != "phases"}, phases


def log_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line to a log and print it."""
    line = json.dumps(record)
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")


def train(recipe: Recipe, out: Path, device: str | None = None, log_every: int = 20) -> Path:
    """Run `recipe` in the folder `out` (resuming what is there); returns the model's folder."""
    out.mkdir(parents=True, exist_ok=True)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(recipe, out, device, log_every)
    if (out / CHECKPOINT).exists():
        trainer.load_checkpoint()
    else:
        (out / LOG).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    trainer.run()
    trainer.export(out / "model")
    return out / "model"


def run(
    out: Path, *, recipe: str = "full", seed: int = 0, threads: int = 1, device: str | None = None
) -> None:
    """Train the bundled model, about 45 minutes on one CPU core; an interrupted run goes on.

    Args:
        out: folder for log, checkpoint and model.
        recipe: full, or smoke for three steps of a narrow model.
        seed: of data and weights.
        threads: of the CPU.
        device: cuda if there is one, else cpu.
    """
    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, RECIPES))
    torch.set_num_threads(threads)
    print(f"model written to {train(replace(RECIPES[recipe], seed=seed), out, device)}")
