"""CItruS: the prompt passes in chunks, and after each one the instruction's queries say what stays of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from refreshkv.config import Budgeted, at_least
from refreshkv.methods.kept import Eviction, Look
from refreshkv.methods.method import Method


@dataclass(frozen=True, kw_only=True)
class CItruSSettings(Budgeted):
    """Settings of CItruS.

    Attributes:
        chunk: tokens that pass at once, and stay until the next ones have (paper: 256).
        window: the last prompt tokens, which stand for the instruction; they stay.
    """

    chunk: int = at_least(1, 256)
    window: int = at_least(1, 32)


class CItruS(Eviction):
    """One set per layer: the instruction, and of the tokens before it what outlasted chunk after chunk.

    The tokens of a chunk stand against those that are left of the chunks before them once the next chunk has come; K
    without the instruction are left each time.
    """

    settings: CItruSSettings
    newcomer = math.inf  # what is newer than the instruction leaves last, in its order

    def score_prompt(self, prompt: Look) -> Tensor:
        budget, window = prompt.cache.budget, self.settings.window
        assert budget is not None
        place = torch.arange(prompt.length, device=budget.device)
        before = prompt.seen & (place < prompt.length - window)
        chunk = ((before.cumsum(-1) - 1) // self.settings.chunk).masked_fill(~before, -1)
        room, last = (budget - window).clamp(min=0), chunk.amax(-1)
        left = chunk == 0
        scores = self._received(prompt, left, before)
        for number in range(1, int(last.max()) + 2):
            # A row whose chunks have all passed chooses once more, and then no more.
            chooses = (number <= last + 1)[:, None]
            scores = self._received(prompt, left, before).where(chooses, scores)
            chosen = prompt.best(scores[:, None], room, visible=left)[:, 0]
            left = (chosen | (chunk == number)).where(chooses, left)
        # What is gone ranks below whatever is left.
        scores = scores.clamp(min=torch.finfo(scores.dtype).tiny).masked_fill(~left, 0.0)
        scores = scores.masked_fill(~before, self.newcomer)
        return scores[:, None].expand(-1, prompt.cache.kv_heads, -1)

    @staticmethod
    def _received(prompt: Look, left: Tensor, before: Tensor) -> Tensor:
        """`[B, L]`: what the instruction's queries give in the mean, over the tokens of `left` and their own."""
        queries, own = prompt.cache.queries, prompt.seen & ~before
        assert queries is not None
        return prompt.votes(queries, (left | own)[:, None]).mean(1)


METHOD = Method(
    name="citrus",
    label="CItruS",
    source=(
        'Bai et al., "CItruS: Chunked Instruction-aware State Eviction for Long Sequence Modeling", EMNLP 2024,'
        " arXiv 2406.12018, the single cache"
    ),
    note=(
        "Chunks of 256; the mean over heads and instruction queries; one set per layer: the paper. The last 32 prompt"
        " tokens stand for the instruction, and their queries are those of the end of the prompt, by full attention"
        " (the paper runs the instruction after every chunk, over what is left). In the paper the newest chunk comes on"
        " top of K; here K holds once the prompt has passed, the instruction inside, and stays while decoding."
    ),
    settings=CItruSSettings,
    make=CItruS,
)
