"""What the comparison methods share: attention over a set of kept entries per (row, KV head).

They are simulations of quality. The full store stays, the entries that a method would not read are masked, and what it
would read is counted; so the time of a step says nothing about the method. All have the same K, the budget of the
prompt's visible tokens, and the token being decoded counts inside K. Padding is never kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.policy.selection import FREE, Selection, rank_keys
from refreshkv.step import Algorithm, Attention, count_again


class KeptEntries(Algorithm, ABC):
    """Attends, in every step, to the entries that `choose` names. Every tensor it keeps has rows first.

    Args:
        config: the settings.
        layer: which of the served layers this is, from 0.
        layers: how many layers are served.
    """

    def __init__(self, config: RefreshConfig, layer: int, layers: int) -> None:
        self.config = config
        self.layer = layer
        self.layers = layers

    @abstractmethod
    def choose(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        """`[B, Hkv, L]` bool: the entries to attend to; arguments as for `step`."""

    def begin(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        """A prompt has ended with `query` `[B, Hq, D]` and K is known; the store holds one token more.

        `visible` `[B, L - 1]`: that of the prompt.
        """

    def overhead(self, cache: LayerCache) -> Tensor | int:
        """Entries that choosing reads per KV head, `[B]`."""
        return 0

    def step(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        if cache.pending is not None:
            prompt = None if visible is None else visible[:, :-1]
            cache.resolve_budget(prompt, cache.length - 1)
            self.begin(cache, cache.pending[:, :, -1], attention, prompt)
            cache.pending = None
        elif cache.hidden is None:
            count_again(cache, visible)
        kept = self.choose(cache, query, attention, visible)
        output = cache.backend.attend(
            query, cache.store.keys, cache.store.values, **attention.options(kept)
        ).output
        if cache.watch is not None:
            positions = torch.arange(cache.length, device=query.device).where(kept, FREE)
            cache.watch(cache, query, attention, visible, positions)
        assert cache.hidden is not None
        cache.stats.record(
            cache.index,
            kv_heads=cache.kv_heads,
            entry_bytes=cache.store.entry_bytes,
            full=0,
            steps=cache.rows * cache.kv_heads,
            read=kept.sum((1, 2)) + self.overhead(cache) * cache.kv_heads,
            available=(cache.length - cache.hidden) * cache.kv_heads,
        )
        return output

    def take_rows(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.index_select(0, rows))

    def reset(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, None)


class Eviction(KeptEntries):
    """K entries stay, the others are gone for good: the new token enters, the lowest-ranked entry leaves.

    Ties go to the later token. A row with fewer tokens than K loses none.

    Attributes:
        kept: `[B, Hkv, L]` bool.
        scores: `[B, H, L]` float32, non-negative; H is whatever `ranking` makes Hkv heads of.
        newcomer: the score of a token that has just entered.
    """

    newcomer = 0.0

    def __init__(self, config: RefreshConfig, layer: int, layers: int) -> None:
        super().__init__(config, layer, layers)
        self.kept: Tensor | None = None
        self.scores: Tensor | None = None

    @abstractmethod
    def score_prompt(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        """`scores` of the prompt's tokens; arguments as for `begin`."""

    def ranking(self, cache: LayerCache, tokens: int) -> Tensor:
        """`[B, Hkv, L]`: the lowest leaves. `tokens`: how long the text is, the entering token included."""
        assert self.scores is not None
        return self.scores

    def begin(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        self.scores = self.score_prompt(cache, query, attention, visible)
        prompt = cache.length - 1
        ranking = self.ranking(cache, prompt)
        selection = cache.backend.select(ranking, cache.budget, pool_kernel=1, visible=visible)
        self.kept = mask_of(selection, prompt)

    def choose(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        assert self.kept is not None and self.scores is not None and cache.budget is not None
        ranks = rank_keys(self.ranking(cache, cache.length))
        lowest = ranks.masked_fill(~self.kept, torch.iinfo(ranks.dtype).max).argmin(
            -1, keepdim=True
        )
        has_room = self.kept.sum(-1, keepdim=True) < cache.budget[:, None, None]
        kept = self.kept.scatter(-1, lowest, self.kept.gather(-1, lowest) & has_room)
        self.kept = F.pad(kept, (0, 1), value=True)
        self.scores = F.pad(self.scores, (0, 1), value=self.newcomer)
        return self.kept

    def observe(
        self, cache: LayerCache, queries: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        if self.kept is not None:
            raise RuntimeError(
                f"{type(self).__name__} has evicted entries, and another prompt, or a draft to verify, would see them"
                " all: use a new cache for every prompt"
            )
        super().observe(cache, queries, attention, visible)

    def crop(self, length: int) -> None:
        raise RuntimeError(f"{type(self).__name__} cannot take tokens back: use a new cache")


def mask_of(selection: Selection, length: int) -> Tensor:
    """The positions of a selection as a mask `[B, Hkv, length]`."""
    positions = selection.positions
    mask = positions.new_zeros(*positions.shape[:2], length + 1, dtype=torch.bool)
    # Free slots all mark one column too many.
    return mask.scatter_(-1, positions.where(positions >= 0, length), True)[..., :length]


def weights(queries: Tensor, keys: Tensor, attention: Attention, visible: Tensor) -> Tensor:
    """Attention weights of several queries, in float32.

    Args:
        queries: `[B, Hq, T, D]`.
        keys: `[B, Hkv, L, D]`.
        attention: scale, softcap, sinks.
        visible: bool, broadcasts to `[B, Hkv, T, L]`.

    Returns:
        `[B, Hq, T, L]`; 0 where a query sees nothing.
    """
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, T, D]
    logits = grouped.flatten(2, 3) @ keys.float().transpose(-1, -2) * attention.scale
    if attention.softcap is not None:
        logits = torch.tanh(logits / attention.softcap) * attention.softcap
    logits = logits.unflatten(2, grouped.shape[2:4]).masked_fill(
        ~visible[:, :, None], float("-inf")
    )
    received = logits.softmax(-1).nan_to_num_(0.0)
    if (
        attention.sinks is not None
    ):  # what is left beside the sink: exp(lse) / (exp(lse) + exp(sink))
        sinks = attention.sinks.float().unflatten(0, (keys.shape[1], -1))[..., None, None]
        received *= torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sinks)
    return received.flatten(1, 2)


def prompt_weights(
    queries: Tensor, keys: Tensor, attention: Attention, visible: Tensor | None
) -> Tensor:
    """Causal attention weights of the newest T tokens, `[B, Hq, T, L]`; 0 for queries that are padding.

    `queries` `[B, Hq, T, D]`, `keys` `[B, Hkv, L, D]`, `visible` `[B, L]`.
    """
    count, length = queries.shape[2], keys.shape[2]
    places = torch.arange(length, device=keys.device)
    seen = (places <= places[length - count :, None])[None]
    if visible is not None:
        seen = seen & visible[:, None] & visible[:, length - count :, None]
    return weights(queries, keys, attention, seen[:, None])
