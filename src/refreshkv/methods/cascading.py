"""The cascading KV cache: a row of sub-caches, each of which takes on half as much of what the one before lets go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import Grouped, at_least, setting
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods.kept import Evicting, Look
from refreshkv.methods.method import Method

_GONE = -1


@dataclass(frozen=True, kw_only=True)
class CascadingSettings(Grouped):
    """Settings of the cascading KV cache.

    Attributes:
        sinks: the first tokens, which stay (paper: 64); a quarter of K at most.
        sub_caches: how many there are, of equal size.
        decay: of the moving average of the attention that a token gets, a step (paper: 0.9999).
    """

    sinks: int = at_least(0, 64)
    sub_caches: int = at_least(1, 4)
    decay: float = setting(0.9999, "is a number in [0, 1)", lambda decay: 0.0 <= decay < 1.0)


class Cascading(Evicting):
    """A full sub-cache passes its oldest entry on; number i takes on every `2**i`-th, and of the others the better.

    An entry that is not taken on competes with the newest one there by the moving average of its attention, and the
    loser is gone. Until K tokens have come, every entry is taken on.

    Attributes:
        queries: `[B, Hq, L, D]`, those of the prompt, until the first step has run it through the sub-caches.
        place: `[B, Hkv, L]` int64, the sub-cache of each token after the first ones, from 0.
        average: `[B, Hkv, L]` float32, of the attention received.
    """

    sees_prompt = True
    settings: CascadingSettings
    queries: Tensor | None = None
    place: Tensor | None = None
    average: Tensor | None = None

    def observe(
        self, cache: LayerCache, queries: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> None:
        super().observe(cache, queries, options, visible)
        before = [] if self.queries is None else [self.queries]
        self.queries = torch.cat([*before, queries.detach()], 2)

    def begin(self, prompt: Look) -> None:
        queries = self.queries
        assert queries is not None
        super().begin(prompt)
        for end in range(1, prompt.length + 1):
            seen = None if prompt.visible is None else prompt.visible[:, :end]
            now = Look(prompt.cache, queries[:, :, end - 1], prompt.options, seen, end)
            self.kept = self._enter(now)
            self._learn(now)

    def choose(self, now: Look) -> Tensor:
        self.kept = self._enter(now)
        return self.kept

    def attended(self, now: Look) -> None:
        self._learn(now)

    def _learn(self, now: Look) -> None:
        """The moving averages after a step over `kept`; a token of padding teaches nothing."""
        assert self.average is not None and self.kept is not None
        received = now.scores(self.settings.group_reduction, kept=self.kept).nan_to_num(0.0)
        averages = torch.lerp(received, self.average, self.settings.decay)
        self.average = averages.where(now.seen[:, -1, None, None], self.average)

    def _enter(self, now: Look) -> Tensor:
        """The newest token enters: `[B, Hkv, L]` bool, what is kept."""
        budget = now.cache.budget
        assert budget is not None
        if self.place is None or self.average is None:
            self.place = budget.new_empty(len(budget), now.cache.kv_heads, 0)
            self.average = self.place.float()
        order, real = now.seen.cumsum(-1), now.seen[:, -1]
        sinks = (budget // 4).clamp(max=self.settings.sinks)
        first = now.seen & (order <= sinks[:, None])
        number = order[:, -1] - 1 - sinks  # of the new token among those after the first
        enters = real & (number >= 0)
        place = F.pad(self.place, (0, 1), value=_GONE)
        place[..., -1] = torch.where(enters, 0, _GONE)[:, None]
        self.average = F.pad(self.average, (0, 1))
        moves = enters[:, None].expand(-1, place.shape[1])
        full = order[:, -1] > budget
        sizes = self._sizes(budget - sinks)
        for cache in range(self.settings.sub_caches):
            members = place == cache
            moves = moves & (members.sum(-1) > sizes[:, cache, None])
            if not bool(moves.any()):
                break
            oldest = members.int().argmax(-1, keepdim=True)
            newest = (
                place.shape[-1] - 1 - (place == cache + 1).flip(-1).int().argmax(-1, keepdim=True)
            )
            there = sizes[:, cache + 1, None] > 0
            takes = (~full | (number % 2 ** (cache + 1) == 0))[:, None] & there
            wins = (
                there & (self.average.gather(-1, oldest) >= self.average.gather(-1, newest))[..., 0]
            )
            replaced = (moves & ~takes & wins)[..., None]
            place.scatter_(-1, newest, place.gather(-1, newest).masked_fill(replaced, _GONE))
            goes = torch.where(takes | wins, cache + 1, _GONE)[..., None]
            place.scatter_(-1, oldest, goes.where(moves[..., None], place.gather(-1, oldest)))
            moves = moves & takes
        self.place = place
        return (place >= 0) | first[:, None]

    def _sizes(self, room: Tensor) -> Tensor:
        """`[B, sub-caches + 1]`: what each holds of `room` `[B]`; the first ones what is over, the last nothing."""
        count = self.settings.sub_caches
        index = torch.arange(count, device=room.device)
        return F.pad((room[:, None] + count - 1 - index) // count, (0, 1))


METHOD = Method(
    name="cascading",
    label="cascading KV cache",
    source=(
        'Willette et al., "Training-Free Exponential Context Extension via Cascading KV Cache", ICLR 2025,'
        " arXiv 2406.17808"
    ),
    note=(
        "The first 64 tokens and sub-caches of equal size, here four; number i takes on every 2**i-th entry, and of"
        " the others the better by a moving average (0.9999) of attention; until K is reached, all. Ours: the first"
        " tokens are a quarter of K at most; positions stay; one set per KV head by the maximum over its query"
        " heads; prompts run through token by token after a dense prefill (the paper: in strides, over what is"
        " kept)."
    ),
    settings=CascadingSettings,
    make=Cascading,
)
