"""Keys and values in a few bits, and which entries of a step are worth reading exactly (ours).

Keys lie on a grid per channel over a block of 64 consecutive tokens, because their outliers sit in channels; values on
a grid per token. Source of that: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
arXiv 2402.02750. Codes are a function of a block's keys and values alone, whenever they are made.

Letters: B rows, Hkv KV heads, D head dim, n entries. A grid of b bits has the values `low + step * code` for the codes
0 .. 2^b - 1; `low` and `step` are kept in 16 bits (bfloat16), and codes are made with what is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # tokens that share the grids of their keys
GRID_BITS = 32  # of `low` and `step` together
_STEPS_A_NAT = 8  # buckets of the histogram of log-weights; the last one has no end
_BUCKETS = 256


class Rounded(NamedTuple):
    """codes `[..., 64, D]` int32; low, step bfloat16: `[..., 1, D]` of keys, `[..., 64, 1]` of values."""

    codes: Tensor
    low: Tensor
    step: Tensor


def round_keys(keys: Tensor, bits: int, visible: Tensor | None = None) -> Rounded:
    """Keys `[..., 64, D]` of a block; `visible` `[..., 64]` bool, the others have no say in the grid."""
    return _rounded(keys, bits, -2, visible)


def round_values(values: Tensor, bits: int) -> Rounded:
    """Values `[..., 64, D]` of a block."""
    return _rounded(values, bits, -1, None)


def restored(rounded: Rounded) -> Tensor:
    """`[..., 64, D]` float32."""
    return rounded.low.float() + rounded.step.float() * rounded.codes


def largest_weights(logits: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
    """`[B, Hkv, n]`: log of the largest weight of each entry in its GQA group, of logits `[B, Hq, n]`, lse `[B, Hq]`.

    -inf where a head has no weight to give.
    """
    weights = logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    return weights.unflatten(1, (kv_heads, -1)).amax(2)


def worth_reading(weights: Tensor, budget: Tensor) -> Tensor:
    """`[B, Hkv, n]` bool: entries to read exactly, those with the largest weights, at most K of a KV head.

    No sort: log-weights are counted in buckets of 1/8 nat, and the buckets are taken from the largest down as long as
    they hold no more than K entries together. So a head whose K + 1 largest weights are alike to 1/8 nat reads none
    exactly, and no head ever reads more than K.

    Args:
        weights: `[B, Hkv, n]` natural logarithms; -inf for an entry that is no candidate. NaN is one of no weight.
        budget: `[B]` int64, K.
    """
    candidate = weights > float("-inf")
    depth = (-weights.where(candidate, 0.0) * _STEPS_A_NAT).clamp(0, _BUCKETS - 1)
    bucket = depth.long().where(candidate, _BUCKETS)
    counts = torch.zeros(*weights.shape[:2], _BUCKETS + 1, dtype=torch.int64, device=weights.device)
    counts.scatter_add_(-1, bucket, torch.ones_like(bucket))
    fits = counts[..., :_BUCKETS].cumsum(-1) <= budget[:, None, None]
    return bucket < fits.sum(-1, keepdim=True)


def _rounded(numbers: Tensor, bits: int, over: int, visible: Tensor | None) -> Rounded:
    """On a grid between the least and the greatest over the dimension `over`."""
    exact, most = numbers.float(), 2**bits - 1
    low, high = exact, exact
    if visible is not None:
        low = exact.masked_fill(~visible[..., None], float("inf"))
        high = exact.masked_fill(~visible[..., None], float("-inf"))
    low, high = low.amin(over, keepdim=True), high.amax(over, keepdim=True)
    step = ((high - low) / most).bfloat16()
    low = low.bfloat16()
    unit = step.float().clamp(min=torch.finfo(torch.bfloat16).tiny)
    codes = ((exact - low.float()) / unit).round().clamp(0, most)
    return Rounded(codes.nan_to_num(0.0).int(), low, step)
