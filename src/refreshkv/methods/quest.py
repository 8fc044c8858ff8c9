"""Quest: every step reads the pages whose keys could match the query best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Grouped, at_least
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method
from refreshkv.policy.selection import reduce_group


@dataclass(frozen=True, kw_only=True)
class QuestSettings(Grouped):
    """Settings of Quest.

    Attributes:
        page_size: tokens of a page (paper's code: 16).
    """

    page_size: int = at_least(1, 16)


class Quest(KeptEntries):
    """Pages of visible tokens, the last page always among those read.

    Attributes:
        low, high: `[B, Hkv, P, D]`, the least and greatest key of each page, per dimension; infinite in an empty page.
    """

    settings: QuestSettings
    low: Tensor | None = None
    high: Tensor | None = None

    def choose(self, now: Look) -> Tensor:
        cache, size = now.cache, self.settings.page_size
        assert cache.budget is not None
        page = ((now.seen.cumsum(-1) - 1) // size).clamp(min=0)  # [B, L]
        new = slice(-1, None) if self.low is not None else slice(None)
        self._bound(now.keys[:, :, new], page[:, new], now.seen[:, new])
        bounds = reduce_group(self.bounds(now.query), cache.kv_heads, self.settings.group_reduction)
        bounds = bounds.scatter(-1, page[:, None, -1:].expand(-1, cache.kv_heads, -1), math.inf)
        # Lowest first, so that the best pages stand at the end; at a tie the later.
        pages = torch.arange(bounds.shape[-1], device=bounds.device)
        wanted = (cache.budget + size - 1) // size
        among_best = (pages >= bounds.shape[-1] - wanted[:, None, None]).expand_as(bounds)
        read = torch.zeros_like(among_best).scatter(
            -1, bounds.argsort(dim=-1, stable=True), among_best
        )
        return read.gather(-1, page[:, None].expand(-1, cache.kv_heads, -1)) & now.seen[:, None]

    def overhead(self, now: Look) -> Tensor | int:
        size = self.settings.page_size
        return (now.tokens + size - 1) // size  # two vectors, as one entry has

    def bounds(self, query: Tensor) -> Tensor:
        """No key of a page has a greater product with the query `[B, Hq, D]`. `[B, Hq, P]`; -inf for an empty page."""
        assert self.low is not None and self.high is not None
        grouped = query.float().unflatten(1, (self.low.shape[1], -1))
        empty = self.low[..., 0].isinf()[:, :, None]
        low, high = (
            bound.float().nan_to_num(posinf=0, neginf=0).transpose(-1, -2)
            for bound in (self.low, self.high)
        )
        # A positive component of the query is largest with the greatest key, a negative one with the least.
        products = grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low
        return products.masked_fill(empty, -math.inf).flatten(1, 2)

    def _bound(self, keys: Tensor, page: Tensor, visible: Tensor) -> None:
        """Tokens `[B, Hkv, n, D]` enter their pages `[B, n]`."""
        pages = int(page.max()) + 1
        if self.low is None or self.high is None:
            self.low = keys.new_full((*keys.shape[:2], pages, keys.shape[-1]), math.inf)
            self.high = -self.low
        room = (0, 0, 0, max(0, pages - self.low.shape[2]))
        padding = ~visible[:, None, :, None]
        index = page[:, None, :, None].expand_as(keys)
        self.low = F.pad(self.low, room, value=math.inf).scatter_reduce(
            2, index, keys.masked_fill(padding, math.inf), "amin"
        )
        self.high = F.pad(self.high, room, value=-math.inf).scatter_reduce(
            2, index, keys.masked_fill(padding, -math.inf), "amax"
        )


METHOD = Method(
    name="quest",
    label="Quest, pages of 16",
    source=(
        'Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024,'
        " arXiv 2406.10774, algorithm 1"
    ),
    note=(
        "ceil(K / 16) pages of 16, the last one (with the new token) always among them, as in the paper's code. Ours:"
        " every layer has the same K, where the paper leaves the first two dense; one set per KV head, by the maximum"
        " over its query heads. The bounds of a page count as one entry read."
    ),
    settings=QuestSettings,
    make=Quest,
)
