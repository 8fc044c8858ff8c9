"""What the bundled model is and in which order it is trained (ours); no tensors here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refreshkv.demo import tokenizer as tk

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps on batches of `batch` windows of `length` positions.

    `mix` weighs what is taught (in the order of `windows.SUBJECTS`); `context_share` bounds the part of a
    window that is context; `single_keys` is the share of key-value questions that ask for one key.
    """

    length: int
    batch: int
    steps: int
    mix: tuple[float, ...] = (1, 1, 2)
    context_share: tuple[float, float] = (0.4, 0.92)
    single_keys: float = 0.0

    @property
    def tokens(self) -> int:
        """Positions seen in the stage."""
        return self.length * self.batch * self.steps


@dataclass(frozen=True)
class Phase:
    """Stages that share one learning-rate curve: warm-up, `peak_rate`, linear cool-down.

    The cool-down takes the last `cool_share` of the phase's tokens, down to 3 % of the peak. It is
    essential: before it, lines that are right token by token are not yet right as a whole.
    """

    name: str
    stages: tuple[Stage, ...]
    peak_rate: float
    cool_share: float
    warmup_steps: int = 30

    def rate(self, step: int, tokens: int) -> float:
        """Learning rate at `step` of the phase, `tokens` positions after its start."""
        left = 1.0 - tokens / sum(stage.tokens for stage in self.stages)
        cool = min(1.0, left / self.cool_share) if self.cool_share else 1.0
        return self.peak_rate * min(1.0, (step + 1) / self.warmup_steps) * max(0.03, cool)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, besides library versions and the device."""

    phases: tuple[Phase, ...]
    seed: int = 0
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 4
    look_ahead: int = 4  # auxiliary heads predict up to this many tokens ahead
    look_ahead_weight: float = 0.4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)


FULL = Recipe(
    phases=(
        Phase(
            "learn",
            (
                Stage(192, 16, 60, mix=(1, 1, 1)),
                Stage(320, 12, 260),
                # Going from one key asked for to the next is learned last, one key after the
                # other: many short windows with little context and many questions.
                Stage(256, 15, 320, mix=(1, 1, 8), context_share=(0.3, 0.5)),
            ),
            peak_rate=1.5e-3,
            cool_share=0.0,
        ),
        Phase(
            "lengthen",
            (
                Stage(512, 8, 120, mix=(1, 1, 1)),
                Stage(1024, 4, 200, mix=(1, 1, 1)),
                Stage(2048, 2, 250, mix=(1, 1, 1)),
            ),
            peak_rate=1.5e-3,
            cool_share=0.35,
        ),
        Phase(
            "settle",
            (
                Stage(512, 8, 80, mix=(1, 1, 1, 5)),
                Stage(2048, 2, 300, mix=(1, 1, 1, 0.6)),
                Stage(4096, 1, 200, mix=(1, 1, 1, 0.6)),
            ),
            peak_rate=1.0e-3,
            cool_share=0.7,
        ),
        Phase(
            "needles",
            # Going from the key asked for to its code: many questions on short contexts, as above.
            (Stage(512, 8, 250, mix=(1, 1, 1, 6), context_share=(0.45, 0.6)),),
            peak_rate=1.2e-3,
            cool_share=0.0,
        ),
        Phase(
            "polish",  # all lengths again
            (
                Stage(512, 8, 60, mix=(1.5, 1, 1.5, 0.7)),
                Stage(1024, 4, 90, mix=(1.5, 1, 1.5, 0.7)),
                Stage(2048, 2, 100, mix=(1.5, 1, 1.5, 0.7)),
                Stage(4096, 1, 200, mix=(1.5, 1, 1.5, 0.7)),
            ),
            peak_rate=0.8e-3,
            cool_share=0.8,
        ),
        Phase(
            "finish",
            # Single keys, which were rarely asked for so far; the rest so that nothing is lost.
            (
                Stage(512, 8, 50, mix=(1, 1, 2, 0.7), single_keys=0.5),
                Stage(1024, 4, 70, mix=(1, 1, 2, 0.7), single_keys=0.5),
                Stage(2048, 2, 100, mix=(1, 1, 2, 0.7), single_keys=0.5),
                Stage(4096, 1, 100, mix=(1, 1, 2, 0.7), single_keys=0.5),
            ),
            peak_rate=0.6e-3,
            cool_share=0.9,
        ),
        Phase(
            "tables",
            # At 4,096 tokens rows with dates, whose n-grams repeat, lost their place.
            (
                Stage(2048, 2, 50, mix=(1, 5, 1, 0.5), single_keys=0.5),
                Stage(4096, 1, 130, mix=(1, 5, 1, 0.5), single_keys=0.5),
            ),
            peak_rate=0.6e-3,
            cool_share=0.9,
        ),
        Phase(
            "together",
            # Tables and several keys at full length at once: a phase for one cost the other 2 %.
            (
                Stage(2048, 2, 60, mix=(1, 3, 3, 0.5), single_keys=0.3),
                Stage(4096, 1, 240, mix=(1, 3, 3, 0.5), single_keys=0.3),
            ),
            peak_rate=0.6e-3,
            cool_share=0.9,
        ),
    )
)

# Three steps of a narrow model: enough to test the machinery, not to learn anything.
SMOKE = Recipe(
    phases=(Phase("smoke", (Stage(192, 2, 2), Stage(256, 2, 1)), 1e-3, 0.5, warmup_steps=1),),
    hidden_size=128,
    intermediate_size=64,
    layers=3,
)

RECIPES = {"full": FULL, "smoke": SMOKE}


def llama_config(recipe: Recipe) -> LlamaConfig:
    """The transformers configuration of the model: 4 query heads over 2 KV heads of 64."""
    from transformers import LlamaConfig

    special = {
        f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos"))
    }  # as `tokenizer.build_backend` numbers them
    return LlamaConfig(
        vocab_size=tk.VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=tk.MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **special,
    )
