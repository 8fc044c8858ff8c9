"""The oracle: the K entries that this very query weighs most. No method does better with K by attention mass."""

from __future__ import annotations

from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.methods.kept import KeptEntries, mask_of
from refreshkv.methods.method import Method
from refreshkv.step import Attention, over_heads


class Oracle(KeptEntries):
    """Exact top-K of every step and KV head."""

    def choose(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        scores, _ = cache.backend.score(
            query,
            cache.store.keys,
            **attention.options(over_heads(visible)),
            reduction=self.config.group_reduction,
        )
        selection = cache.backend.select(scores, cache.budget, pool_kernel=1, visible=visible)
        return mask_of(selection, cache.length)


METHOD = Method(
    name="oracle-topk",
    label="oracle top-K",
    source="ours: the upper bound for a budget",
    note="By the maximum over a group's query heads, without pooling. Counts K entries; finding them reads every key.",
    uses=("budget", "group_reduction"),
    make=Oracle,
)
