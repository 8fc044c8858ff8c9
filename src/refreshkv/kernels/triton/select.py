"""Selection and gather on a GPU: the K best tokens of each head, exactly those and in the order of `selection.select`.

Scores are pooled and the rules applied, one integer a token; `triton_radix` finds the K largest. The launches are the
same whatever the scores, and nothing asks the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.triton.common import Config, on_its_device, padded, strides
from refreshkv.kernels.triton.radix import BINS, DIGITS, LONGEST, largest
from refreshkv.policy.selection import Selection, pool_width, slot_count

RANK = Config(block=4096, warps=8, stages=1)  # tokens
_ANCHORS_AT_ONCE = 1024
_COPY_BYTES = 16384  # of a program in `gather`


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
) -> Selection:
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
    return Selection(*largest(ranks, counts, budget, most))


@on_its_device
def gather(source: Tensor, positions: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """See `reference.gather`."""
    rows, kv_heads, slots = positions.shape
    dim = source.shape[-1]
    block = max(1, _COPY_BYTES // (padded(dim) * source.element_size()))
    gather_kernel[(triton.cdiv(slots, block), kv_heads, rows)](
        source,
        positions,
        out,
        heads,
        source.shape[2],
        slots,
        *source.stride(),
        *positions.stride(),
        *out.stride(),
        *strides(heads, 2),
        DIM=dim,
        DIM_PAD=padded(dim),
        BLOCK=block,
        num_warps=8,
    )


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
    anchors_ptr,  # [B, Hkv, A] int64
    lifts_ptr,  # [B, Hkv, L] float32, zeros
    anchors,
    length,
    anchors_row,
    anchors_head,
    anchors_place,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of anchors, Hkv, B)."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    anchors_ptr += row * anchors_row + head * anchors_head
    place = tl.load(anchors_ptr + index * anchors_place, mask=index < anchors, other=-1)
    lifts_ptr += (row * tl.num_programs(1) + head) * length
    tl.store(lifts_ptr + place, 2.0, mask=(place >= 0) & (place < length))


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
    scores_place,
    visible_row,
    visible_place,
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
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = length
    if ends_ptr is not None:
        end = tl.minimum(tl.maximum(tl.load(ends_ptr + row), 0), length).to(tl.int32)
    scores_ptr += row * scores_row + head * scores_head
    pooled = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(POOL):
        near = places + (step - POOL // 2)
        shown = (near >= 0) & (near < end)
        if visible_ptr is not None:
            visible = visible_ptr + row * visible_row + near * visible_place
            shown = tl.load(visible, mask=shown, other=0) != 0
        score = tl.load(scores_ptr + near.to(tl.int64) * scores_place, mask=shown, other=0.0)
        # Not a maximum: a NaN, -0 and -1 count as 0.
        score = score.to(tl.float32)
        pooled = tl.where(score > pooled, score, pooled)
        if step == POOL // 2:
            counted = shown
    if lifts_ptr is not None:
        pooled += tl.load(lifts_ptr + own * length + places, mask=counted, other=0.0)
    if recent_ptr is not None:
        recent = tl.minimum(tl.maximum(tl.load(recent_ptr + row), 0), length).to(tl.int32)
        pooled = tl.where(places >= end - recent, 4.0, pooled)
    bits = tl.where(counted, pooled.to(tl.int32, bitcast=True), -1)
    tl.store(ranks_ptr + own * length + places, bits, mask=places < length)
    count = tl.histogram(bits >> 23, 256, mask=counted)
    bins = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + own * DIGITS * BINS + bins, count, mask=count > 0)


# A store that grows would be compiled for lengths that 16 divides, and for others.
@triton.jit(do_not_specialize=["length"])
def gather_kernel(
    source_ptr,  # [B, Hkv, L, D]
    positions_ptr,  # [B, Hkv, K] int64
    out_ptr,  # [B, Hkv, C, D]
    heads_ptr,  # [B, Hkv] bool, or None
    length,
    slots,
    source_row,
    source_head,
    source_place,
    source_dim,
    positions_row,
    positions_head,
    positions_slot,
    out_row,
    out_head,
    out_slot,
    out_dim,
    heads_row,
    heads_head,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of slots, Hkv, B)."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if heads_ptr is not None:
        if not tl.load(heads_ptr + row * heads_row + head * heads_head):
            return
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM_PAD)[None, :]
    positions_ptr += row * positions_row + head * positions_head
    place = tl.load(positions_ptr + slot * positions_slot, mask=slot < slots, other=-1)
    wanted = ((place >= 0) & (place < length))[:, None] & (dims < DIM)
    source_ptr += row * source_row + head * source_head
    out_ptr += row * out_row + head * out_head
    content = tl.load(
        source_ptr + place[:, None] * source_place + dims * source_dim, mask=wanted, other=0.0
    )
    tl.store(out_ptr + slot[:, None] * out_slot + dims * out_dim, content, mask=wanted)
