"""SnapKV: the last queries of the prompt vote, once, on what stays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.methods.kept import Eviction, prompt_weights
from refreshkv.methods.method import Method
from refreshkv.policy.selection import pool, reduce_group
from refreshkv.step import Attention


class SnapKV(Eviction):
    """The window stays, and the best of the tokens before it by the pooled attention that the window gave them.

    With `keep_window=False` the window's tokens stand for election like all others.
    """

    newcomer = math.inf  # new tokens are newer than the window: they leave last, in their order

    sees_prompt = True

    def __init__(
        self,
        config: RefreshConfig,
        layer: int,
        layers: int,
        *,
        window: int = 32,
        keep_window: bool = True,
    ) -> None:
        super().__init__(config, layer, layers)
        self.window = window
        self.keep_window = keep_window
        self.queries: Tensor | None = None  # [B, Hq, T <= window, D], the last of the prompt

    def observe(
        self, cache: LayerCache, queries: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        super().observe(cache, queries, attention, visible)
        last = queries[:, :, -self.window :]
        if self.queries is not None:
            last = torch.cat([self.queries, last], 2)[:, :, -self.window :]
        self.queries = last.detach().clone()

    def score_prompt(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        assert self.queries is not None
        prompt = cache.length - 1
        keys = cache.store.keys[:, :, :prompt]
        votes = prompt_weights(self.queries, keys, attention, visible).sum(2)
        self.queries = None
        scores = reduce_group(votes, cache.kv_heads, self.config.group_reduction)
        first = max(0, prompt - self.window) if self.keep_window else prompt
        # Neither the window nor padding (no weight at all) lends its neighbours a score.
        scores = pool(scores[..., :first], self.config.pool_kernel) if first else scores[..., :0]
        return torch.nn.functional.pad(scores, (0, prompt - first), value=math.inf)


_PAPER = 'Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv 2404.14469'
USES = ("budget", "group_reduction", "pool_kernel")

SNAPKV = Method(
    name="snapkv",
    label="SnapKV, window 32",
    source=f"{_PAPER}, listing 1",
    note=(
        "Window 32, summed votes. Ours: one set per KV head by the maximum over its query heads (the paper's code"
        " repeats the keys and selects per query head), max-pooling 7 as in RefreshKV's comparison (the code's default:"
        " average, 5), and K stays fixed while decoding: the lowest-scored entry leaves (the paper only appends)."
    ),
    uses=USES,
    make=SnapKV,
)
SNAPKV_1 = Method(
    name="snapkv-1",
    label="SnapKV, window 1",
    source=f"{_PAPER}; as compared with in RefreshKV, section 4",
    note="The last prompt query alone votes and nothing is forced; equals RefreshKV that never refreshes.",
    uses=USES,
    make=lambda config, layer, layers: SnapKV(config, layer, layers, window=1, keep_window=False),
)
