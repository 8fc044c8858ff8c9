"""H2O: heavy hitters by accumulated attention, and the newest tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.methods.kept import Eviction, prompt_weights, weights
from refreshkv.methods.method import Method
from refreshkv.policy.selection import reduce_group
from refreshkv.step import Attention

_BLOCK = (
    1 << 21
)  # attention weights of the prompt made at once: larger blocks leave the processor's cache


class H2O(Eviction):
    """K // 2 entries by the attention received so far, the other half the newest. `scores` is `[B, Hq, L]`."""

    sees_prompt = True

    def observe(
        self, cache: LayerCache, queries: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        super().observe(cache, queries, attention, visible)
        length, count = cache.length, queries.shape[2]
        keys = cache.store.keys.float()
        received = queries.new_zeros(*queries.shape[:2], length, dtype=torch.float32)
        if self.scores is not None:
            received[..., : length - count] = self.scores
        block = max(1, _BLOCK // received.numel())
        for first in range(0, count, block):
            some = queries[:, :, first : first + block]
            end = length - count + first + some.shape[2]  # these queries see no later token
            seen = None if visible is None else visible[:, :end]
            received[..., :end] += prompt_weights(some, keys[:, :, :end], attention, seen).sum(2)
        self.scores = received

    def score_prompt(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        assert self.scores is not None  # since `observe`
        return self.scores

    def ranking(self, cache: LayerCache, tokens: int) -> Tensor:
        assert self.scores is not None and cache.budget is not None
        heavy = reduce_group(self.scores, cache.kv_heads, self.config.group_reduction)
        places = torch.arange(heavy.shape[-1], device=heavy.device)
        newest = tokens - (cache.budget - cache.budget // 2)[:, None, None]
        return heavy.masked_fill(places >= newest, math.inf)

    def step(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        output = super().step(cache, query, attention, visible)
        assert self.kept is not None and self.scores is not None
        received = weights(query[:, :, None], cache.store.keys, attention, self.kept[:, :, None])
        self.scores = self.scores + received[:, :, 0]
        return output


METHOD = Method(
    name="h2o",
    label="H2O",
    source=(
        'Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",'
        " NeurIPS 2023, arXiv 2306.14048, algorithm 1"
    ),
    note=(
        "K/2 heavy hitters and K/2 newest. Every query of the prompt counts, then every step over what it attended to."
        " The paper has one set per head; ours, one per KV head, ranks by the maximum over its query heads."
    ),
    uses=("budget", "group_reduction"),
    make=H2O,
)
