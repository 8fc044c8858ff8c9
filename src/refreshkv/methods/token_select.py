"""TokenSelect: one set of tokens for all heads of a layer, chosen again whenever the query has turned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Budgeted, cosine
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method

# The paper reads 128 first tokens, 2048 chosen ones and the 512 newest.
_READ, _SINKS, _RECENT = 2688, 128, 512


@dataclass(frozen=True, kw_only=True)
class TokenSelectSettings(Budgeted):
    """Settings of TokenSelect.

    Attributes:
        threshold: a step chooses again where the query's cosine to that of the last choice is below this (paper: 0.9).
            `None` chooses in every step.
    """

    threshold: float | None = cosine(0.9, "to choose in every step")


class TokenSelect(KeptEntries):
    """The first tokens, those with the largest sum of all heads' attention, and the newest.

    Attributes:
        query: `[B, Hq * D]`, that of the last choice.
        chosen: `[B, 1, L]` bool, what it chose between the first tokens and the newest.
        asked: `[B]` bool, the rows that chose in this step.
    """

    settings: TokenSelectSettings
    query: Tensor | None = None
    chosen: Tensor | None = None
    asked: Tensor | None = None

    def choose(self, now: Look) -> Tensor:
        budget, threshold = now.cache.budget, self.settings.threshold
        query = now.query.flatten(1).float()
        assert budget is not None
        sinks = budget * _SINKS // _READ
        recent = (budget * _RECENT // _READ).clamp(min=1)  # the token being decoded
        first = now.seen & (now.seen.cumsum(-1) <= sinks[:, None])
        if self.query is None or self.chosen is None or threshold is None:
            self.asked = torch.ones_like(sinks, dtype=torch.bool)
            self.query, self.chosen = query, torch.zeros_like(first)[:, None]
        else:
            self.asked = F.cosine_similarity(query, self.query) < threshold
            self.chosen = F.pad(self.chosen, (0, 1))
        if bool(self.asked.any()):
            scores = now.scores("mean").sum(1, keepdim=True)
            between = now.seen & ~first & ~_newest(now, recent)
            chosen = now.best(scores, budget - sinks - recent, visible=between)
            asked = self.asked[:, None]
            self.chosen = torch.where(asked[..., None], chosen, self.chosen)
            self.query = torch.where(asked, query, self.query)
        # A short text has fewer to choose: more of the newest have room.
        room = budget - sinks - self.chosen.sum((1, 2))
        kept = self.chosen | (first | now.seen & _newest(now, room))[:, None]
        return kept.expand(-1, now.cache.kv_heads, -1)

    def overhead(self, now: Look) -> Tensor | int:
        """Choosing reads the keys, which are half of an entry."""
        assert self.asked is not None
        return self.asked * ((now.tokens + 1) // 2)


def _newest(now: Look, counts: Tensor) -> Tensor:
    """`[B, L]` bool: the newest `counts` `[B]` tokens."""
    return torch.arange(now.length, device=counts.device) >= now.length - counts[:, None]


METHOD = Method(
    name="token-select",
    label="TokenSelect",
    source=(
        'Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic'
        ' Token-Level KV Cache Selection", EMNLP 2025, arXiv 2411.02886'
    ),
    note=(
        "One set a layer by the sum of all heads' attention, chosen again when the cosine to the query of the last"
        " choice falls below 0.9; sinks, chosen and newest tokens in the paper's proportions (128 : 2048 : 512) within"
        " K. Choosing reads the keys, counted as half of every entry."
    ),
    settings=TokenSelectSettings,
    make=TokenSelect,
)
