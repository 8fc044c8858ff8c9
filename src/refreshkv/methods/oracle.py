"""The oracle: the K entries that this very query weighs most. No method does better with K by attention mass."""

from __future__ import annotations

from torch import Tensor

from refreshkv.config import Grouped
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method


class Oracle(KeptEntries):
    """Exact top-K of every step and KV head."""

    settings: Grouped

    def choose(self, now: Look) -> Tensor:
        return now.best(now.scores(self.settings.group_reduction))


METHOD = Method(
    name="oracle-topk",
    label="oracle top-K",
    source="ours: the upper bound for a budget",
    note="By the maximum over a group's query heads, without pooling. Counts K entries; finding them reads every key.",
    settings=Grouped,
    make=Oracle,
)
