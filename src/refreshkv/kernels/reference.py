"""One decode step of attention in short, readable float32: the definition every fast kernel is tested against.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, L tokens, D head dim, K slots of a partial cache.
Source: RefreshKV, sections 2 and 3. The query is that of a single new token; RoPE is already applied everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.selection import reduce_group


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
) -> Attended:
    """Attention of one query token over the given entries: the partial step, or a plain full step.

    Args:
        query: `[B, Hq, D]`.
        keys, values: `[B, Hkv, L, D]`.
        scale: factor on the logits.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        sinks: `[Hq]`, one extra logit per head that receives attention and gives no value (gpt-oss).
        visible: `[B or 1, Hkv or 1, L]` bool; `None` when everything is. A row that sees nothing gives 0.
    """
    logits = _logits(query, keys, scale, softcap, visible)
    lse = logits.logsumexp(-1)
    weights = _weights(logits, lse, sinks)
    output = weights.unflatten(1, (keys.shape[1], -1)) @ values.float()
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
    reduction: Reduction = "max",
    heads: Tensor | None = None,
) -> tuple[Attended, Scored]:
    """The full step: attention over everything, and the scores from which the partial cache is rebuilt.

    `heads` `[B, Hkv]` bool names the KV heads whose result the caller uses; the others may hold anything.
    """
    attended = attend(
        query, keys, values, scale=scale, softcap=softcap, sinks=sinks, visible=visible
    )
    return attended, score(
        query, keys, scale=scale, softcap=softcap, sinks=sinks, visible=visible, reduction=reduction
    )


def score(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    reduction: Reduction = "max",
) -> Scored:
    """The attention that each token receives from this query, without touching the values."""
    logits = _logits(query, keys, scale, softcap, visible)
    lse = logits.logsumexp(-1)
    return Scored(reduce_group(_weights(logits, lse, sinks), keys.shape[1], reduction), lse)


def gather(source: Tensor, positions: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """Copy rows `positions` `[B, Hkv, K]` of `source` `[B, Hkv, L, D]` to slots 0 .. K-1 of `out` `[B, Hkv, C, D]`.

    Free slots (negative positions) and heads that `heads` `[B, Hkv]` leaves out keep what they held.
    """
    wanted = positions >= 0
    if heads is not None:
        wanted = wanted & heads[..., None]
    rows = source.gather(2, positions.clamp(min=0)[..., None].expand(-1, -1, -1, source.shape[-1]))
    slots = out[:, :, : positions.shape[-1]]
    slots.copy_(torch.where(wanted[..., None], rows, slots))


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


def _weights(logits: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the tokens, and over the head's sink where there is one. `[B, Hq, L]`; 0 where none is visible."""
    total = lse if sinks is None else torch.logaddexp(lse, sinks.float())
    return (logits - total.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
