"""H2O: heavy hitters by accumulated attention, and the newest tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import Grouped
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods.kept import Eviction, Look
from refreshkv.methods.method import Method
from refreshkv.policy.selection import reduce_group

# Attention weights of the prompt made at once: larger blocks leave the processor's cache.
_BLOCK = 1 << 21


class H2O(Eviction):
    """K // 2 entries by the attention received so far, the other half the newest. `scores` is `[B, Hq, L]`."""

    sees_prompt = True
    settings: Grouped

    def observe(
        self, cache: LayerCache, queries: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> None:
        super().observe(cache, queries, options, visible)
        length, count = cache.length, queries.shape[2]
        received = queries.new_zeros(*queries.shape[:2], length, dtype=torch.float32)
        if self.scores is not None:
            received[..., : length - count] = self.scores
        for some in queries.split(max(1, _BLOCK // received.numel()), 2):
            count -= some.shape[2]
            end = length - count  # these queries see no later token
            seen = None if visible is None else visible[:, :end]
            look = Look(cache, some[:, :, -1], options, seen, end)
            received[..., :end] += look.votes(some)
        self.scores = received

    def score_prompt(self, prompt: Look) -> Tensor:
        assert self.scores is not None  # since `observe`
        return self.scores

    def ranking(self, look: Look) -> Tensor:
        assert self.scores is not None and look.cache.budget is not None
        heavy = reduce_group(self.scores, look.cache.kv_heads, self.settings.group_reduction)
        positions = torch.arange(heavy.shape[-1], device=heavy.device)
        newest = look.cache.budget - look.cache.budget // 2
        return heavy.masked_fill(positions >= look.length - newest[:, None, None], math.inf)

    def attended(self, now: Look) -> None:
        assert self.scores is not None
        self.scores = self.scores + now.votes(now.query[:, :, None], self.kept)


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
    settings=Grouped,
    make=H2O,
)
