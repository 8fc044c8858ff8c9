"""Attention of a decode step in short, readable float32: the definition every fast kernel is tested against.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, L tokens, D head dim, K slots of a partial cache.
Source: RefreshKV, sections 2 and 3; `attend_and_rank`, `verify` and `vote` are ours. RoPE is already applied.

No number in a tensor makes a kernel read or write elsewhere, raise, or leave these rules. How many entries, queries or
slots count (lengths, counts, count, budget) is cut to what there is, a start to -T .. L. A place that is not in the
store, or whose page is not, is a free one. A NaN or +inf among the logits of a query, or a NaN as its sink, makes its
output and weights NaN, as in torch; the logits also its lse. A NaN among the values reaches its own dim. What no query
of a row sees is not used, whatever it holds; its scores are 0, or NaN where a weight of the KV head is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.policy.selection import FREE, rank_keys, reduce_group


class Attended(NamedTuple):
    """output `[B, Hq, D]` in the dtype of the values; lse `[B, Hq]` float32, log-sum-exp over the tokens (no sink)."""

    output: Tensor
    lse: Tensor


class Scored(NamedTuple):
    """scores `[B, Hkv, L]` float32, the attention each token received (group-reduced); lse `[B, Hq]` float32."""

    scores: Tensor
    lse: Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    lengths: Tensor | None = None,
    heads: Tensor | None = None,
) -> Attended:
    """Attention of one query token over the given entries: the partial step, or a plain full step.

    Args:
        query: `[B, Hq, D]`.
        keys, values: `[B, Hkv, L, D]`.
        scale: factor on the logits.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        sinks: `[Hq]`, one extra logit per head that receives attention and gives no value (gpt-oss).
        visible: `[B or 1, Hkv or 1, L]` bool; `None` when everything is. A row that sees nothing gives 0.
        lengths: `[B or 1, Hkv or 1]` int64, only the first so many entries count; `None`: all L.
        heads: `[B, Hkv]` bool, the KV heads whose result the caller uses; the others may give anything. `None`: all.
    """
    visible = within(lengths, visible, keys.shape[2])
    logits = _logits(query, keys, scale, softcap, visible)
    lse = _log_sum_exp(logits)
    weights = _weights(logits, lse, sinks)
    output = weights.unflatten(1, (keys.shape[1], -1)) @ _seen(values, visible)
    return Attended(output.flatten(1, 2).to(values.dtype), lse)


def attend_and_score(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    lengths: Tensor | None = None,
    heads: Tensor | None = None,
    reduction: Reduction = "max",
) -> tuple[Attended, Scored]:
    """The full step: attention over everything, and the scores from which the partial cache is rebuilt."""
    visible = within(lengths, visible, keys.shape[2])
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "visible": visible}
    attended = attend(query, keys, values, **options)  # type: ignore[arg-type]
    return attended, score(query, keys, **options, reduction=reduction)  # type: ignore[arg-type]


def score(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    lengths: Tensor | None = None,
    heads: Tensor | None = None,
    reduction: Reduction = "max",
) -> Scored:
    """The attention that each token receives from this query, without touching the values."""
    logits = _logits(query, keys, scale, softcap, within(lengths, visible, keys.shape[2]))
    lse = _log_sum_exp(logits)
    return Scored(reduce_group(_weights(logits, lse, sinks), keys.shape[1], reduction), lse)


def attend_and_rank(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    lengths: Tensor | None = None,
    heads: Tensor | None = None,
    reduction: Reduction = "max",
    newest: Tensor,
    count: int,
) -> tuple[Attended, Tensor]:
    """The partial step, and the slots of the most attended entries, best first, `[B, Hkv, count]` int64.

    `newest` `[B, Hkv]` is the slot of the token being decoded, which is left out unless there are too few others. An
    entry whose weight is NaN ranks as one without any.
    """
    visible = within(lengths, visible, keys.shape[2])
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "visible": visible}
    attended = attend(query, keys, values, **options)  # type: ignore[arg-type]
    scores = score(query, keys, **options, reduction=reduction).scores  # type: ignore[arg-type]
    return attended, top_slots(scores, newest, count)


def attend_at(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    blocks: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: Tensor | None = None,
    reduction: Reduction = "max",
    newest: Tensor | None = None,
    count: int = 0,
) -> tuple[Attended, Tensor]:
    """`attend_and_rank` over the entries at `positions` `[B, Hkv, K]` of a full cache, `FREE` ones left out.

    Keys and values are `[B, Hkv, L, D]`; or, with `blocks` `[B, M]` int32, those of a paged cache, `[N, Hkv, P, D]`:
    position p of row b lies in page `blocks[b, p // P]` at place p % P. Ranks are indices into `positions`; without
    `count` there are none.
    """
    rows, kv_heads, _ = positions.shape
    size = keys.shape[2]
    row, head = torch.arange(rows)[:, None, None], torch.arange(kv_heads)[:, None]
    row, head = row.to(positions.device), head.to(positions.device)
    if 0 in (size, keys.shape[0], 1 if blocks is None else blocks.shape[1]):  # an empty store
        keys, values = (x.new_zeros(rows, kv_heads, 1, x.shape[-1]) for x in (keys, values))
        size, blocks, positions = 1, None, torch.full_like(positions, FREE)
    stored = (positions >= 0) & (positions < size * (1 if blocks is None else blocks.shape[1]))
    page, place = row, positions.where(stored, 0)
    if blocks is not None:
        page, place = blocks.long()[row, place // size], place % size
        stored &= (page >= 0) & (page < keys.shape[0])
        page = page.where(stored, 0)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "visible": stored}
    chosen = keys[page, head, place], values[page, head, place]
    if newest is None:
        newest = torch.zeros(rows, kv_heads, dtype=torch.int64, device=place.device)
    return attend_and_rank(
        query, *chosen, **options, reduction=reduction, newest=newest, count=count
    )  # type: ignore[arg-type]


def within(lengths: Tensor | None, visible: Tensor | None, entries: int) -> Tensor | None:
    """`visible`, and no more than the first `lengths` of the entries."""
    if lengths is None:
        return visible
    inside = torch.arange(entries, device=lengths.device) < lengths[..., None]
    return inside if visible is None else inside & visible


def top_slots(scores: Tensor, newest: Tensor, count: int) -> Tensor:
    """The `count` best of `scores` `[B, Hkv, K]` without `newest`; ties go to the later slot, NaN counts as 0."""
    slots = scores.shape[-1]
    left = scores.where(scores > 0, 0.0)
    left = left.masked_fill(torch.arange(slots, device=scores.device) == newest[..., None], -1.0)
    return rank_keys(left).topk(max(0, min(count, slots)), dim=-1).values & 0xFFFFFFFF


def window_within(window: int | None, places: int) -> int | None:
    """`window`, no wider than the `places` there are."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1; got {window} (None: all earlier places)")
    return None if window is None else min(window, places)


def verify(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    reduction: Reduction = "max",
    window: int | None = None,
) -> tuple[Attended, Scored]:
    """Full attention of the T newest tokens of each row, causal among them, and the scores that they give together.

    Args:
        query: `[B, Hq, T, D]`.
        keys, values: `[B, Hkv, L, D]`.
        starts: `[B]` int64, the place of each row's first query; query t sees the places up to `starts + t` < L.
        counts: `[B]` int64, how many of a row's queries vote; `None`: all T. What others give may be anything.
        visible: `[B or 1, Hkv or 1, L]` bool, for all queries; `None` when everything is.
        window: a query sees no more than this many places, its own included. The rest is as in `attend`.

    Returns:
        output `[B, Hq, T, D]` and lse `[B, Hq, T]`; scores `[B, Hkv, L]` float32, the mean over the voting queries of
        the group-reduced attention.
    """
    seen = _causal(query, keys, starts, visible, window)
    logits = _causal_logits(query, keys, scale, softcap, seen)
    lse = _log_sum_exp(logits)
    weights = _weights(logits, lse, None if sinks is None else sinks[:, None])
    output = weights.unflatten(1, (keys.shape[1], -1)) @ _seen(values, seen.any(2))[:, :, None]
    scores = _mean_votes(weights, keys.shape[1], counts, reduction)
    return Attended(output.flatten(1, 2).to(values.dtype), lse), Scored(scores, lse)


def vote(
    query: Tensor,
    keys: Tensor,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    reduction: Reduction = "max",
) -> Scored:
    """The scores of `verify` without touching the values."""
    logits = _causal_logits(query, keys, scale, softcap, _causal(query, keys, starts, visible))
    lse = _log_sum_exp(logits)
    weights = _weights(logits, lse, None if sinks is None else sinks[:, None])
    return Scored(_mean_votes(weights, keys.shape[1], counts, reduction), lse)


def gather(source: Tensor, positions: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """Copy rows `positions` `[B, Hkv, K]` of `source` `[B, Hkv, L, D]` to slots 0 .. K-1 of `out` `[B, Hkv, C, D]`.

    Free slots (positions outside 0 .. L-1) and heads that `heads` `[B, Hkv]` leaves out keep what they held.
    """
    length = source.shape[2]
    if not length:
        return
    wanted = (positions >= 0) & (positions < length)
    if heads is not None:
        wanted = wanted & heads[..., None]
    at = positions.where(wanted, 0)[..., None].expand(-1, -1, -1, source.shape[-1])
    slots = out[:, :, : positions.shape[-1]]
    slots.copy_(torch.where(wanted[..., None], source.gather(2, at), slots))


def insert(
    keys: Tensor,
    values: Tensor,
    wanted: Tensor,
    *,
    ring_keys: Tensor,
    ring_values: Tensor,
    ring_positions: Tensor,
    filled: Tensor,
    pushed: Tensor,
    budget: Tensor,
) -> Tensor:
    """Tokens of the store enter each ring one after the other, in place, but those that are there already.

    Args:
        keys, values: `[B, Hkv, L, D]`, the full cache.
        wanted: `[B, Hkv, m]` int64, distinct positions in it, `FREE` for none.
        ring_keys, ring_values: `[B, Hkv, C, D]`; ring_positions: `[B, Hkv, C]` int64, `FREE` where a slot is free.
        filled, pushed: `[B, Hkv]` int64; the next token goes to slot `(filled + pushed) % K`, from 0 on for negative
            ones too, and counts in `pushed`.
        budget: `[B]` int64, K of each row, at most C. Nothing enters where it is 0.

    Returns:
        `[B, Hkv]` int64, how many entered.
    """
    missing, budget = missing_from(ring_positions, wanted, budget, keys.shape[2])
    if 0 in (keys.shape[2], ring_keys.shape[2]):
        return missing.sum(-1)
    row = torch.arange(wanted.shape[0], device=wanted.device)[:, None]
    head = torch.arange(wanted.shape[1], device=wanted.device)
    for position, enters in zip(wanted.unbind(-1), missing.unbind(-1), strict=True):
        # Where nothing enters the slot keeps its entry.
        slot, source = (filled + pushed) % budget[:, None], position.where(enters, 0)
        for ring, store in ((ring_keys, keys), (ring_values, values)):
            entry = torch.where(enters[..., None], store[row, head, source], ring[row, head, slot])
            ring[row, head, slot] = entry
        ring_positions[row, head, slot] = torch.where(
            enters, position, ring_positions[row, head, slot]
        )
        pushed += enters
    return missing.sum(-1)


def missing_from(
    ring_positions: Tensor, wanted: Tensor, budget: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Which of the `wanted` enter their ring, `[B, Hkv, m]` bool; and K of each row, `[B]`, here at least 1."""
    there = (ring_positions[:, :, None] == wanted[..., None]).any(-1)
    room = budget.clamp(max=ring_positions.shape[2])
    return (wanted >= 0) & (wanted < length) & ~there & (room > 0)[:, None, None], room.clamp(min=1)


def _logits(
    query: Tensor, keys: Tensor, scale: float, softcap: float | None, visible: Tensor | None
) -> Tensor:
    """`[B, Hq, L]` float32: q k^T * scale, capped, -inf where a token is not visible."""
    # [B, Hkv, G, D]: every key is read once per group.
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    logits = grouped @ keys.float().transpose(-1, -2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    return logits.flatten(1, 2)


def _causal(
    query: Tensor,
    keys: Tensor,
    starts: Tensor,
    visible: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """`[B, 1 or Hkv, T, L]` bool, which places a query sees."""
    (queries, length), device = (query.shape[2], keys.shape[2]), keys.device
    places = torch.arange(length, device=device)
    last = starts.clamp(-queries, length)[:, None] + torch.arange(queries, device=device)
    seen = (places <= last[..., None])[:, None]
    window = window_within(window, length + queries)
    if window is not None:
        seen = seen & (places > last[..., None] - window)[:, None]
    return seen if visible is None else seen & visible[:, :, None]


def _causal_logits(
    query: Tensor, keys: Tensor, scale: float, softcap: float | None, seen: Tensor
) -> Tensor:
    """`[B, Hq, T, L]` float32, -inf where a query does not see a token."""
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    logits = grouped @ keys.float().transpose(-1, -2)[:, :, None] * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.masked_fill(~seen[:, :, None], float("-inf")).flatten(1, 2)


def _mean_votes(
    weights: Tensor, kv_heads: int, counts: Tensor | None, reduction: Reduction
) -> Tensor:
    """`[B, Hq, T, L]` -> `[B, Hkv, L]`: reduced over the group, then averaged over the first `counts` queries."""
    reduced = reduce_group(weights, kv_heads, reduction)
    if counts is None:
        return reduced.mean(2)
    counts = counts.clamp(0, weights.shape[2])
    voting = torch.arange(weights.shape[2], device=weights.device) < counts[:, None]
    total = reduced.masked_fill(~voting[:, None, :, None], 0.0).sum(2)
    return total / counts.clamp(min=1)[:, None, None]


def _seen(values: Tensor, visible: Tensor | None) -> Tensor:
    """Values in float32, 0 where nothing is seen: even no weight at all would make a NaN of a NaN."""
    values = values.float()
    return values if visible is None else values.masked_fill(~visible[..., None], 0.0)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Over the last dimension: -inf where no token is visible, NaN where no softmax is defined."""
    lse = logits.logsumexp(-1)
    return lse.masked_fill(lse == float("inf"), float("nan"))


def _weights(logits: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the tokens, and over the head's sink where there is one, like `logits`; 0 where none is visible."""
    total = lse if sinks is None else torch.logaddexp(lse, sinks.float())
    return (logits - total.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
