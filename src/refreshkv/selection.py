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


class Selection(NamedTuple):
    """The tokens chosen for each partial cache.

    positions: `[B, Hkv, K]` int64, slots 0 .. filled-1 hold tokens with the lowest score first, the rest `FREE`.
        K is the largest budget of the batch or L, whichever is smaller.
    filled: `[B, Hkv]` int64, how many slots hold a token.
    """

    positions: Tensor
    filled: Tensor


def reduce_group(weights: Tensor, kv_heads: int, reduction: Reduction) -> Tensor:
    """Attention weights of the query heads `[B, Hq, L]` -> one score per KV head `[B, Hkv, L]`."""
    grouped = weights.unflatten(1, (kv_heads, -1))
    return grouped.amax(2) if reduction == "max" else grouped.mean(2)


def pool(scores: Tensor, kernel: int) -> Tensor:
    """Each token takes the best score within `kernel // 2` neighbours. `[B, Hkv, L]` -> the same shape."""
    if kernel == 1:
        return scores
    return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def rank_keys(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Distinct int64 keys in the order of the scores, `[B, Hkv, L]`; tokens that are not visible get -1.

    Pooling makes plateaus, so the K-th place often cuts a tie, and a plain top-K then depends on the layout of the
    batch. The bits of a non-negative float32 order like an integer; the position below them breaks every tie in
    favour of the later token.
    """
    bits = scores.float().contiguous().view(torch.int32).long() << 32
    keys = bits | torch.arange(scores.shape[-1], device=scores.device)
    return keys if visible is None else keys.masked_fill(~visible[:, None], -1)


def fill_counts(budget: Tensor, tokens: Tensor, kv_heads: int) -> Tensor:
    """How many slots a selection fills: min(K, visible tokens). `[B]`, `[B]` -> `[B, Hkv]`."""
    return torch.minimum(budget, tokens)[:, None].expand(-1, kv_heads).contiguous()


def select(
    scores: Tensor,
    budget: Tensor,
    *,
    pool_kernel: int = 7,
    visible: Tensor | None = None,
    heads: Tensor | None = None,
) -> Selection:
    """The K best tokens of each KV head after pooling.

    Args:
        scores: `[B, Hkv, L]`, non-negative (attention weights after `reduce_group`).
        budget: `[B]` int64, K of each row.
        pool_kernel: width of the max-pooling.
        visible: `[B, L]` bool, False where a token is padding; `None` when there is none.
        heads: `[B, Hkv]` bool, which heads the caller wants; the others may hold anything. A hint for speed only.
    """
    rows, kv_heads, length = scores.shape
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], 0.0)
        tokens = visible.sum(-1)
    else:
        tokens = torch.full((rows,), length, device=scores.device)
    filled = fill_counts(budget, tokens, kv_heads)
    keys = rank_keys(pool(scores, pool_kernel), visible)
    most = min(int(budget.max()), length)
    best_first = keys.topk(most, dim=-1, sorted=True).values & 0xFFFFFFFF
    slots = torch.arange(most, device=scores.device)
    lowest_first = (filled[..., None] - 1 - slots).clamp(min=0)
    positions = best_first.gather(-1, lowest_first)
    return Selection(positions.masked_fill(slots >= filled[..., None], FREE), filled)
