"""What the comparison methods share: attention over a set of kept entries per (row, KV head).

They are simulations of quality. The full store stays, the entries that a method would not read are masked, and what it
would read is counted; so the time of a step says nothing about the method. All have the same K, the budget of the
prompt's visible tokens, and the token being decoded counts inside K. Padding is never kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import Budgeted, Reduction
from refreshkv.kernels.options import AttendOptions, Entries, over_heads
from refreshkv.policy.selection import FREE, Selected, rank_keys
from refreshkv.step import Algorithm, count_again


@dataclass(frozen=True)
class Look:
    """How a query looks at the tokens up to its own. All that the methods ask of a store and its kernels is here.

    Attributes:
        cache: the layer; after a prompt, its store holds one token more.
        query: `[B, Hq, D]`, that of the last of the tokens.
        options: scale, softcap and sinks of the model.
        visible: `[B, L]` bool, False for padding; `None` when there is none.
        length: L, how many tokens there are.
    """

    cache: LayerCache
    query: Tensor
    options: AttendOptions
    visible: Tensor | None
    length: int

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, L, D]`."""
        return self.cache.store.dense()[0][:, :, : self.length]

    @property
    def seen(self) -> Tensor:
        """`visible`, whether there is padding or not."""
        if self.visible is not None:
            return self.visible
        return self.query.new_ones(self.cache.rows, self.length, dtype=torch.bool)

    @property
    def tokens(self) -> Tensor:
        """`[B]`, the visible tokens of each row."""
        assert self.cache.hidden is not None
        return self.length - self.cache.hidden

    def attend(self, kept: Tensor) -> Tensor:
        """`[B, Hq, D]`: attention over the entries of `kept` `[B, Hkv, L]` bool."""
        return self.cache.store.attend(self.query, self._over(kept)).output

    def scores(
        self, reduction: Reduction, *, keys: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """`[B, Hkv, L]` float32: the attention that each token, or each of `kept` `[B, Hkv, L]`, receives.

        `keys` `[B, Hkv, L, D]`: instead of the layer's own.
        """
        mask, store = over_heads(self.visible) if kept is None else kept, self.cache.store
        options = self._over(mask, reduction)
        if keys is None:
            return store.score(self.query, options).scores[..., : self.length]
        return store.backend.score(self.query, Entries(keys), options).scores

    def votes(self, queries: Tensor, kept: Tensor | None = None) -> Tensor:
        """The same from the newest T tokens, per query head: `[B, Hq, L]` float32, summed; NaN counts as 0.

        Each of the `queries` `[B, Hq, T, D]` sees no later token than its own.
        """
        starts = torch.full((len(queries),), self.length - queries.shape[2], device=queries.device)
        options = self._over(over_heads(self.visible) if kept is None else kept)

        def received(member: Tensor, options: AttendOptions) -> Tensor:
            votes = self.cache.store.vote(member, options, starts=starts)
            return votes.scores[..., : self.length]

        return self._by_query_head(queries, options, received).nan_to_num_(0.0) * queries.shape[2]

    def weights(self, keys: Tensor) -> Tensor:
        """`[B, Hq, L]` float32: the weights of each query head over `keys` `[B, Hkv, L, D]`; NaN counts as 0."""
        backend, options = self.cache.store.backend, self.options.over(over_heads(self.visible))

        def received(member: Tensor, options: AttendOptions) -> Tensor:
            return backend.score(member, Entries(keys), options).scores

        return self._by_query_head(self.query, options, received).nan_to_num_(0.0)

    def best(self, scores: Tensor, budget: Tensor | None = None, **options: Any) -> Tensor:
        """`[B, Hkv, L]` bool: the K tokens with the best `scores` `[B, Hkv, L]`; see `selection.select`."""
        budget = self.cache.budget if budget is None else budget
        options = {"pool_kernel": 1, "visible": self.visible, **options}
        return mask_of(self.cache.store.backend.select(scores, budget, **options), self.length)

    def _by_query_head(
        self,
        queries: Tensor,
        options: AttendOptions,
        received: Callable[[Tensor, AttendOptions], Tensor],
    ) -> Tensor:
        """`[B, Hq, L]`, from a kernel that gives a score per KV head: one query head of every group at a time."""
        groups, sinks = (self.cache.kv_heads, -1), options.sinks
        members = queries.unflatten(1, groups).unbind(2)
        own = [None] * len(members) if sinks is None else sinks.unflatten(0, groups).unbind(1)
        each = [received(m, replace(options, sinks=s)) for m, s in zip(members, own, strict=True)]
        return torch.stack(each, 2).flatten(1, 2)

    def _over(self, mask: Tensor | None, reduction: Reduction | None = None) -> AttendOptions:
        """The options for the tokens of `mask` `[B, Hkv or 1, L]` bool, `None` for all, and none after them."""
        if mask is None and self.length < self.cache.store.width:
            mask = self.seen[:, None]
        if mask is not None:
            mask = F.pad(mask, (0, self.cache.store.width - self.length))
        return self.options.over(mask, reduction=reduction)


class KeptEntries(Algorithm, ABC):
    """Attends, in every step, to the entries that `choose` names. Every tensor it keeps has rows first.

    Args:
        settings: those of the method.
        layer: which of the served layers this is, from 0.
        layers: how many layers are served.
    """

    def __init__(self, settings: Budgeted, layer: int, layers: int) -> None:
        self.settings = settings
        self.layer = layer
        self.layers = layers

    @abstractmethod
    def choose(self, now: Look) -> Tensor:
        """`[B, Hkv, L]` bool: the entries to attend to."""

    def begin(self, prompt: Look) -> None:
        """A prompt has ended, and K is known. What is kept of the one before goes."""
        self.reset()

    def attend(self, now: Look, kept: Tensor) -> Tensor:
        """`[B, Hq, D]`: attention over what was chosen."""
        return now.attend(kept)

    def attended(self, now: Look) -> None:
        """A step is over."""

    def overhead(self, now: Look) -> Tensor | int:
        """Entries that choosing reads per KV head, `[B]`."""
        return 0

    def step(
        self, cache: LayerCache, query: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> Tensor:
        if cache.waiting is not None:
            assert cache.prompt is not None and cache.queries is not None
            cache.resolve_budget(visible, cache.prompt)
            last, prompt = cache.queries[:, :, -1], None if visible is None else visible[:, :-1]
            self.begin(Look(cache, last, options, prompt, cache.length - 1))
            cache.waiting = None
        elif cache.hidden is None:
            count_again(cache, visible)
        now = Look(cache, query, options, visible, cache.length)
        kept = self.choose(now)
        output = self.attend(now, kept)
        if cache.watch is not None:
            positions = torch.arange(cache.length, device=query.device).where(kept, FREE)
            cache.watch(cache, query, options, visible, positions)
        cache.stats.record(
            cache.index,
            kv_heads=cache.kv_heads,
            entry_bytes=cache.store.entry_bytes,
            full=0,
            steps=cache.rows * cache.kv_heads,
            read=kept.sum((1, 2)) + self.overhead(now) * cache.kv_heads,
            available=now.tokens * cache.kv_heads,
        )
        self.attended(now)
        return output

    def crop(self, length: int) -> None:
        self.reset()

    def take_rows(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.index_select(0, rows))

    def reset(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, None)


class Evicting(KeptEntries, ABC):
    """What is not kept is gone for good.

    Attributes:
        kept: `[B, Hkv, L]` bool; `None` before the first step.
    """

    kept: Tensor | None = None

    def observe(
        self, cache: LayerCache, queries: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> None:
        if self.kept is not None:
            raise RuntimeError(
                f"{type(self).__name__} has evicted entries, and another prompt, or a draft to verify, would see them"
                " all: use a new cache for every prompt"
            )
        super().observe(cache, queries, options, visible)

    def crop(self, length: int) -> None:
        raise RuntimeError(f"{type(self).__name__} cannot take tokens back: use a new cache")


class Eviction(Evicting):
    """K entries stay: the new token enters, the lowest-ranked entry leaves.

    Ties go to the later token. A row with fewer tokens than K loses none.

    Attributes:
        scores: `[B, H, L]` float32, non-negative; H is whatever `ranking` makes Hkv heads of.
        newcomer: the score of a token that has just entered.
    """

    scores: Tensor | None = None
    newcomer = 0.0

    @abstractmethod
    def score_prompt(self, prompt: Look) -> Tensor:
        """`scores` of the prompt's tokens."""

    def ranking(self, look: Look) -> Tensor:
        """`[B, Hkv, L]`, or without the token that enters: the lowest leaves."""
        assert self.scores is not None
        return self.scores

    def begin(self, prompt: Look) -> None:
        self.scores = self.score_prompt(prompt)
        self.kept = prompt.best(self.ranking(prompt))

    def choose(self, now: Look) -> Tensor:
        assert self.kept is not None and self.scores is not None and now.cache.budget is not None
        ranks = rank_keys(self.ranking(now)).masked_fill(~self.kept, torch.iinfo(torch.int64).max)
        lowest = ranks.argmin(-1, keepdim=True)
        has_room = self.kept.sum(-1, keepdim=True) < now.cache.budget[:, None, None]
        kept = self.kept.scatter(-1, lowest, self.kept.gather(-1, lowest) & has_room)
        self.kept = F.pad(kept, (0, 1), value=True)
        self.scores = F.pad(self.scores, (0, 1), value=self.newcomer)
        return self.kept


def mask_of(selection: Selected, length: int) -> Tensor:
    """The positions of a selection as a mask `[B, Hkv, length]`."""
    positions = selection.positions
    mask = positions.new_zeros(*positions.shape[:2], length + 1, dtype=torch.bool)
    # Free slots all mark one column too many.
    return mask.scatter_(-1, positions.where(positions >= 0, length).long(), True)[..., :length]
