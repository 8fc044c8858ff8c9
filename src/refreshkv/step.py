"""One step of one layer: partial or full, attend, refresh. The algorithm of the paper, in the order of its section 3.

Framework-free: a caller appends the new token's K and V to the `LayerCache`, then calls `decode_step` with the query.
After a prompt it calls `LayerCache.await_selection` instead. `Algorithm` is that pair of calls as an object, so that a
layer can be driven by another method. Letters: B batch, Hq query heads, Hkv KV heads, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.ring import Ring
from refreshkv.kernels.options import AttendOptions, over_heads
from refreshkv.mixed import begin_mixed, mixed_step
from refreshkv.policy.selection import FREE
from refreshkv.policy.triggers import QueryDrift

# `(cache, query, options, visible, heads)` -> `[B, Hq, D]`; `heads` as in `full_step`.
FullStep = Callable[[LayerCache, Tensor, AttendOptions, Tensor | None, Tensor | None], Tensor]


def decode_step(
    cache: LayerCache,
    query: Tensor,
    options: AttendOptions,
    visible: Tensor | None = None,
    on_full: FullStep | None = None,
) -> Tensor:
    """Attention of one new token under RefreshKV.

    Args:
        cache: the layer; the token's own K and V are already appended.
        query: `[B, Hq, D]`, after RoPE and QK-norm.
        options: scale, softcap and sinks of the model; how a GQA group agrees is the cache's setting.
        visible: `[B, width]` bool, False for padding; `None` when there is none. The new token is visible in every row.
        on_full: what a full step does, but in the fixed form; `None` is `full_step`. An ablation puts its own here.

    Returns:
        `[B, Hq, D]`.
    """
    options = options.over(reduction=cache.config.group_reduction)
    if cache.config.mode == "mixed":
        return mixed_step(cache, query, options, visible)
    # Outside of the loop in `exact.py`, "exact" is full attention.
    if cache.config.mode != "refresh":
        return _ordinary_step(cache, query, options, visible)
    if cache.waiting is not None:
        select_after_prompt(cache, options, visible)
    elif cache.hidden is None:
        count_again(cache, visible)
    if cache.fixed:
        if cache.ring is None:  # the only token of a prompt, which is no step
            return full_step(cache, query, options, visible, None)
        return _fixed_step(cache, query, options, visible)
    ring, full = cache.ring, _full_at_once(cache, query)
    if ring is None or bool(full.all()):
        output = (on_full or full_step)(cache, query, options, visible, None)
        _count(cache, full=None, partial_read=None)
        if cache.watch is not None:
            cache.watch(cache, query, options, visible, None)
        return output

    # The new token enters the partial cache, the lowest-scored entry leaves; attention over what is there.
    newest = cache.store.lengths - 1
    ring.push(newest)
    used, attended = ring.used, ring.positions if cache.watch is None else ring.positions.clone()
    output, lse = ring.attend(query, options, successor=cache.config.successor, end=newest)
    partial_read = (used + ring.fetched).masked_fill(full, 0).sum(-1)
    assert cache.reference is not None  # set with every selection
    fired = cache.trigger.after(ring.steps, lse, cache.reference)
    if fired is not None:
        full = full | fired
    if bool(full.any()) and on_full is None:
        output = full_step(cache, query, options, visible, full, into=output)
    elif bool(full.any()):
        assert on_full is not None
        output = _of_heads(full, on_full(cache, query, options, visible, full), output)
    _count(cache, full=full, partial_read=partial_read)
    if cache.watch is not None:
        cache.watch(cache, query, options, visible, attended.masked_fill(full[..., None], FREE))
    return output


def _fixed_step(
    cache: LayerCache, query: Tensor, options: AttendOptions, visible: Tensor | None
) -> Tensor:
    """A step of the fixed form: heads that are full at once go through their partial cache too, and it counts nothing.

    What the step reads is counted where it is read. `LayerCache.due` leaves out what cannot be.
    """
    ring, ends = cache.ring, cache.store.ends
    assert ring is not None and cache.reference is not None and ends is not None
    if cache.due == "full":
        output = _counted_full_step(cache, query, options, visible, None)
        if cache.watch is not None:
            cache.watch(cache, query, options, visible, None)
        return output
    full = summary = None
    if cache.due != "partial":
        full, summary = _decided(cache, query, ring)
    counts = {"full": full, "tally": cache.tally}
    ring.push(ends, back=1, **counts)
    attended = ring.positions if cache.watch is None else ring.positions.clone()
    # The newest token, which follows no other, is there already.
    output, lse = ring.attend(query, options, successor=cache.config.successor, end=ends, **counts)
    if full is not None:
        fired = cache.trigger.after(ring.steps, lse, cache.reference)
        if fired is not None:
            full = full | fired
        output = _counted_full_step(
            cache, query, options, visible, full, into=output, summary=summary
        )
        attended = attended if cache.watch is None else attended.masked_fill(full[..., None], FREE)
    if cache.watch is not None:
        cache.watch(cache, query, options, visible, attended)
    return output


def _decided(cache: LayerCache, query: Tensor, ring: Ring) -> tuple[Tensor, Tensor | None]:
    """As `_full_at_once`, and what the trigger will remember, where it knows that already."""
    trigger = cache.trigger
    if not isinstance(trigger, QueryDrift):
        return _full_at_once(cache, query), None
    assert cache.reference is not None
    return cache.store.backend.drift(
        query,
        cache.reference,
        ring.state,
        stride=trigger.stride,
        threshold=trigger.threshold,
        per_head=trigger.decide == "head",
    )


def _counted_full_step(
    cache: LayerCache,
    query: Tensor,
    options: AttendOptions,
    visible: Tensor | None,
    heads: Tensor | None,
    **known: Tensor | None,
) -> Tensor:
    """A full step of the fixed form, which counts with its refresh; without values, what that would not tell."""
    output = full_step(cache, query, options, visible, heads, counted=True, **known)
    if cache.config.score_only:
        full = cache.rows * cache.kv_heads if heads is None else heads.sum(-1)
        cache.count(full=full, read=_read_without_values(cache, heads))
    return output


def _of_heads(heads: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` `[B, Hq, D]` in the query heads of the KV heads `[B, Hkv]` bool, `old` in the others."""
    per_query_head = heads.repeat_interleave(new.shape[1] // heads.shape[1], 1)
    return torch.where(per_query_head[..., None], new, old)


def _full_at_once(cache: LayerCache, query: Tensor) -> Tensor:
    """`[B, Hkv]` bool: heads that do not even try their partial cache: there is none, or the trigger says so."""
    ring = cache.ring
    if ring is None or cache.reference is None:
        shape = (cache.rows, cache.kv_heads)
        return torch.ones(shape, dtype=torch.bool, device=query.device)
    steps, void = ring.steps + 1, ring.filled == 0
    if not cache.fixed:  # nothing to compare in most steps
        due = cache.trigger.due(steps) | void
        if not bool(due.any()):
            return due
    return cache.trigger.before(steps, query, cache.reference) | void


def select_after_prompt(cache: LayerCache, options: AttendOptions, visible: Tensor | None) -> None:
    """Rows that wait select from the last queries of their prompt, over the prompt; their anchors are decided here.

    `visible` `[B, width]` bool; `None` when everything is. The store may hold tokens after the prompt.
    """
    rows, prompt, queries = cache.waiting, cache.prompt, cache.queries
    assert rows is not None and prompt is not None and queries is not None
    cache.resolve_budget(visible, prompt, rows)
    scores, lse = cache.store.vote(
        queries,
        options.over(over_heads(visible), reduction=cache.config.group_reduction),
        starts=prompt - queries.shape[2],
        counts=rows * queries.shape[2],
    )
    heads = rows[:, None].expand(-1, cache.kv_heads)
    no_anchors = None
    if cache.anchors is not None:
        no_anchors = cache.anchors.masked_fill(rows[:, None, None], FREE)
    summary = cache.trigger.reference(queries[:, :, -1], lse[..., -1], cache.kv_heads)
    reselect(cache, scores, visible, heads, ends=prompt, anchors=no_anchors, summary=summary)
    if cache.config.anchor:
        assert cache.ring is not None and cache.budget is not None
        # Rounded as in `resolve_budget`: in float32 13 % of 900 would be 116.
        share = (cache.budget.double() * cache.config.anchor).round(decimals=9).long()
        most = int(share.max()) if cache.slots is None else round(cache.slots * cache.config.anchor)
        cache.anchor(_best(cache.ring, share, most), rows)
    cache.waiting = None


def begin_decoding(cache: LayerCache, options: AttendOptions, visible: Tensor | None) -> None:
    """The prompt is over, and no step shall have to look at it: a cache of the fixed form selects now."""
    if cache.config.mode == "refresh":
        select_after_prompt(cache, options, visible)
    elif cache.config.mode == "mixed":
        begin_mixed(cache, visible)
    else:
        cache.count_padding(visible)
        cache.waiting = None  # the exact mode lets it wait again


def _best(ring: Ring, counts: Tensor, most: int) -> Tensor:
    """Positions of the `counts` `[B]` best of a fresh selection, best first, `[B, Hkv, most]`; `FREE` for none."""
    ranks = torch.arange(most, device=counts.device)
    slots = ring.filled[..., None] - 1 - ranks
    wanted = (slots >= 0) & (ranks < counts[:, None, None])
    return ring.positions.gather(-1, slots.clamp(min=0)).masked_fill(~wanted, FREE)


def count_again(cache: LayerCache, visible: Tensor | None) -> None:
    """After a crop the budget stays that of the prompt, if anything was decoded since."""
    if cache.budget is None:
        cache.resolve_budget(visible, cache.store.lengths - 1)
    else:
        cache.count_padding(visible)


def full_step(
    cache: LayerCache,
    query: Tensor,
    options: AttendOptions,
    visible: Tensor | None,
    heads: Tensor | None,
    *,
    into: Tensor | None = None,
    summary: Tensor | None = None,
    counted: bool = False,
) -> Tensor:
    """Attention over the full cache; the partial cache and the reference are rebuilt from this query's scores.

    With `config.score_only` the keys alone are read, and the step attends to the new partial cache: the paper's
    ablation "no full attention", which costs nothing measurable there.

    Args:
        cache, query, options, visible: as for `decode_step`.
        heads: `[B, Hkv]` bool, the others have done their partial step and keep what they have; `None`: every head.
        into: `[B, Hq, D]`, what their partial step gave, which becomes the output of the step.
        summary: `[B, Hkv, R]`, what the trigger will remember; `None`: it is asked.
        counted: as in `LayerCache.refresh`.
    """
    everything = options.over(over_heads(visible), heads=heads)
    if cache.config.score_only:
        scores, lse = cache.store.score(query, everything)
    else:
        attended, (scores, lse) = cache.store.attend_and_score(query, everything, into)
    if summary is None:
        summary = cache.trigger.reference(query, lse, cache.kv_heads)
    counted = counted and not cache.config.score_only
    reselect(cache, scores, visible, heads, summary=summary, counted=counted)
    if not cache.config.score_only:
        return attended.output
    assert cache.ring is not None
    output = cache.ring.attend(query, options).output
    return output if heads is None or into is None else _of_heads(heads, output, into)


def reselect(
    cache: LayerCache,
    scores: Tensor,
    visible: Tensor | None,
    heads: Tensor | None = None,
    *,
    ends: Tensor | None = None,
    anchors: Tensor | None = None,
    summary: Tensor | None = None,
    counted: bool = False,
) -> None:
    """The partial cache of `heads` (`None`: all) from `scores` `[B, Hkv, width]`.

    `ends` as in `selection.select`; `None`: those of the store. `anchors`: `None` are those of the cache. `summary` and
    `counted` as in `LayerCache.refresh`.
    """
    assert cache.budget is not None and cache.recent is not None
    selection = cache.store.backend.select(
        scores,
        cache.budget,
        pool_kernel=cache.config.pool_kernel,
        visible=visible,
        heads=heads,
        recent=cache.recent,
        anchors=cache.anchors if anchors is None else anchors,
        ends=cache.store.ends if ends is None else ends,
        slots=cache.slots,
    )
    cache.refresh(selection, heads, summary, counted=counted)


def _ordinary_step(
    cache: LayerCache, query: Tensor, options: AttendOptions, visible: Tensor | None
) -> Tensor:
    """`mode="full"`: attention over the full cache and nothing else."""
    if cache.waiting is not None or cache.hidden is None:
        cache.count_padding(visible)
    cache.waiting = None
    output = cache.store.attend(query, options.over(over_heads(visible))).output
    if not cache.fixed:  # counted with its token
        _count(cache, full=None, partial_read=None)
    return output


def _count(cache: LayerCache, *, full: Tensor | None, partial_read: Tensor | None) -> None:
    """Record one decode step. `full` `[B, Hkv]`, `None`: all heads; `partial_read` `[B]`, from the partial caches."""
    assert cache.hidden is not None
    heads = cache.rows * cache.kv_heads
    tokens = cache.store.lengths - cache.hidden  # [B]
    available = tokens * cache.kv_heads
    full_heads = None if full is None else full.sum(-1)
    if cache.config.score_only and cache.ring is not None:
        read = _read_without_values(cache, full)
    else:
        read = available if full_heads is None else full_heads * tokens
    cache.count(
        full=heads if full_heads is None else full_heads,
        steps=heads,
        read=read if partial_read is None else read + partial_read,
        available=available,
    )


def _read_without_values(cache: LayerCache, full: Tensor | None) -> Tensor:
    """`[B]`: entries that a full step of the heads `full` `[B, Hkv]` (`None`: all) read with `config.score_only`."""
    assert cache.ring is not None and cache.hidden is not None
    used, tokens = cache.ring.used, cache.store.lengths - cache.hidden
    chosen = used if full is None else used.masked_fill(~full, 0)
    heads = cache.kv_heads if full is None else full.sum(-1)
    # Keys only, which are half of an entry, and then the new partial cache.
    return heads * (tokens + 1) // 2 + chosen.sum(-1)


class Algorithm:
    """What drives one layer: RefreshKV, as above. The methods it is compared with derive from this and override both.

    A host calls `observe` for each pass of a prompt and `step` for each decoded token, and passes on whatever else
    happens to the cache. State of a derived class is its own; it follows the rows, and the length, of the `LayerCache`.

    Attributes:
        sees_prompt: `observe` looks at the queries of a prompt while they pass; else another cache with the same tokens
            and last queries serves as well.
        below: what drives the served layer before this one in the same cache, and takes each step first; `None` for the
            first layer.
    """

    sees_prompt = False
    below: Algorithm | None = None

    def observe(
        self, cache: LayerCache, queries: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> Tensor | None:
        """A prompt, or the next chunk of it, is in the store.

        Args:
            cache: the layer; the keys and values of these tokens are already appended.
            queries: `[B, Hq, T, D]`, those of the newest T tokens.
            options: scale, softcap and sinks of the model.
            visible: `[B, L]` bool, False for padding; `None` when there is none.

        Returns:
            What these tokens get, `[B, Hq, T, D]`; `None`: full attention, which the host has.
        """
        cache.await_selection(queries)
        return None

    def step(
        self, cache: LayerCache, query: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> Tensor:
        """Attention of one new token, `[B, Hq, D]` -> `[B, Hq, D]`; arguments as for `decode_step`."""
        return decode_step(cache, query, options, visible)

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`, `[B']` int64; the cache has done so."""

    def crop(self, length: int) -> None:
        """Only the first `length` tokens will remain, which are fewer than there are."""

    def reset(self) -> None:
        """The cache is empty again."""
