"""Attention of a decode step in short, readable float32: the definition every fast kernel is tested against.

Letters as in `kernels.options`; T queries of a row. Source: RefreshKV, sections 2 and 3; `attend_and_rank`, `verify`
and `vote` are ours. RoPE is already applied.

No number in a tensor makes a kernel read or write elsewhere, raise, or leave these rules. How many entries, queries or
slots count (lengths, counts, count, budget) is cut to what there is, a start to -T .. L. A position that is not in the
store, or whose page is not, is a free one; a row that is not there sees nothing. A NaN or +inf among the logits of a
query, or a NaN as its sink, makes its output and weights NaN, as in torch; the logits also its lse. A NaN among the
values reaches its own dim. What no query of a row sees is not used, whatever it holds; its scores are 0, or NaN where a
weight of the KV head is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.options import Attended, AttendOptions, Entries, Scored, window_within
from refreshkv.policy.selection import FREE, rank_keys, reduce_group


def attend(query: Tensor, entries: Entries, options: AttendOptions) -> Attended:
    """Attention of one query token `[B, Hq, D]`: the partial step, or a plain full step."""
    keys, values, visible = seen_entries(entries, options, query.shape[0])
    assert values is not None
    logits = logits_of(query, keys, options, visible)
    lse = log_sum_exp(logits)
    weights = _weights(logits, lse, options.sinks)
    output = weights.unflatten(1, (entries.kv_heads, -1)) @ seen_values(values, visible)
    return Attended(output.flatten(1, 2).to(values.dtype), lse)


def attend_and_score(
    query: Tensor, entries: Entries, options: AttendOptions, *, into: Tensor | None = None
) -> tuple[Attended, Scored]:
    """The full step: attention over everything, and the scores from which the partial cache is rebuilt.

    `into` `[B, Hq, D]`, contiguous, is the output where it is given: that of the heads asked for is written there, and
    what it holds of the others stays.
    """
    attended = written_into(into, attend(query, entries, options), options)
    return attended, Scored(score(query, entries, options).scores, attended.lse)


def written_into(into: Tensor | None, attended: Attended, options: AttendOptions) -> Attended:
    """`attended` with the output of the heads asked for in `into`, where that is given."""
    if into is None:
        return attended
    output = attended.output
    if options.heads is not None:
        wanted = options.heads.repeat_interleave(into.shape[1] // options.heads.shape[1], 1)
        output = torch.where(wanted[..., None], output, into)
    return Attended(into.copy_(output), attended.lse)


def score(query: Tensor, entries: Entries, options: AttendOptions) -> Scored:
    """The attention that each entry receives from this query, without touching the values."""
    keys, _, visible = seen_entries(entries, options, query.shape[0])
    logits = logits_of(query, keys, options, visible)
    lse = log_sum_exp(logits)
    weights = _weights(logits, lse, options.sinks)
    return Scored(reduce_group(weights, entries.kv_heads, options.reduction), lse)


def attend_and_rank(
    query: Tensor, entries: Entries, options: AttendOptions, *, newest: Tensor, count: int
) -> tuple[Attended, Tensor]:
    """The partial step, and the most attended of the entries, best first, `[B, Hkv, count]` int64, as their indices.

    `newest` `[B, Hkv]` int64 is the entry of the token being decoded, left out unless there are too few others. An
    entry whose weight is NaN ranks as one without any.
    """
    scores = score(query, entries, options).scores
    return attend(query, entries, options), top_slots(scores, newest, count)


def top_slots(scores: Tensor, newest: Tensor, count: int) -> Tensor:
    """The `count` best of `scores` `[B, Hkv, n]` without `newest`; ties go to the later, NaN counts as 0."""
    slots = scores.shape[-1]
    left = scores.where(scores > 0, 0.0)
    left = left.masked_fill(torch.arange(slots, device=scores.device) == newest[..., None], -1.0)
    return rank_keys(left).topk(max(0, min(count, slots)), dim=-1).values & 0xFFFFFFFF


def verify(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    window: int | None = None,
    expected: Tensor | None = None,
) -> tuple[Attended, Scored]:
    """Full attention of the T newest tokens of each row, causal among them, and the scores that they give together.

    Args:
        query: `[B, Hq, T, D]`.
        entries: without a list of positions, which would leave out what a full pass is for.
        options: `visible` is that of all queries.
        starts: `[B]` int64, the position of each row's first query; query t sees those up to `starts + t` < L.
        counts: `[B]` int64, how many of a row's queries vote; `None`: all T. What others give may be anything.
        window: a query sees no more than this many positions, its own included.
        expected: `[B, Hq, T]` float32, a guess of each log-sum-exp (ours). A kernel then knows the share of a key when
            it reads the key, and need not read it again. Only the scores depend on it: a weight is what the guess makes
            of it, at most 1. A query whose guess is NaN or infinite gives nothing, but counts in the mean; so does a
            NaN among the logits. A kernel that knows the log-sum-exp at no cost may leave the guess unused.

    Returns:
        output `[B, Hq, T, D]` and lse `[B, Hq, T]`; scores `[B, Hkv, L]` float32, the mean over the voting queries of
        the group-reduced attention.
    """
    keys, values, visible = seen_entries(without_list(entries), options, query.shape[0])
    assert values is not None
    seen = _causal(query, keys, starts, visible, window)
    logits = _causal_logits(query, keys, options, seen)
    lse = log_sum_exp(logits)
    sinks = None if options.sinks is None else options.sinks[:, None]
    weights = _weights(logits, lse, sinks)
    output = (
        weights.unflatten(1, (keys.shape[1], -1)) @ seen_values(values, seen.any(2))[:, :, None]
    )
    if expected is not None:
        weights = _expected_weights(logits, expected, sinks)
    scores = _mean_votes(weights, keys.shape[1], counts, options.reduction)
    return Attended(output.flatten(1, 2).to(values.dtype), lse), Scored(scores, lse)


def vote(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
) -> Scored:
    """The scores of `verify` without touching the values."""
    keys, _, visible = seen_entries(without_list(entries), options, query.shape[0])
    logits = _causal_logits(query, keys, options, _causal(query, keys, starts, visible))
    lse = log_sum_exp(logits)
    weights = _weights(logits, lse, None if options.sinks is None else options.sinks[:, None])
    return Scored(_mean_votes(weights, keys.shape[1], counts, options.reduction), lse)


def seen_entries(
    entries: Entries, options: AttendOptions, rows: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys and values `[B, Hkv, n, D]`, as if there were neither pages nor a list, and which count, for `rows` rows."""
    keys, values, stored = laid_out(entries, rows)
    visible = options.visible
    if options.lengths is not None:
        inside = torch.arange(entries.count, device=keys.device) < options.lengths[..., None]
        visible = inside if visible is None else inside & visible
    if stored is not None:
        visible = stored if visible is None else stored & visible
    return keys, values, visible


def laid_out(entries: Entries, rows: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys and values `[B, Hkv, n, D]` of the entries, and which of them exist, `[B, Hkv, n]`; `None`: all do."""
    if entries.blocks is None and entries.positions is None and entries.rows is None:
        return entries.keys, entries.values, None
    if entries.positions is None:
        positions = torch.arange(entries.width, device=entries.keys.device)
        return entries_at(entries, positions.expand(rows, entries.kv_heads, -1))
    row, there = kept_rows(entries, rows, len(entries.positions))
    if not len(entries.positions):
        positions = entries.positions.new_full((rows, *entries.positions.shape[1:]), FREE)
    else:
        positions = entries.positions[row].masked_fill(~there[:, None, None], FREE)
    return entries_at(entries, positions)


def entries_at(entries: Entries, positions: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Keys and values `[B, Hkv, m, D]` at `positions` `[B, Hkv, m]` of this step's rows, and which of them exist."""
    keys, values, size = entries.keys, entries.values, entries.keys.shape[2]
    rows, kv_heads, count = positions.shape
    stored = (positions >= 0) & (positions < entries.width)
    if not (entries.width and keys.shape[0]):  # an empty store has nothing to point at
        shape = (rows, kv_heads, count)
        no_values = None if values is None else values.new_zeros(*shape, values.shape[-1])
        return keys.new_zeros(*shape, keys.shape[-1]), no_values, torch.zeros_like(stored)
    position = positions.long().where(stored, 0)
    if entries.blocks is None:
        row, there = kept_rows(entries, rows, keys.shape[0])
        stored, page = stored & there[:, None, None], row[:, None, None]
    else:
        batch = torch.arange(rows, device=keys.device)[:, None, None]
        page, position = entries.blocks.long()[batch, position // size], position % size
        stored = stored & (page >= 0) & (page < keys.shape[0])
        page = page.where(stored, 0)
    head = torch.arange(kv_heads, device=keys.device)[:, None]
    at = page, head, position
    return keys[at], None if values is None else values[at], stored


def kept_rows(entries: Entries, rows: int, kept: int) -> tuple[Tensor, Tensor]:
    """`[B]` int64, where what is kept for each row lies among `kept` rows, 0 where it does not; and whether it does."""
    if entries.rows is None:
        row = torch.arange(rows, device=entries.keys.device)
    else:
        row = entries.rows.long()
    there = (row >= 0) & (row < kept)
    return row.where(there, 0), there


def without_list(entries: Entries) -> Entries:
    """`entries`, if all positions of a row are meant. Raises `ValueError` for a list of positions."""
    if entries.positions is not None:
        raise ValueError("a full pass reads every position: give entries without a list of them")
    return entries


def logits_of(
    query: Tensor, keys: Tensor, options: AttendOptions, visible: Tensor | None
) -> Tensor:
    """`[B, Hq, n]` float32: q k^T * scale, capped, -inf where an entry is not visible."""
    seen = None if visible is None else visible[:, :, None]
    return _causal_logits(query[:, :, None], keys, options, seen).squeeze(2)


def _causal(
    query: Tensor,
    keys: Tensor,
    starts: Tensor,
    visible: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """`[B, 1 or Hkv, T, L]` bool, which positions a query sees."""
    (queries, length), device = (query.shape[2], keys.shape[2]), keys.device
    positions = torch.arange(length, device=device)
    last = starts.clamp(-queries, length)[:, None] + torch.arange(queries, device=device)
    seen = (positions <= last[..., None])[:, None]
    window = window_within(window, length + queries)
    if window is not None:
        seen = seen & (positions > last[..., None] - window)[:, None]
    return seen if visible is None else seen & visible[:, :, None]


def _causal_logits(
    query: Tensor, keys: Tensor, options: AttendOptions, seen: Tensor | None
) -> Tensor:
    """`[B, Hq, T, n]` float32, -inf where a query does not see an entry; `seen` broadcasts to `[B, Hkv, T, n]`."""
    # [B, Hkv, G * T, D]: every key is read once per group.
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    logits = grouped.flatten(2, 3) @ keys.float().transpose(-1, -2) * options.scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    logits = logits.unflatten(2, grouped.shape[2:4])
    if seen is not None:
        logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    return logits.flatten(1, 2)


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


def seen_values(values: Tensor, visible: Tensor | None) -> Tensor:
    """Values in float32, 0 where nothing is seen: even no weight at all would make a NaN of a NaN."""
    values = values.float()
    return values if visible is None else values.masked_fill(~visible[..., None], 0.0)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Over the last dimension: -inf where no token is visible, NaN where no softmax is defined."""
    lse = logits.logsumexp(-1)
    return lse.masked_fill(lse == float("inf"), float("nan"))


def _weights(logits: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the tokens, and over the head's sink where there is one, like `logits`; 0 where none is visible."""
    total = lse if sinks is None else torch.logaddexp(lse, sinks.float())
    return (logits - total.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()


def _expected_weights(logits: Tensor, expected: Tensor, sinks: Tensor | None) -> Tensor:
    """As `_weights`, by a guess of each log-sum-exp; 0 where that or the logit is NaN, or the guess infinite."""
    weights = (logits - expected[..., None]).exp().clamp(max=1.0)
    if sinks is not None:
        weights = weights * torch.sigmoid(expected - sinks.float())[..., None]
    return weights.nan_to_num(0.0).masked_fill(~expected.isfinite()[..., None], 0.0)
