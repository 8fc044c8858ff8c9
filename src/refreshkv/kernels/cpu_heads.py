"""Attention with its scores on CPU, one row and KV head after the other: every key and value is read where it lies.

The softmax is written out, because its parts are the log-sum-exp and the scores. One query of a row, as in a decode
step, or several, as in the verification of a draft: the group and the queries together are one list of queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.cpu_product import Room
from refreshkv.kernels.cpu_threads import in_shares

_LONG = 4096  # tokens: a head of so many is worth a thread
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Part:
    """What the queries of one row and KV head look at: the places `first` .. `end`, `hidden` `[n]` not among them."""

    row: int
    head: int
    first: int
    start: int  # the place of the first query
    end: int
    hidden: Tensor | None


def attend_heads(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *,
    starts: list[int],
    counts: list[int],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
    reduction: Reduction,
    window: int | None = None,
    heads: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, Hq, T, D]`, scores `[B, Hkv, L]` and log-sum-exp `[B, Hq, T]`, the last two float32.

    Arguments as for `reference.verify` and `reference.attend`; `starts` and `counts` have an entry a row. Without
    `values` the output is empty; rows whose count is 0 and heads that are not wanted hold zeros and -inf.
    """
    (rows, query_heads, queries, _), (_, kv_heads, length, dim) = query.shape, keys.shape
    group = query_heads // kv_heads
    width = 0 if values is None else values.shape[-1]
    output = query.new_zeros(rows, query_heads, queries, width)
    # Where every score is written, none needs a zero.
    whole = visible is None and heads is None and window is None and all(counts)
    whole = whole and all(start + queries == length for start in starts)
    new = torch.empty if whole else torch.zeros
    scores = new(rows, kv_heads, length, dtype=torch.float32)
    lse = torch.full((rows, query_heads, queries), float("-inf"), dtype=torch.float32)
    scaled = query.float() * scale  # on G x D numbers instead of G x L
    reduce = torch.amax if reduction == "max" else torch.mean

    def work(parts: Sequence[Part]) -> None:
        room = Room(group * queries, max(counts, default=0), length, dim, keys.dtype)
        for part in parts:
            voting = counts[part.row]
            members = slice(part.head * group, (part.head + 1) * group)
            own = (part.row, part.head, slice(part.first, part.end))
            logits = room.logits(scaled[part.row, members].flatten(0, 1), keys[own])
            logits = logits.unflatten(0, (group, queries))
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            _hide(logits, part, window)
            lse[part.row, members] = _softmax(logits)
            weights = logits
            if sinks is not None:
                share = share_beside_sink(lse[part.row, members], sinks[members, None])
                weights.mul_(share[..., None])
            if values is not None:
                mixed = room.mix(weights.flatten(0, 1), values[own])
                if part.hidden is not None and not bool(mixed.isfinite().all()):
                    shown = values[own].masked_fill(part.hidden[:, None], 0.0)
                    mixed = room.mix(weights.flatten(0, 1), shown)
                output[part.row, members] = mixed.unflatten(0, (group, queries))
            if voting == 1:
                reduce(weights[:, 0], 0, out=scores[own])
            else:
                reduced = room.reduced(voting, weights.shape[-1])
                torch.mean(reduce(weights[:, :voting], 0, out=reduced), 0, out=scores[own])

    parts = [
        part for part in _parts(keys, starts, queries, visible, window, heads) if counts[part.row]
    ]
    if length >= _LONG and torch.get_num_threads() > 1:
        in_shares(work, parts)
    else:
        work(parts)
    return output, scores, lse


def share_beside_sink(lse: Tensor, sinks: Tensor) -> Tensor:
    """What is left for the tokens: a sink only adds to the denominator. exp(lse) / (exp(lse) + exp(sink))."""
    return torch.sigmoid(lse - sinks.float()).masked_fill(lse == float("-inf"), 0.0)


def _parts(
    keys: Tensor,
    starts: list[int],
    queries: int,
    visible: Tensor | None,
    window: int | None,
    heads: Tensor | None,
) -> Iterator[Part]:
    """The rows and wanted KV heads whose queries see anything."""
    rows, _, length, _ = keys.shape
    seen_from = _spans(visible, rows, length)
    own_span = rows > 0 and len(seen_from[0]) > 1  # else the heads of a row share one
    for row, head in pairs(keys, heads):
        start, end = starts[row], min(starts[row] + queries, length)
        first, hidden = seen_from[row][head if own_span else 0]
        if window is not None and start - window + 1 > first:
            cut = start - window + 1 - first
            first, hidden = first + cut, None if hidden is None else hidden[cut:]
        if first < end:
            hidden = None if hidden is None else hidden[: end - first]
            yield Part(row, head, first, start, end, hidden)


def pairs(like: Tensor, heads: Tensor | None) -> list[list[int]]:
    """The (row, KV head) pairs to work on."""
    if heads is not None:
        return heads.nonzero().tolist()
    return [[row, head] for row in range(like.shape[0]) for head in range(like.shape[1])]


def _spans(visible: Tensor | None, rows: int, length: int) -> list[list[tuple[int, Tensor | None]]]:
    """Per row and head: the first visible token, and what is hidden after it (`None` where nothing is, as usual).

    `visible` is `[B or 1, Hkv or 1, L]`; one head stands for all. Left padding is cut off rather than masked: it costs
    nothing, and a row computes exactly what it would alone.
    """
    if visible is None or not length:
        return [[(0, None)]] * rows
    visible = visible.expand(rows, -1, -1)
    first = visible.int().argmax(-1)
    whole = (visible.sum(-1) == length - first).tolist()
    return [
        [
            (start, None if whole[row][head] else ~visible[row, head, start:])
            for head, start in enumerate(first[row].tolist())
        ]
        for row in range(rows)
    ]


def _hide(logits: Tensor, part: Part, window: int | None) -> None:
    """-inf where a query does not see a place, in `logits` `[G, T, n]`."""
    queries = logits.shape[1]
    if part.hidden is not None:
        logits.masked_fill_(part.hidden, float("-inf"))
    if queries > 1:
        later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
        causal = logits[..., max(0, part.start - part.first) :]
        later = later[:, max(0, part.first - part.start) :][:, : causal.shape[-1]]
        causal.masked_fill_(later, float("-inf"))
    if window is not None:
        last = (part.start + torch.arange(queries))[:, None]
        too_old = torch.arange(part.first, part.end) <= last - window
        logits.masked_fill_(too_old, float("-inf"))


def _softmax(logits: Tensor) -> Tensor:
    """In place, over the last dimension; returns the log-sum-exp. Where everything is -inf: 0, and -inf."""
    top = logits.amax(-1, keepdim=True).clamp_(min=_LOWEST)
    mass = logits.sub_(top).exp_().sum(-1, keepdim=True)
    # At least 1 where anything is visible, because the largest weight was.
    logits.mul_(mass.clamp(min=1.0).reciprocal())
    return (mass.log() + top).squeeze(-1)
