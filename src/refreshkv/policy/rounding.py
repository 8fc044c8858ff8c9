"""Keys and values in a few bits, and which entries of a step are worth reading exactly (ours).

Numbers lie on a grid per channel over a block of 64 consecutive tokens, because outliers sit in channels. Source of
that, for keys: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750; values
fare better so too, measured in docs/log.md (KIVI rounds them per token). Codes are a function of a block's keys and
values alone, whenever they are made.

Letters: B rows, Hkv KV heads, D head dim, n entries. A grid of b bits has the values `low + step * code` for the codes
0 .. 2^b - 1, and is kept in 16 bits: 7 for `step`, one of 128 numbers `m * 2^e` with m = 1, 1.25, 1.5, 1.75 and e =
-20 .. 11, and 9 for `low`, in quarters of a step. Codes are made with what is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refreshkv.config import BLOCK as BLOCK

STEP_BITS = 7
QUARTERS = 4  # of a step, in which `low` is counted
FURTHEST = 255  # quarters from 0 that it may lie; what is one more away means NaN
# A step as it is kept is the top of a float32, less what 2^-20 has there.
STEP_SHIFT = 21
STEP_BASE = 107 << 2
STEPS_A_NAT = 8  # buckets of the histogram of log-weights; the last one has no end
BUCKETS = 256


class Rounded(NamedTuple):
    """codes `[..., 64, D]` int32; grid `[..., D]` int16, of each channel."""

    codes: Tensor
    grid: Tensor


def round_block(numbers: Tensor, bits: int, visible: Tensor | None = None) -> Rounded:
    """Keys or values `[..., 64, D]` of a block; `visible` `[..., 64]` bool, the others have no say and get the code 0.

    The grid reaches from the least number of a channel to the greatest; the two values of one bit are the mean number
    less and plus the mean distance from it. A channel with a NaN or an infinity that is visible becomes NaN.
    """
    exact = numbers.float()
    if visible is None:
        visible = numbers.new_ones(numbers.shape[:-1], dtype=torch.bool)
    seen = visible[..., None]
    if bits == 1:
        low, step = _around_the_mean(exact, seen)
    else:
        nothing = ~visible.any(-1, keepdim=True)
        low = exact.masked_fill(~seen, float("inf")).amin(-2).masked_fill(nothing, 0.0)
        high = exact.masked_fill(~seen, float("-inf")).amax(-2).masked_fill(nothing, 0.0)
        step = (high - low) / (2**bits - 1)
    grid = _kept(low, step)
    low, step = low_and_step(grid)
    codes = ((exact - low[..., None, :]) / step[..., None, :]).round().clamp(0, 2**bits - 1)
    return Rounded(codes.nan_to_num(0.0).int() * seen, grid)


def restored(rounded: Rounded) -> Tensor:
    """`[..., 64, D]` float32."""
    low, step = low_and_step(rounded.grid)
    return low[..., None, :] + step[..., None, :] * rounded.codes


def low_and_step(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Least value and step of grids, float32, shaped as they are."""
    kept = grid.int()
    quarters = kept >> STEP_BITS
    step = (((kept & (2**STEP_BITS - 1)) + STEP_BASE) << STEP_SHIFT).view(torch.float32)
    low = (step * quarters / QUARTERS).masked_fill(quarters < -FURTHEST, float("nan"))
    return low, step


def _around_the_mean(exact: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Low and step `[..., D]` of one bit. Added up token by token, so that every kernel comes to the same bits."""

    def mean(numbers: Tensor) -> Tensor:
        total = torch.zeros_like(numbers[..., 0, :])
        for token in numbers.masked_fill(~seen, 0.0).unbind(-2):
            total = total + token
        return total / seen.sum(-2).clamp(min=1)

    center = mean(exact)
    distance = mean((exact - center[..., None, :]).abs())
    return center - distance, distance * 2


def _kept(low: Tensor, step: Tensor) -> Tensor:
    """The grid nearest to one, int16; a step that `low` is too far away for becomes a longer one."""
    step = torch.maximum(step, low.abs() * (QUARTERS / FURTHEST))
    bits = (step.contiguous().view(torch.int32) + (1 << (STEP_SHIFT - 1))) >> STEP_SHIFT
    broken = ~(step < float("inf"))
    kept = (bits - STEP_BASE).clamp(0, 2**STEP_BITS - 1).masked_fill(broken, 0)
    unit = ((kept + STEP_BASE) << STEP_SHIFT).view(torch.float32)
    quarters = (low / unit * QUARTERS).round().clamp(-FURTHEST, FURTHEST)
    quarters = quarters.masked_fill(broken, -FURTHEST - 1)
    return ((quarters.int() << STEP_BITS) | kept).to(torch.int16)


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
    depth = (-weights.where(candidate, 0.0) * STEPS_A_NAT).clamp(0, BUCKETS - 1)
    bucket = depth.long().where(candidate, BUCKETS)
    counts = torch.zeros(*weights.shape[:2], BUCKETS + 1, dtype=torch.int64, device=weights.device)
    counts.scatter_add_(-1, bucket, torch.ones_like(bucket))
    fits = counts[..., :BUCKETS].cumsum(-1) <= budget[:, None, None]
    return bucket < fits.sum(-1, keepdim=True)
