"""The CPU path: one KV head at a time, so that every key and value is read once and never copied.

Two facts about CPU torch shape it. A batched matmul over a buffer with spare capacity clones the whole operand, while
the `[L, D]` block of one head is contiguous; and the scores of a full step are there for free when the two matmuls are
written out (`cpu_heads.py`). In 16-bit dtypes the logits of a scored full step are rounded to that dtype, as in eager
attention.

Same signatures as `reference.py`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels import reference
from refreshkv.kernels.cpu_heads import attend_heads, pairs, share_beside_sink
from refreshkv.kernels.reference import Attended, Scored
from refreshkv.policy.selection import FREE, Selection, candidates, slot_count

_LONG = 4096  # tokens: below, a loop over heads does not pay

# Attention with its log-sum-exp; `scaled_dot_product_attention` runs this very kernel but keeps the log-sum-exp.
flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


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
    """See `reference.attend`. The GQA group is packed as if it were a sequence of G queries."""
    keys, values, visible = _within(lengths, visible, keys, values)
    options = {"scale": scale, "softcap": softcap, "sinks": sinks, "visible": visible}
    fused = flash is not None and softcap is None and keys.shape[-1] == values.shape[-1]
    if not fused or not keys.shape[2]:
        if keys.shape[2] < _LONG:
            return reference.attend(query, keys, values, **options)  # type: ignore[arg-type]
        return attend_and_score(query, keys, values, **options)[0]  # type: ignore[arg-type]
    packed = query.unflatten(1, (keys.shape[1], -1))
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
        mask = mask[:, :, None].expand(*packed.shape[:3], -1)
    output, lse = flash(packed, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    if visible is not None:  # the fused kernel gives a row that sees nothing some log-sum-exp
        lse = lse.masked_fill(~visible.any(-1)[..., None], float("-inf"))
    # The fused kernel's log-sum-exp is float64 for such tensors.
    output, lse = output.flatten(1, 2), lse.flatten(1, 2).float()
    if sinks is not None:
        output = output * share_beside_sink(lse, sinks)[..., None].to(output.dtype)
    # The fused kernel adds a mask to what may be NaN, and an infinite logit may leave its output finite: two sums tell.
    if not (math.isfinite(output.detach().sum()) and float(lse.detach().sum()) < math.inf):
        return reference.attend(query, keys, values, **options)  # type: ignore[arg-type]
    return Attended(output, lse)


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
    """See `reference.attend_and_score`."""
    entries = keys.shape[2]
    keys, values, visible = _within(lengths, visible, keys, values)
    attended, scored = _one_query(
        query, keys, values, scale, softcap, sinks, visible, reduction, heads
    )
    return attended, _padded(scored, entries)


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
    """See `reference.score`."""
    entries = keys.shape[2]
    keys, _, visible = _within(lengths, visible, keys, keys)
    _, scored = _one_query(query, keys, None, scale, softcap, sinks, visible, reduction, heads)
    return _padded(scored, entries)


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
    """See `reference.attend_and_rank`. In 16-bit dtypes the ranks come from logits rounded to that dtype."""
    entries = keys.shape[2]
    keys, values, visible = _within(lengths, visible, keys, values)
    attended = attend(
        query, keys, values, scale=scale, softcap=softcap, sinks=sinks, visible=visible
    )
    # Within a KV head only: a sink, which scales a query head's weights, does count among those of a group.
    logits = (query * scale).unflatten(1, (keys.shape[1], -1)) @ keys.transpose(-1, -2)
    logits = logits.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    total = attended.lse if sinks is None else torch.logaddexp(attended.lse, sinks.float())
    total = total.masked_fill(attended.lse == float("-inf"), 0.0)
    weights = (logits - total.unflatten(1, (keys.shape[1], -1))[..., None]).exp_()
    scores = weights.amax(2) if reduction == "max" else weights.mean(2)
    if visible is not None:
        scores = scores.masked_fill(~visible, 0.0)
    scores = torch.nn.functional.pad(scores, (0, entries - scores.shape[2]))
    return attended, reference.top_slots(scores, newest, count)


def select(
    scores: Tensor,
    budget: Tensor,
    *,
    pool_kernel: int = 7,
    visible: Tensor | None = None,
    heads: Tensor | None = None,
    recent: int | Tensor = 0,
    anchors: Tensor | None = None,
    ends: Tensor | None = None,
    slots: int | None = None,
) -> Selection:
    """See `selection.select`. NumPy partitions a row several times faster than `topk` and sorts only the K best."""
    most = slot_count(budget, slots, scores.shape[-1])
    pooled, filled = candidates(scores, budget, pool_kernel, visible, recent, anchors, ends, most)
    positions = np.full((*scores.shape[:2], most), FREE, dtype=np.int64)
    counts = filled.tolist()
    for row, head in pairs(scores, heads):
        count = counts[row][head]
        if count:
            positions[row, head, :count] = _best(pooled[row, head].numpy(), count)
    return Selection(torch.from_numpy(positions), filled)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` >= 1 best of one head, `[L]` -> `[count]`, lowest first; ties to the later token."""
    # Non-negative floats order like their bits, and integers partition faster.
    bits = scores.view(np.int32)
    threshold = np.partition(bits, len(bits) - count)[-count]
    reaching = np.flatnonzero(bits >= threshold)
    # Score over position, as in `selection.rank_keys`, but only for these; at a tie they are more than `count`.
    keys = (bits[reaching].astype(np.int64) << 32) | reaching
    keys.sort()
    return keys[-count:] & 0xFFFFFFFF


def gather(source: Tensor, positions: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """See `reference.gather`. Where filled slots come first, as they do, a head is one contiguous `index_select`."""
    wanted = (positions >= 0) & (positions < source.shape[2])
    if bool((wanted[..., 1:] > wanted[..., :-1]).any()):
        return reference.gather(source, positions, out, heads)
    counts = wanted.sum(-1).tolist()
    for row, head in pairs(positions, heads):
        count = counts[row][head]
        torch.index_select(
            source[row, head], 0, positions[row, head, :count], out=out[row, head, :count]
        )


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
    """See `reference.insert`. Only what is missing is touched, all of it at once."""
    missing, budget = reference.missing_from(ring_positions, wanted, budget, keys.shape[2])
    order = missing.cumsum(-1) - 1
    entered = missing.sum(-1)
    # Of tokens that share a slot, where they are more than K, the last stays.
    missing &= order >= entered[..., None] - budget[:, None, None]
    row, head, index = missing.nonzero(as_tuple=True)
    position = wanted[row, head, index]
    slot = ((filled + pushed)[row, head] + order[row, head, index]) % budget[row]
    ring_keys[row, head, slot] = keys[row, head, position]
    ring_values[row, head, slot] = values[row, head, position]
    ring_positions[row, head, slot] = position
    pushed += entered
    return entered


def _within(
    lengths: Tensor | None, visible: Tensor | None, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The entries that count for any head, and which of them for which; nothing beyond is read."""
    if lengths is None or not lengths.numel():
        return keys, values, visible
    longest = min(max(1, int(lengths.max())), keys.shape[2])  # one hidden entry where there is none
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    visible = None if visible is None else visible[..., :longest]
    if not bool((lengths >= longest).all()):
        visible = reference.within(lengths, visible, longest)
    return keys, values, visible


def _padded(scored: Scored, entries: int) -> Scored:
    """No score for what lies beyond the lengths."""
    missing = entries - scored.scores.shape[2]
    return (
        scored._replace(scores=torch.nn.functional.pad(scored.scores, (0, missing)))
        if missing
        else scored
    )


def _one_query(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
    reduction: Reduction,
    heads: Tensor | None,
) -> tuple[Attended, Scored]:
    """Output, log-sum-exp and scores of a query after everything else."""
    rows, _, length, _ = keys.shape
    output, scores, lse = attend_heads(
        query[:, :, None],
        keys,
        values,
        starts=[length - 1] * rows,
        counts=[1] * rows,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
        reduction=reduction,
        heads=heads,
    )
    lse = lse.squeeze(2)
    return Attended(output.squeeze(2), lse), Scored(scores, lse)
