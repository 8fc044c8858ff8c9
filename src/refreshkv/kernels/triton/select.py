"""Selection on a GPU: the K best tokens of each head, exactly those and in the order of `selection.select`.

Scores are pooled and the rules applied, one integer a token; `radix` finds the K largest. The launches are the
same whatever the scores, and nothing asks the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.triton.common import Config, on_its_device
from refreshkv.kernels.triton.layout import strides
from refreshkv.kernels.triton.radix import BINS, DIGITS, LONGEST, largest
from refreshkv.policy.selection import Selected, pool_width, slot_count

RANK = Config(block=4096, warps=8, stages=1)  # tokens
_ANCHORS_AT_ONCE = 1024


@on_its_device
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
    """See `selection.select`. The heads left out get `FREE` slots. `ValueError` beyond 2^25 tokens."""
    rows, kv_heads, length = scores.shape
    if length > LONGEST:
        raise ValueError(f"{length} tokens are more than the {LONGEST} that can be selected from")
    most = slot_count(budget, slots, length)
    newest = recent
    if isinstance(recent, int):
        newest = budget.new_full(budget.shape, min(recent, length)) if recent > 0 else None
    lifts = None if anchors is None else _lifts(anchors, length)
    ranks = budget.new_empty(rows, kv_heads, length, dtype=torch.int32)
    counts = ranks.new_zeros(rows, kv_heads, DIGITS.value, BINS.value)
    # What a row has one number of may come expanded.
    budget, newest, ends = (x if x is None else x.contiguous() for x in (budget, newest, ends))
    rank_kernel[(triton.cdiv(length, RANK.block), kv_heads, rows)](
        scores,
        visible,
        heads,
        newest,
        lifts,
        ends,
        ranks,
        counts,
        length,
        *scores.stride(),
        *strides(visible, 2),
        *strides(heads, 2),
        POOL=pool_width(pool_kernel, length),
        BLOCK=RANK.block,
        num_warps=RANK.warps,
    )
    return Selected(*largest(ranks, counts, budget, most))


def _lifts(anchors: Tensor, length: int) -> Tensor:
    """What the rule adds to the score of each token, `[B, Hkv, L]` float32."""
    rows, kv_heads, most = anchors.shape
    lifts = anchors.new_zeros(rows, kv_heads, length, dtype=torch.float32)
    lift_kernel[(triton.cdiv(most, _ANCHORS_AT_ONCE), kv_heads, rows)](
        anchors, lifts, most, length, *anchors.stride(), BLOCK=_ANCHORS_AT_ONCE
    )
    return lifts


@triton.jit
def lift_kernel(
    anchors_ptr,  # [B, Hkv, A] int32
    lifts_ptr,  # [B, Hkv, L] float32, zeros
    anchors,
    length,
    anchors_row,
    anchors_head,
    anchors_token,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of anchors, Hkv, B)."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    anchors_ptr += row * anchors_row + head * anchors_head
    token = tl.load(anchors_ptr + index * anchors_token, mask=index < anchors, other=-1)
    lifts_ptr += (row * tl.num_programs(1) + head) * length
    tl.store(lifts_ptr + token, 2.0, mask=(token >= 0) & (token < length))


@triton.jit
def rank_kernel(
    scores_ptr,  # [B, Hkv, L] float32
    visible_ptr,  # [B, L] bool, or None
    heads_ptr,  # [B, Hkv] bool, or None
    recent_ptr,  # [B] int64, or None
    lifts_ptr,  # [B, Hkv, L] float32, or None
    ends_ptr,  # [B] int64, or None
    ranks_ptr,  # [B, Hkv, L] int32
    counts_ptr,  # [B, Hkv, digits, bins] int32, zeros
    length,
    scores_row,
    scores_head,
    scores_token,
    visible_row,
    visible_token,
    heads_row,
    heads_head,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`selection.candidates` as bits, -1 for what does not count, and the first digit's counts; grid (blocks, Hkv, B).

    A head that is left out counts no token, and therefore gets none.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if heads_ptr is not None:
        if not tl.load(heads_ptr + row * heads_row + head * heads_head):
            return
    own = row * tl.num_programs(1) + head
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = length
    if ends_ptr is not None:
        end = tl.minimum(tl.maximum(tl.load(ends_ptr + row), 0), length).to(tl.int32)
    scores_ptr += row * scores_row + head * scores_head
    pooled = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(POOL):
        near = tokens + (step - POOL // 2)
        shown = (near >= 0) & (near < end)
        if visible_ptr is not None:
            visible = visible_ptr + row * visible_row + near * visible_token
            shown = tl.load(visible, mask=shown, other=0) != 0
        score = tl.load(scores_ptr + near.to(tl.int64) * scores_token, mask=shown, other=0.0)
        # Not a maximum: a NaN, -0 and -1 count as 0.
        score = score.to(tl.float32)
        pooled = tl.where(score > pooled, score, pooled)
        if step == POOL // 2:
            counted = shown
    if lifts_ptr is not None:
        pooled += tl.load(lifts_ptr + own * length + tokens, mask=counted, other=0.0)
    if recent_ptr is not None:
        recent = tl.minimum(tl.maximum(tl.load(recent_ptr + row), 0), length).to(tl.int32)
        pooled = tl.where(tokens >= end - recent, 4.0, pooled)
    bits = tl.where(counted, pooled.to(tl.int32, bitcast=True), -1)
    tl.store(ranks_ptr + own * length + tokens, bits, mask=tokens < length)
    count = tl.histogram(bits >> 23, 256, mask=counted)
    bins = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + own * DIGITS * BINS + bins, count, mask=count > 0)
