"""The partial step: attention over the entries of a partial cache, or over those that a list of positions names.

Same signatures as `reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.options import Attended
from refreshkv.kernels.triton.common import (
    Config,
    for_every_head,
    group_weights,
    merge,
    on_its_device,
    own_length,
    padded,
    strides,
)
from refreshkv.kernels.triton.split import attend_in_splits

RANK = Config(block=1024, warps=4, stages=1)
_LOWEST = tl.constexpr(-(2**63))


@on_its_device
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
    """See `reference.attend`."""
    parts = attend_in_splits(query, keys, values, scale, softcap, visible, lengths, heads)
    return merge(parts.output, parts.lse, dtype=values.dtype, sinks=sinks, heads=heads)


@on_its_device
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
    """See `reference.attend_and_rank`."""
    parts = attend_in_splits(
        query, keys, values, scale, softcap, visible, lengths, heads, keep_logits=True
    )
    attended = merge(parts.output, parts.lse, dtype=values.dtype, sinks=sinks, heads=heads)
    best = _ranked(parts.logits, attended.lse, sinks, lengths, heads, reduction, newest, count)
    return attended, best


@on_its_device
def attend_at(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    blocks: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: Tensor | None = None,
    reduction: Reduction = "max",
    newest: Tensor | None = None,
    count: int = 0,
) -> tuple[Attended, Tensor]:
    """See `reference.attend_at`."""
    parts = attend_in_splits(
        query,
        keys,
        values,
        scale,
        softcap,
        None,
        None,
        heads,
        positions=positions,
        blocks=blocks,
        keep_logits=count > 0,
    )
    attended = merge(parts.output, parts.lse, dtype=values.dtype, sinks=sinks, heads=heads)
    if newest is None:
        newest = positions.new_zeros(positions.shape[:2])
    best = _ranked(parts.logits, attended.lse, sinks, None, heads, reduction, newest, count)
    return attended, best


@triton.jit
def store_best(keys, best_ptr, COUNT: tl.constexpr, LAST: tl.constexpr):
    """The highest of distinct int64 keys, best first; their low half, which is the slot, when `LAST`."""
    for rank in tl.static_range(COUNT):
        best = tl.max(keys, 0)
        keys = tl.where(keys == best, _LOWEST, keys)
        tl.store(best_ptr + rank, best & 0xFFFFFFFF if LAST else best)


@triton.jit
def candidates_kernel(
    logits_ptr,  # [B, Hq, K] float32
    lse_ptr,  # [B, Hq] float32
    sinks_ptr,  # [Hq], or None
    lengths_ptr,  # [B, Hkv] int64, or None
    heads_ptr,  # [B, Hkv] bool, or None
    newest_ptr,  # [B, Hkv] int64
    best_ptr,  # [B, Hkv, blocks, COUNT] int64
    entries,
    length_row,
    length_head,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    COUNT: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of each block of entries, as keys in the order of `selection.rank_keys`; grid (blocks, Hkv, B)."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    head, kv_heads = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2)
    place = row.to(tl.int64) * kv_heads + head
    if heads_ptr is not None:
        if not tl.load(heads_ptr + place):
            return
    length = own_length(lengths_ptr, row * length_row + head * length_head, entries)
    slots = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scores = group_weights(
        logits_ptr + place * GROUP * entries,
        lse_ptr + place * GROUP,
        sinks_ptr,
        head * GROUP,
        slots,
        slots < length,
        entries,
        GROUP,
        MEAN,
    )
    scores = tl.where(scores > 0, scores, 0.0)  # which a NaN is not
    scores = tl.where(slots == tl.load(newest_ptr + place), -1.0, scores)
    keys = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | slots
    keys = tl.where(slots < entries, keys, _LOWEST)
    store_best(keys, best_ptr + (place * blocks + block) * COUNT, COUNT, ALONE)


@triton.jit
def best_kernel(
    candidates_ptr,  # [B, Hkv, candidates] int64
    best_ptr,  # [B, Hkv, COUNT] int64
    candidates,
    COUNT: tl.constexpr,
    MOST: tl.constexpr,
):
    """Grid (B * Hkv,). For a head that nobody asked for the candidates are garbage, and so is what comes out."""
    place = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, MOST)
    keys = tl.load(
        candidates_ptr + place * candidates + every, mask=every < candidates, other=_LOWEST
    )
    store_best(keys, best_ptr + place * COUNT, COUNT, True)


def _ranked(
    logits: Tensor | None,
    lse: Tensor,
    sinks: Tensor | None,
    lengths: Tensor | None,
    heads: Tensor | None,
    reduction: Reduction,
    newest: Tensor,
    count: int,
) -> Tensor:
    """`reference.top_slots` of the scores that follow from the logits `[B, Hq, K]`."""
    rows, kv_heads = newest.shape
    entries = 0 if logits is None else logits.shape[-1]
    count = min(count, entries)
    if count <= 0:
        return newest.new_empty(rows, kv_heads, 0)
    blocks = triton.cdiv(entries, RANK.block)
    lengths = for_every_head(lengths, rows, kv_heads)
    best = newest.new_empty(rows, kv_heads, blocks, count)
    candidates_kernel[(blocks, kv_heads, rows)](
        logits,
        lse,
        sinks,
        lengths,
        None if heads is None else heads.contiguous(),
        newest.contiguous(),
        best,
        entries,
        *strides(lengths, 2),
        GROUP=lse.shape[1] // kv_heads,
        MEAN=reduction == "mean",
        COUNT=count,
        ALONE=blocks == 1,
        BLOCK=min(RANK.block, padded(entries)),
        num_warps=RANK.warps,
        num_stages=RANK.stages,
    )
    if blocks == 1:
        return best[:, :, 0]
    candidates, best = best, newest.new_empty(rows, kv_heads, count)
    best_kernel[(rows * kv_heads,)](
        candidates,
        best,
        blocks * count,
        COUNT=count,
        MOST=padded(blocks * count),
        num_warps=1,
    )
    return best
