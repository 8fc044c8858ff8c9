"""One step of one layer: partial or full, attend, refresh. The algorithm of the paper, in the order of its section 3.

Framework-free: a caller appends the new token's K and V to the `LayerCache`, then calls `decode_step` with the query.
After a prompt it calls `LayerCache.await_selection` instead. `Algorithm` is that pair of calls as an object, so that a
layer can be driven by another method. Letters: B batch, Hq query heads, Hkv KV heads, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.ring import PartialCache
from refreshkv.kernels.reference import Attended
from refreshkv.policy.selection import FREE, recent_share


@dataclass(frozen=True)
class Attention:
    """What a model adds to plain attention; meanings as in `kernels.reference.attend`."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def options(self, visible: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for a kernel; `visible` broadcasts to `[B, Hkv, L]`."""
        return {
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "visible": visible,
        }


# `(cache, query, attention, visible, heads)` -> `[B, Hq, D]`; `heads` as in `full_step`.
FullStep = Callable[[LayerCache, Tensor, Attention, Tensor | None, Tensor | None], Tensor]


def decode_step(
    cache: LayerCache,
    query: Tensor,
    attention: Attention,
    visible: Tensor | None = None,
    on_full: FullStep | None = None,
) -> Tensor:
    """Attention of one new token under RefreshKV.

    Args:
        cache: the layer; the token's own K and V are already appended.
        query: `[B, Hq, D]`, after RoPE and QK-norm.
        attention: scale, softcap, sinks.
        visible: `[B, L]` bool, False for padding; `None` when there is none. The new token is visible in every row.
        on_full: what a full step does; `None` is `full_step`. An ablation puts its own here.

    Returns:
        `[B, Hq, D]`.
    """
    # Outside of the loop in `exact.py`, "exact" is full attention.
    if cache.config.mode != "refresh":
        return _ordinary_step(cache, query, attention, visible)
    if cache.pending is not None:
        first_selection(cache, cache.pending, attention, without_newest(visible), cache.length - 1)
    elif cache.hidden is None:
        count_again(cache, visible)
    partial, full = cache.partial, _full_at_once(cache, query)
    if partial is None or (cache.asks_device and bool(full.all())):
        output = (on_full or full_step)(cache, query, attention, visible, None)
        _count(cache, full=None, partial_read=None)
        if cache.watch is not None:
            cache.watch(cache, query, attention, visible, None)
        return output

    # The new token enters the partial cache, the lowest-scored entry leaves; attention over what is there.
    cache.push_newest()
    attended = None if cache.watch is None else partial.positions.clone()
    used = partial.used
    output, lse = attend_partial(cache, query, attention, cache.length - 1)
    partial_read = (used + partial.fetched).masked_fill(full, 0).sum(-1)
    fired = cache.trigger.after(partial.steps, lse, _reference(cache))
    if fired is not None:
        full = full | fired
    if not cache.asks_device or bool(full.any()):
        everything = (on_full or full_step)(cache, query, attention, visible, full)
        per_query_head = full.repeat_interleave(query.shape[1] // full.shape[1], 1)
        output = torch.where(per_query_head[..., None], everything, output)
    _count(cache, full=full, partial_read=partial_read)
    if cache.watch is not None and attended is not None:
        cache.watch(cache, query, attention, visible, attended.masked_fill(full[..., None], FREE))
    return output


def _full_at_once(cache: LayerCache, query: Tensor) -> Tensor:
    """`[B, Hkv]` bool: heads that do not even try their partial cache; all of them after a crop, which left none."""
    if cache.partial is None:
        shape = (cache.rows, cache.kv_heads)
        return torch.ones(shape, dtype=torch.bool, device=query.device)
    steps = cache.partial.steps + 1
    if cache.asks_device:  # nothing to compare in most steps
        due = cache.trigger.due(steps)
        if not bool(due.any()):
            return due
    return cache.trigger.before(steps, query, _reference(cache))


def attend_partial(
    cache: LayerCache, query: Tensor, attention: Attention, end: Tensor | int
) -> Attended:
    """Attention over the partial cache; then what follows the most attended entries is fetched (`config.successor`).

    The token being decoded has been pushed. `end`, for all or `[B, 1, 1]`: the store holds only the places before it.
    """
    partial, config = cache.partial, cache.config
    assert partial is not None
    keys, values, used = partial.entries()
    if not config.successor:
        return cache.backend.attend(query, keys, values, **attention.options(), lengths=used)
    attended, best = cache.backend.attend_and_rank(
        query,
        keys,
        values,
        **attention.options(),
        lengths=used,
        reduction=config.group_reduction,
        newest=partial.newest,
        count=config.successor,
    )
    found = partial.positions.gather(-1, best)
    partial.fetch(torch.where((found != FREE) & (found + 1 < end), found + 1, FREE))
    return attended


def first_selection(
    cache: LayerCache,
    queries: Tensor,
    attention: Attention,
    visible: Tensor | None,
    prompt: int,
) -> None:
    """Select from the last queries of the prompt, over the prompt; what its anchors are is decided here.

    Args:
        queries: `[B, Hq, T, D]`, T at most `config.window`.
        visible: `[B, prompt]` bool; `None` when everything is.
        prompt: tokens of the prompt, padding included; the store may hold more.
    """
    cache.resolve_budget(visible, prompt)
    scores, lse = cache.backend.vote(
        queries,
        cache.store.keys[:, :, :prompt],
        starts=torch.full((cache.rows,), prompt - queries.shape[2], device=queries.device),
        **attention.options(over_heads(visible)),
        reduction=cache.config.group_reduction,
    )
    cache.anchors = None
    rebuild(cache, queries[:, :, -1], scores, lse[..., -1], visible, heads=None)
    cache.pending = None
    if cache.config.anchor:
        assert cache.partial is not None and cache.budget is not None
        # Rounded as in `resolve_budget`: in float32 13 % of 900 would be 116.
        share = (cache.budget.double() * cache.config.anchor).round(decimals=9).long()
        cache.anchors = _best(cache.partial, share)


def _best(partial: PartialCache, counts: Tensor) -> Tensor:
    """Positions of the `counts` `[B]` best entries of a fresh selection, best first, `[B, Hkv, A]`; `FREE` for none."""
    places = torch.arange(int(counts.max()), device=counts.device)
    slots = partial.filled[..., None] - 1 - places
    wanted = (slots >= 0) & (places < counts[:, None, None])
    return partial.positions.gather(-1, slots.clamp(min=0)).masked_fill(~wanted, FREE)


def count_again(cache: LayerCache, visible: Tensor | None) -> None:
    """After a crop the budget stays that of the prompt, if anything was decoded since."""
    if cache.budget is None:
        cache.resolve_budget(without_newest(visible), cache.length - 1)
    else:
        cache.count_padding(visible)


def full_step(
    cache: LayerCache,
    query: Tensor,
    attention: Attention,
    visible: Tensor | None,
    heads: Tensor | None,
) -> Tensor:
    """Attention over the full cache; the partial cache and the reference are rebuilt from this query's scores.

    With `config.score_only` the keys alone are read, and the step attends to the new partial cache: the paper's
    ablation "no full attention", which costs nothing measurable there.
    `heads` `[B, Hkv]` bool: the others have done their partial step and keep what they have; `None`: every head.
    """
    if cache.config.score_only:
        scores, lse = cache.backend.score(
            query,
            cache.store.keys,
            **attention.options(over_heads(visible)),
            lengths=cache.lengths,
            reduction=cache.config.group_reduction,
            heads=heads,
        )
        rebuild(cache, query, scores, lse, visible, heads)
        assert cache.partial is not None
        keys, values, used = cache.partial.entries()
        return cache.backend.attend(query, keys, values, **attention.options(), lengths=used).output
    (output, _), (scores, lse) = cache.backend.attend_and_score(
        query,
        cache.store.keys,
        cache.store.values,
        **attention.options(over_heads(visible)),
        lengths=cache.lengths,
        reduction=cache.config.group_reduction,
        heads=heads,
    )
    rebuild(cache, query, scores, lse, visible, heads)
    return output


def rebuild(
    cache: LayerCache,
    query: Tensor,
    scores: Tensor,
    lse: Tensor,
    visible: Tensor | None,
    heads: Tensor | None,
) -> None:
    """The partial cache and the reference of `heads` (`None`: all), from the scores of this query."""
    reselect(cache, scores, visible, heads)
    cache.remember(cache.trigger.reference(query, lse, cache.kv_heads), heads)


def reselect(
    cache: LayerCache,
    scores: Tensor,
    visible: Tensor | None,
    heads: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    """The partial cache of `heads` (`None`: all) from `scores` `[B, Hkv, L]`; `ends` as in `selection.select`."""
    assert cache.budget is not None
    selection = cache.backend.select(
        scores,
        cache.budget,
        pool_kernel=cache.config.pool_kernel,
        visible=visible,
        heads=heads,
        recent=recent_share(cache.budget, cache.config.recent),
        anchors=cache.anchors,
        ends=cache.ends if ends is None else ends,
        slots=cache.slots,
    )
    cache.refresh(selection, heads)


def _ordinary_step(
    cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
) -> Tensor:
    """`mode="full"`: attention over the full cache and nothing else."""
    if cache.pending is not None or cache.hidden is None:
        cache.resolve_budget(visible, cache.length)
    cache.pending = None
    output = cache.backend.attend(
        query,
        cache.store.keys,
        cache.store.values,
        **attention.options(over_heads(visible)),
        lengths=cache.lengths,
    ).output
    _count(cache, full=None, partial_read=None)
    return output


def _reference(cache: LayerCache) -> Tensor:
    assert cache.reference is not None  # set with every partial cache
    return cache.reference


def without_newest(visible: Tensor | None) -> Tensor | None:
    """The mask of what was there before the token being decoded."""
    return None if visible is None else visible[:, :-1]


def over_heads(visible: Tensor | None) -> Tensor | None:
    """`[B, L]` as the kernels want it: one mask for all heads."""
    return None if visible is None else visible[:, None]


def _count(cache: LayerCache, *, full: Tensor | None, partial_read: Tensor | None) -> None:
    """Record one decode step. `full` `[B, Hkv]`, `None`: all heads; `partial_read` `[B]`, from the partial caches."""
    assert cache.hidden is not None
    heads = cache.rows * cache.kv_heads
    tokens = cache.length - cache.hidden  # [B]
    available = tokens * cache.kv_heads
    full_heads = None if full is None else full.sum(-1)
    if cache.config.score_only and cache.partial is not None:
        # Keys only, which are half of an entry, and then the new partial cache.
        chosen = cache.partial.used if full is None else cache.partial.used.masked_fill(~full, 0)
        read = (cache.kv_heads if full_heads is None else full_heads) * (tokens + 1) // 2
        read = read + chosen.sum(-1)
    else:
        read = available if full_heads is None else full_heads * tokens
    cache.stats.record(
        cache.index,
        kv_heads=cache.kv_heads,
        entry_bytes=cache.store.entry_bytes,
        full=heads if full_heads is None else full_heads,
        steps=heads,
        read=read if partial_read is None else read + partial_read,
        available=available,
    )


class Algorithm:
    """What drives one layer: RefreshKV, as above. The methods it is compared with derive from this and override both.

    A host calls `observe` for each pass of a prompt and `step` for each decoded token, and passes on whatever else
    happens to the cache. State of a derived class is its own; it follows the rows, and the length, of the `LayerCache`.

    Class attributes:
        sees_prompt: whether `observe` looks at the queries itself. Other algorithms learn of a prompt through the
            cache alone, so several can go on from one prefill.
    """

    sees_prompt = False

    def observe(
        self, cache: LayerCache, queries: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        """A prompt, or the next chunk of it, is in the store.

        Args:
            cache: the layer; the keys and values of these tokens are already appended.
            queries: `[B, Hq, T, D]`, those of the newest T tokens.
            attention: scale, softcap, sinks.
            visible: `[B, L]` bool, False for padding; `None` when there is none.
        """
        cache.await_selection(queries)

    def step(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        """Attention of one new token, `[B, Hq, D]` -> `[B, Hq, D]`; arguments as for `decode_step`."""
        return decode_step(cache, query, attention, visible)

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`, `[B']` int64; the cache has done so."""

    def crop(self, length: int) -> None:
        """Only the first `length` tokens will remain, which are fewer than there are."""

    def reset(self) -> None:
        """The cache is empty again."""
