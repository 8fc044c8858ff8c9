"""Train the bundled model: `python -m experiments train --out DIR` (ours).

About 45 minutes on one CPU core. The result is an ordinary Llama folder, `DIR/model`; `DIR/metrics.jsonl` is the log.
How a stopped run goes on is said in `steps`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from experiments import steps
from experiments.objective import Pupil, teacher_forced
from experiments.recipe import RECIPES, Recipe, Stage, llama_config
from experiments.structured_start import structured_start
from experiments.windows import SUBJECTS, make_batch
from refreshkv.config import unknown
from refreshkv.demo.tokenizer import build_backend, save_tokenizer
from refreshkv.training.folder import MODEL

HELD_OUT_WINDOWS = 4  # of each subject


def train(
    recipe: Recipe, out: Path, device: str | None = None, log_every: int = 20, save_every: int = 100
) -> Path:
    """Run `recipe` in the folder `out` (resuming what is there); returns the model's folder."""
    torch.manual_seed(recipe.seed)
    model = Pupil(llama_config(recipe), recipe.look_ahead, recipe.look_ahead_weight)
    structured_start(model, recipe.seed)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = build_backend()
    newline = tokenizer.encode("\n", add_special_tokens=False).ids[0]

    def make(rng: np.random.Generator, stage: Stage, gaps: bool = True) -> dict[str, Tensor]:
        batch = make_batch(rng, tokenizer, stage, gaps)
        arrays = {"input_ids": batch.tokens, "answer": batch.answer, "positions": batch.positions}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def lines_right(length: int) -> dict[str, Any]:
        """Share of whole lines right per task, gold tokens fed, on windows never trained on."""
        shares = {}
        for task in SUBJECTS:
            rng = np.random.default_rng([recipe.seed, 10**6, length])
            mix = tuple(float(task == name) for name in SUBJECTS)
            batch = make(rng, Stage(length, HELD_OUT_WINDOWS, 1, mix), gaps=False)
            shown = [part.to(model.device) for part in batch.values()]
            if not shown[1].any():  # too short for a question of this kind
                continue
            with torch.autocast(model.device.type, torch.bfloat16):
                shares[task] = round(teacher_forced(model, *shown, newline), 3)
        return {"lines_right": shares}

    how = {"log_every": log_every, "save_every": save_every}
    steps.train(model, _optimizer(model, recipe), recipe, make, lines_right, out, **how)
    _export(model, out / MODEL)
    return out / MODEL


def _optimizer(model: Pupil, recipe: Recipe) -> torch.optim.AdamW:
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, weight in model.named_parameters():
        (decayed if weight.ndim == 2 and "embed" not in name else free).append(weight)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=recipe.betas, fused=True)


def _export(model: Pupil, folder: Path) -> None:
    """Write the model as an ordinary Llama folder: bf16 weights, no look-ahead heads, and the tokenizer."""
    config = model.config
    plain = LlamaForCausalLM(config)
    plain.model.load_state_dict(model.model.state_dict())
    plain.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    plain.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


def run(
    out: Path, *, recipe: str = "full", seed: int = 0, threads: int = 1, device: str | None = None
) -> None:
    """Train the bundled model, about 45 minutes on one CPU core; an interrupted run goes on.

    Args:
        out: folder for log, checkpoints and model.
        recipe: full, or smoke for three steps of a narrow model.
        seed: of data and weights.
        threads: of the CPU.
        device: cuda if there is one, else cpu.
    """
    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, RECIPES))
    torch.set_num_threads(threads)
    print(f"model written to {train(replace(RECIPES[recipe], seed=seed), out, device)}")
