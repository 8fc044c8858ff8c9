"""Which tokens enter the partial cache: attention weights -> one score per token -> the K best, lowest first.

Plain torch on plain tensors; this is the definition that faster kernels must equal.
Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, L tokens so far, K budget.
Source: RefreshKV, section 3; the tie rule is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Reduction

FREE = -1  # the position of a slot that holds no token
# Attention weights are at most 1. What is kept by rule ranks above: anchors by their score, then the newest tokens.
_ANCHOR = 2.0
_RECENT = 4.0


class Selected(NamedTuple):
    """The tokens chosen for each partial cache.

    positions: `[B, Hkv, K]` int32, slots 0 .. filled-1 hold tokens with the lowest score first, the rest `FREE`.
        K is `slots` or else the largest budget of the batch, and at most L.
    filled: `[B, Hkv]` int64, how many slots hold a token.
    """

    positions: Tensor
    filled: Tensor


def reduce_group(weights: Tensor, kv_heads: int, reduction: Reduction) -> Tensor:
    """Attention weights of the query heads `[B, Hq, ...]` -> one score per KV head `[B, Hkv, ...]`."""
    grouped = weights.unflatten(1, (kv_heads, -1))
    return grouped.amax(2) if reduction == "max" else grouped.mean(2)


def pool(scores: Tensor, kernel: int) -> Tensor:
    """Each token takes the best score within `kernel // 2` neighbours. `[B, Hkv, L]` -> the same shape."""
    if kernel == 1:
        return scores
    return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def pool_width(kernel: int, length: int) -> int:
    """`kernel`, no wider than it matters among `length` tokens."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"pool_kernel must be an odd integer >= 1; got {kernel}")
    return min(kernel, max(1, 2 * length - 1))


def slot_count(budget: Tensor, slots: int | None, length: int) -> int:
    """The K of a result: `slots`, or the largest budget, within 0 .. L."""
    most = max(budget.tolist(), default=0) if slots is None else slots
    return max(0, min(most, length))


def candidates(
    scores: Tensor,
    budget: Tensor,
    pool_kernel: int,
    visible: Tensor | None,
    recent: int | Tensor = 0,
    anchors: Tensor | None = None,
    ends: Tensor | None = None,
    slots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What a selection ranks, `[B, Hkv, L]` float32, and how many slots to fill, `[B, Hkv]`; arguments as for `select`.

    Pooled scores, padding at -1 below every token, anchors and the newest tokens above all others. Padding neither
    enters nor lends its neighbours a score. A row fills min(K, slots, visible tokens) slots.
    """
    rows, kv_heads, length = scores.shape
    positions = torch.arange(length, device=scores.device)
    last = torch.full((rows,), length, device=scores.device)
    if ends is not None:
        last = ends.clamp(0, length)
        within = positions < last[:, None]
        visible = within if visible is None else visible & within
    tokens = last if visible is None else visible.sum(-1)
    counted = scores > 0
    if visible is not None:
        counted = counted & visible[:, None]
    pooled = pool(scores.where(counted, 0.0), pool_width(pool_kernel, length)).float()
    if anchors is not None:
        inside = (anchors >= 0) & (anchors < length)
        lift = pooled.new_zeros(rows, kv_heads, length + 1)
        lift.scatter_(-1, torch.where(inside, anchors, length).long(), _ANCHOR)
        pooled = pooled + lift[..., :length]
    if isinstance(recent, Tensor) or recent:
        if isinstance(recent, Tensor):
            first = last - recent.clamp(0, length)
        else:
            first = last - max(0, min(recent, length))
        pooled = pooled.masked_fill((positions >= first[:, None])[:, None], _RECENT)
    if visible is not None:
        pooled = pooled.masked_fill(~visible[:, None], -1.0)
    filled = budget.clamp(0, slots).minimum(tokens)[:, None].expand(-1, kv_heads).contiguous()
    return pooled.contiguous(), filled


def recent_share(budget: Tensor, recent: int) -> Tensor | int:
    """How many of the newest tokens a selection of K keeps, `[B]`: `recent`, at most a quarter of K (ours).

    Next to anchors, which are half of K by default, a small K would otherwise have no slot left to select for.
    """
    return torch.clamp(budget // 4, max=recent) if recent else 0


def rank_keys(scores: Tensor) -> Tensor:
    """Distinct int64 keys in the order of the scores, `[B, Hkv, L]`; negative ones for negative scores, no NaN or -0.

    Pooling makes plateaus, so the K-th place often cuts a tie, and a plain top-K then depends on the layout of the
    batch. The bits of a non-negative float32 order like an integer; the position below them breaks every tie in
    favour of the later token.
    """
    bits = scores.view(torch.int32).long() << 32
    return bits | torch.arange(scores.shape[-1], device=scores.device)


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
) -> Selected:
    """The K best tokens of each KV head after pooling.

    Whatever the numbers, the result is one: `filled` distinct positions of visible tokens. A score that is NaN or
    negative counts as 0, a number of tokens or slots is cut to what there is, an anchor outside the row is a free one.

    Args:
        scores: `[B, Hkv, L]`, attention weights after `reduce_group`.
        budget: `[B]` int64, K of each row.
        pool_kernel: width of the max-pooling.
        visible: `[B, L]` bool, False where a token is padding; `None` when there is none.
        heads: `[B, Hkv]` bool, which heads the caller wants; the others may hold anything. A hint for speed only.
        recent: how many of the newest tokens are kept whatever their score, for all or `[B]` int64.
        anchors: `[B, Hkv, A]` int32, positions kept after those whatever their score, `FREE` for none; one
            that is named twice counts once.
        ends: `[B]` int64, where each row ends; `None`: all at L.
        slots: the K of the result; `None`: the largest budget, which asks the device.
    """
    most = slot_count(budget, slots, scores.shape[-1])
    pooled, filled = candidates(scores, budget, pool_kernel, visible, recent, anchors, ends, most)
    keys = rank_keys(pooled)
    best_first = keys.topk(most, dim=-1, sorted=True).values & 0xFFFFFFFF
    slot = torch.arange(most, device=scores.device)
    lowest_first = (filled[..., None] - 1 - slot).clamp(min=0)
    positions = best_first.gather(-1, lowest_first)
    return Selected(positions.masked_fill(slot >= filled[..., None], FREE).int(), filled)
