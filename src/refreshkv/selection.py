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


class Selection(NamedTuple):
    """The tokens chosen for each partial cache.

    positions: `[B, Hkv, K]` int64, slots 0 .. filled-1 hold tokens with the lowest score first, the rest `FREE`.
        K is the largest budget of the batch or L, whichever is smaller.
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


def candidates(
    scores: Tensor,
    budget: Tensor,
    pool_kernel: int,
    visible: Tensor | None,
    recent: int | Tensor = 0,
    anchors: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a selection ranks, `[B, Hkv, L]` float32, and how many slots to fill, `[B, Hkv]`; arguments as for `select`.

    Pooled scores, padding at -1 below every token, anchors and the newest tokens above all others. Padding neither
    enters nor lends its neighbours a score. A row fills min(K, visible tokens) slots.
    """
    rows, kv_heads, length = scores.shape
    places = torch.arange(length, device=scores.device)
    if ends is not None:
        within = places < ends[:, None]
        visible = within if visible is None else visible & within
    tokens = torch.full((rows,), length, device=scores.device)
    if visible is None:
        pooled = pool(scores, pool_kernel).float()
    else:
        padding = ~visible[:, None]
        pooled = pool(scores.masked_fill(padding, 0.0), pool_kernel).float()
        tokens = visible.sum(-1)
    if anchors is not None:
        extra = torch.where(anchors == FREE, 0.0, _ANCHOR)
        pooled = pooled.scatter_add(-1, anchors.clamp(min=0), extra)
    if isinstance(recent, Tensor) or recent:
        last = tokens.new_full((rows,), length) if ends is None else ends
        pooled = pooled.masked_fill((places >= (last - recent)[:, None])[:, None], _RECENT)
    if visible is not None:
        pooled = pooled.masked_fill(padding, -1.0)
    filled = torch.minimum(budget, tokens)[:, None].expand(-1, kv_heads).contiguous()
    return pooled.contiguous(), filled


def recent_share(budget: Tensor, recent: int) -> Tensor | int:
    """How many of the newest tokens a selection of K keeps, `[B]`: `recent`, at most a quarter of K (ours).

    Next to anchors, which are half of K by default, a small K would otherwise have no slot left to select for.
    """
    return torch.clamp(budget // 4, max=recent) if recent else 0


def rank_keys(scores: Tensor) -> Tensor:
    """Distinct int64 keys in the order of the scores, `[B, Hkv, L]`; negative ones for negative scores.

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
) -> Selection:
    """The K best tokens of each KV head after pooling.

    Args:
        scores: `[B, Hkv, L]`, non-negative (attention weights after `reduce_group`).
        budget: `[B]` int64, K of each row.
        pool_kernel: width of the max-pooling.
        visible: `[B, L]` bool, False where a token is padding; `None` when there is none.
        heads: `[B, Hkv]` bool, which heads the caller wants; the others may hold anything. A hint for speed only.
        recent: how many of the newest tokens are kept whatever their score, for all or `[B]` int64.
        anchors: `[B, Hkv, A]` int64, positions kept after those whatever their score, `FREE` for none.
        ends: `[B]` int64, where each row ends; `None`: all at L.
        slots: the K of the result, at least the largest budget; `None`: that budget, which asks the device.
    """
    pooled, filled = candidates(scores, budget, pool_kernel, visible, recent, anchors, ends)
    keys = rank_keys(pooled)
    most = min(int(budget.max()) if slots is None else slots, scores.shape[-1])
    best_first = keys.topk(most, dim=-1, sorted=True).values & 0xFFFFFFFF
    slot = torch.arange(most, device=scores.device)
    lowest_first = (filled[..., None] - 1 - slot).clamp(min=0)
    positions = best_first.gather(-1, lowest_first)
    return Selection(positions.masked_fill(slot >= filled[..., None], FREE), filled)
