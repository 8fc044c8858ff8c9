"""Several queries of a row at once on CPU: the verification of a draft, and the votes of an observation window.

As in `cpu.py` keys and values are read where they lie. Where torch's fused kernel can serve it gives the output, with
float32 logits also in 16-bit dtypes: everything before the first query is seen by all of them, so the group and the
queries together are one long list of queries, and the few tokens among which it is causal are merged in afterwards. The
scores come from logits that are rounded to the dtype. Same signatures as `reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels import cpu
from refreshkv.kernels.cpu import share_beside_sink, spans
from refreshkv.kernels.reference import Attended, Scored

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


class Scratch:
    """Room for the logits of one part, used again for the next: a fresh one costs its page faults every time."""

    def __init__(self, query: Tensor, keys: Tensor) -> None:
        group, queries, length = query.shape[1] // keys.shape[1], query.shape[2], keys.shape[2]
        self._raw = query.new_empty(group * queries * length)
        self._logits = torch.empty(group * queries * length, dtype=torch.float32)
        self._reduced = torch.empty(queries * length, dtype=torch.float32)

    def product(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`[m, D]` and `[n, D]` -> their inner products, `[m, n]` float32."""
        shape = (queries.shape[0], keys.shape[0])
        raw, logits = (x[: shape[0] * shape[1]].view(shape) for x in (self._raw, self._logits))
        if raw.dtype == torch.float32:
            return torch.mm(queries, keys.T, out=logits)
        return logits.copy_(torch.mm(queries, keys.T, out=raw))

    def largest(self, shares: Tensor) -> Tensor:
        """`[G, T, n]` -> the maximum over the group, `[T, n]`."""
        out = self._reduced[: shares[0].numel()].view(shares.shape[1:])
        return torch.amax(shares, 0, out=out)


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
    """See `reference.verify`."""
    output, scores, lse = _empty(query, keys, values)
    voting = _voting(query, counts)
    one_span = visible is None or visible.shape[1] == 1
    fused = cpu.flash is not None and one_span and softcap is None and window is None
    fused = fused and keys.shape[-1] == values.shape[-1]
    scaled, scratch = _scaled(query, scale), Scratch(query, keys)
    for part in _parts(query, keys, starts, visible, window):
        if fused and part.head == 0 and voting[part.row]:
            _attend(query, keys, values, part, scale, output, lse)
        if fused and not voting[part.row]:
            continue
        logits = _logits(scaled, keys, part, softcap, window, scratch)
        members = _members(query, keys, part)
        if not fused:
            lse[part.row, members] = logits.logsumexp(-1)
        total = _total(lse[part.row, members], sinks, members)
        if not fused:
            weights = (logits - total[..., None]).exp_().to(values.dtype)
            mixed = weights.flatten(0, 1) @ values[part.row, part.head, part.first : part.end]
            output[part.row, members] = mixed.unflatten(0, weights.shape[:2])
        _vote(logits, total, reduction, voting[part.row], scores, part, scratch)
    if fused and sinks is not None:
        output = (output * share_beside_sink(lse, sinks[:, None])[..., None]).to(output.dtype)
    return Attended(output, lse), Scored(scores, lse)


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
    """See `reference.vote`."""
    _, scores, lse = _empty(query, keys, keys)
    voting, scaled, scratch = _voting(query, counts), _scaled(query, scale), Scratch(query, keys)
    for part in _parts(query, keys, starts, visible, None):
        logits = _logits(scaled, keys, part, softcap, None, scratch)
        members = _members(query, keys, part)
        lse[part.row, members] = logits.logsumexp(-1)
        total = _total(lse[part.row, members], sinks, members)
        _vote(logits, total, reduction, voting[part.row], scores, part, scratch)
    return Scored(scores, lse)


def _parts(
    query: Tensor, keys: Tensor, starts: Tensor, visible: Tensor | None, window: int | None
) -> Iterator[Part]:
    """The rows and KV heads whose queries see anything."""
    rows, kv_heads, length, _ = keys.shape
    seen_from = spans(visible, rows, length)
    own_span = len(seen_from[0]) > 1
    for row, start in enumerate(starts.tolist()):
        end = start + query.shape[2]
        for head in range(kv_heads):
            first, hidden = seen_from[row][head if own_span else 0]
            if window is not None and start - window + 1 > first:
                cut = start - window + 1 - first
                first, hidden = first + cut, None if hidden is None else hidden[cut:]
            if first < end:
                hidden = None if hidden is None else hidden[: end - first]
                yield Part(row, head, first, start, end, hidden)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    part: Part,
    scale: float,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Output and log-sum-exp of all heads of a row, written into `output[row]` and `lse[row]`."""
    kv_heads, queries = keys.shape[1], query.shape[2]
    packed = query[part.row].unflatten(0, (kv_heads, -1)).flatten(1, 2)[None]  # [1, Hkv, G * T, D]
    new = slice(part.start, part.end)
    tail = packed[0].float() @ keys[part.row, :, new].float().transpose(-1, -2) * scale
    unseen = torch.ones(queries, queries, dtype=torch.bool).triu(1)
    if part.hidden is not None:
        unseen = unseen | _padded(part.hidden, queries)
    elif part.first > part.start:
        unseen = unseen | (torch.arange(queries) < part.first - part.start)
    tail.unflatten(1, (-1, queries)).masked_fill_(unseen, float("-inf"))
    late = tail.logsumexp(-1)
    weights = (tail - late.clamp(min=_LOWEST)[..., None]).exp_()
    mixed = weights @ values[part.row, :, new].float()
    total = late
    if part.first < part.start:
        old = (slice(part.row, part.row + 1), slice(None), slice(part.first, part.start))
        options: dict[str, Any] = {"scale": scale}
        if part.hidden is not None:
            mask = torch.zeros(part.start - part.first, dtype=query.dtype)
            mask.masked_fill_(part.hidden[: len(mask)], float("-inf"))
            options["attn_mask"] = mask.expand(*packed.shape[:3], -1)
        assert cpu.flash is not None
        before, early = cpu.flash(packed, keys[old], values[old], 0.0, False, **options)
        total = torch.logaddexp(early[0], late)
        mixed = mixed * (late - total).exp()[..., None]
        mixed += before[0].float() * (early[0] - total).exp()[..., None]
    output[part.row] = mixed.unflatten(1, (-1, queries)).flatten(0, 1)
    lse[part.row] = total.unflatten(1, (-1, queries)).flatten(0, 1)


def _logits(
    scaled: Tensor,
    keys: Tensor,
    part: Part,
    softcap: float | None,
    window: int | None,
    scratch: Scratch,
) -> Tensor:
    """`[G, T, n]` float32, -inf where a query does not see a place."""
    queries, members = scaled.shape[2], _members(scaled, keys, part)
    own = keys[part.row, part.head, part.first : part.end]
    product = scratch.product(scaled[part.row, members].flatten(0, 1), own)
    logits = product.unflatten(0, (-1, queries))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if part.hidden is not None:
        logits.masked_fill_(part.hidden, float("-inf"))
    later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
    causal = logits[..., max(0, part.start - part.first) :]
    causal.masked_fill_(later[:, -causal.shape[-1] :], float("-inf"))
    if window is not None:
        last = (part.start + torch.arange(queries))[:, None]
        too_old = torch.arange(part.first, part.end) <= last - window
        logits.masked_fill_(too_old, float("-inf"))
    return logits


def _vote(
    logits: Tensor,
    total: Tensor,
    reduction: Reduction,
    voting: int,
    scores: Tensor,
    part: Part,
    scratch: Scratch,
) -> None:
    """The mean of the first `voting` queries' group-reduced weights, written into `scores`; `logits` are used up."""
    if not voting:
        return
    shares = logits.sub_(total[..., None])
    # The largest weight is that of the largest logit: only one of a group is exponentiated.
    reduced = scratch.largest(shares).exp_() if reduction == "max" else shares.exp_().mean(0)
    torch.mean(reduced[:voting], 0, out=scores[part.row, part.head, part.first : part.end])


def _total(lse: Tensor, sinks: Tensor | None, members: slice) -> Tensor:
    """`[G, T]`: what the logits of a query head are measured against, its sink included; finite."""
    total = lse if sinks is None else torch.logaddexp(lse, sinks[members, None].float())
    return total.clamp(min=_LOWEST)


def _members(query: Tensor, keys: Tensor, part: Part) -> slice:
    group = query.shape[1] // keys.shape[1]
    return slice(part.head * group, (part.head + 1) * group)


def _empty(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, scores and log-sum-exp of rows that see nothing."""
    output = values.new_zeros(*query.shape[:3], values.shape[-1])
    scores = torch.zeros(*keys.shape[:3], dtype=torch.float32)
    return output, scores, torch.full(query.shape[:3], float("-inf"), dtype=torch.float32)


def _voting(query: Tensor, counts: Tensor | None) -> list[int]:
    return [query.shape[2]] * query.shape[0] if counts is None else counts.tolist()


def _scaled(query: Tensor, scale: float) -> Tensor:
    return (query * scale).to(query.dtype)


def _padded(hidden: Tensor, queries: int) -> Tensor:
    """What of the newest `queries` places is hidden; places before the first visible one are."""
    newest = hidden[-queries:]
    return torch.nn.functional.pad(newest, (queries - len(newest), 0), value=True)
