"""TokenSelect: one set of tokens for all heads of a layer, chosen again whenever the query has turned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.methods.kept import KeptEntries, mask_of
from refreshkv.methods.method import Method
from refreshkv.step import Attention, over_heads

# The paper reads 128 first tokens, 2048 chosen ones and the 512 newest.
_READ, _SINKS, _RECENT = 2688, 128, 512


class TokenSelect(KeptEntries):
    """The first tokens, those with the largest sum of all heads' attention, and the newest.

    Attributes:
        query: `[B, Hq * D]`, that of the last choice.
        chosen: `[B, 1, L]` bool, what it chose between the first tokens and the newest.
        asked: `[B]` bool, the rows that chose in this step.
    """

    def __init__(self, config: RefreshConfig, layer: int, layers: int) -> None:
        super().__init__(config, layer, layers)
        self.query: Tensor | None = None
        self.chosen: Tensor | None = None
        self.asked: Tensor | None = None

    def begin(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        self.query = self.chosen = None  # the first step of a prompt chooses

    def choose(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        assert cache.budget is not None
        if visible is None:
            visible = query.new_ones(cache.rows, cache.length, dtype=torch.bool)
        sinks = cache.budget * _SINKS // _READ
        recent = (cache.budget * _RECENT // _READ).clamp(min=1)  # the token being decoded
        first = visible & (visible.cumsum(-1) <= sinks[:, None])
        now = query.flatten(1).float()
        if self.query is None or self.chosen is None or self.config.threshold is None:
            self.asked = torch.ones_like(sinks, dtype=torch.bool)
            self.query, self.chosen = now, torch.zeros_like(first)[:, None]
        else:
            self.asked = F.cosine_similarity(now, self.query) < self.config.threshold
            self.chosen = F.pad(self.chosen, (0, 1))
        if bool(self.asked.any()):
            scores, _ = cache.backend.score(
                query,
                cache.store.keys,
                **attention.options(over_heads(visible)),
                reduction="mean",
            )
            found = cache.backend.select(
                scores.sum(1, keepdim=True),
                cache.budget - sinks - recent,
                pool_kernel=1,
                visible=visible & ~first & ~_newest(cache, recent),
            )
            asked = self.asked[:, None]
            self.chosen = torch.where(asked[..., None], mask_of(found, cache.length), self.chosen)
            self.query = torch.where(asked, now, self.query)
        # A short text has fewer to choose: more of the newest have room.
        room = cache.budget - sinks - self.chosen.sum((1, 2))
        kept = self.chosen | (first | visible & _newest(cache, room))[:, None]
        return kept.expand(-1, cache.kv_heads, -1)

    def overhead(self, cache: LayerCache) -> Tensor | int:
        """Choosing reads the keys, which are half of an entry."""
        assert self.asked is not None and cache.hidden is not None
        return self.asked * ((cache.length - cache.hidden + 1) // 2)

    def crop(self, length: int) -> None:
        self.query = self.chosen = None


def _newest(cache: LayerCache, counts: Tensor) -> Tensor:
    """`[B, L]` bool: the newest `counts` `[B]` places."""
    places = torch.arange(cache.length, device=counts.device)
    return places >= cache.length - counts[:, None]


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
    settings={"threshold": 0.9},
    uses=("budget", "threshold"),
    make=TokenSelect,
)
