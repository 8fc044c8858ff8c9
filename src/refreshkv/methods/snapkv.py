"""SnapKV: the last queries of the prompt vote, once, on what stays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Grouped, at_least, odd
from refreshkv.methods.kept import Eviction, Look
from refreshkv.methods.method import Method
from refreshkv.policy.selection import pool, reduce_group


@dataclass(frozen=True, kw_only=True)
class SnapKVSettings(Grouped):
    """Settings of SnapKV.

    Attributes:
        window: the last prompt queries, which vote.
        keep_window: the window's own tokens stay; else they stand for election like all others.
        pool_kernel: odd width of the max-pooling over neighbouring tokens. 1 turns it off.
    """

    window: int = at_least(1, 32)
    keep_window: bool = True
    pool_kernel: int = odd(7)


class SnapKV(Eviction):
    """The window stays, and the best of the tokens before it by the pooled attention that the window gave them."""

    settings: SnapKVSettings
    newcomer = math.inf  # new tokens are newer than the window: they leave last, in their order

    def score_prompt(self, prompt: Look) -> Tensor:
        cache, settings = prompt.cache, self.settings
        assert cache.queries is not None
        scores = reduce_group(prompt.votes(cache.queries), cache.kv_heads, settings.group_reduction)
        first = prompt.length
        if settings.keep_window:
            first = max(0, first - settings.window)
        # Neither the window nor padding (no weight at all) lends its neighbours a score.
        scores = pool(scores[..., :first], settings.pool_kernel) if first else scores[..., :0]
        return F.pad(scores, (0, prompt.length - first), value=math.inf)


_PAPER = 'Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv 2404.14469'

SNAPKV = Method(
    name="snapkv",
    label="SnapKV, window 32",
    source=f"{_PAPER}, listing 1",
    note=(
        "Window 32, summed votes. Ours: one set per KV head by the maximum over its query heads (the paper's code"
        " repeats the keys and selects per query head), max-pooling 7 as in RefreshKV's comparison (the code's default:"
        " average, 5), and K stays fixed while decoding: the lowest-scored entry leaves (the paper only appends)."
    ),
    settings=SnapKVSettings,
    make=SnapKV,
)
SNAPKV_1 = Method(
    name="snapkv-1",
    label="SnapKV, window 1",
    source=f"{_PAPER}; as compared with in RefreshKV, section 4",
    note="The last prompt query alone votes and nothing is forced; equals RefreshKV that never refreshes.",
    settings=SnapKVSettings,
    fixed={"window": 1, "keep_window": False},
    make=SnapKV,
)
