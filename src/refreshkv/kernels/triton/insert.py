"""Tokens of the full cache enter the rings of the partial cache: the new token, and what follows attended ones.

One program a ring looks through its positions and then writes, so that nothing is decided twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.triton.common import Config, contiguous_rows, on_its_device, padded

CONFIG = Config(block=1024, warps=4, stages=2)


@on_its_device
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
    """See `reference.insert`."""
    rows, kv_heads, count = wanted.shape
    keys, values, wanted = (contiguous_rows(tensor) for tensor in (keys, values, wanted))
    entered = torch.empty_like(pushed)
    _insert[(rows * kv_heads,)](
        keys,
        *keys.stride()[:3],
        values,
        *values.stride()[:3],
        wanted,
        *wanted.stride()[:2],
        ring_keys,
        *ring_keys.stride()[:3],
        ring_values,
        *ring_values.stride()[:3],
        ring_positions,
        *ring_positions.stride()[:2],
        filled,
        pushed,
        budget,
        entered,
        kv_heads,
        keys.shape[2],
        ring_positions.shape[2],
        COUNT=count,
        COUNTS=padded(count, least=1),
        DIM=keys.shape[3],
        DIMS=padded(keys.shape[3]),
        VALUE_DIM=values.shape[3],
        VALUE_DIMS=padded(values.shape[3]),
        BLOCK=CONFIG.block,
        num_warps=CONFIG.warps,
        num_stages=CONFIG.stages,
    )
    return entered


# A store that grows would be compiled for lengths that 16 divides, and for others.
@triton.jit(do_not_specialize=["length"])
def _insert(
    keys_ptr,
    keys_b,
    keys_h,
    keys_l,
    values_ptr,
    values_b,
    values_h,
    values_l,
    wanted_ptr,
    wanted_b,
    wanted_h,
    ring_keys_ptr,
    ring_keys_b,
    ring_keys_h,
    ring_keys_l,
    ring_values_ptr,
    ring_values_b,
    ring_values_h,
    ring_values_l,
    positions_ptr,
    positions_b,
    positions_h,
    filled_ptr,
    pushed_ptr,
    budget_ptr,
    entered_ptr,
    kv_heads,
    length,
    slots,
    COUNT: tl.constexpr,
    COUNTS: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    row, head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    positions_ptr += row * positions_b + head * positions_h
    each = tl.arange(0, COUNTS)
    wanted = tl.load(wanted_ptr + row * wanted_b + head * wanted_h + each, each < COUNT, other=-1)

    there = tl.zeros([COUNTS], tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        held = tl.load(positions_ptr + slot, slot < slots, other=-1)
        there = tl.maximum(there, tl.max((held[:, None] == wanted[None, :]).to(tl.int32), 0))
    tl.debug_barrier()  # every thread has looked before any writes
    budget = tl.minimum(tl.load(budget_ptr + row), slots)
    enters = (wanted >= 0) & (wanted < length) & (there == 0) & (budget > 0)
    place = tl.cumsum(enters.to(tl.int64), 0) - 1
    total = tl.sum(enters.to(tl.int64), 0)

    pushed = tl.load(pushed_ptr + pair)
    room = tl.maximum(budget, 1)
    slot = (tl.load(filled_ptr + pair) + pushed + place) % room
    slot = (slot + room) % room  # the first remainder of a negative number is negative or 0
    # Of more tokens than slots the last stay.
    written = enters & (place >= total - budget)
    tl.store(positions_ptr + slot, wanted, written)
    tl.store(pushed_ptr + pair, pushed + total)
    tl.store(entered_ptr + pair, total)

    source, target = wanted[:, None], slot[:, None]
    column = tl.arange(0, DIMS)[None, :]
    mask = written[:, None] & (column < DIM)
    keys_ptr += row * keys_b + head * keys_h
    ring_keys_ptr += row * ring_keys_b + head * ring_keys_h
    copied = tl.load(keys_ptr + source * keys_l + column, mask)
    tl.store(ring_keys_ptr + target * ring_keys_l + column, copied, mask)
    column = tl.arange(0, VALUE_DIMS)[None, :]
    mask = written[:, None] & (column < VALUE_DIM)
    values_ptr += row * values_b + head * values_h
    ring_values_ptr += row * ring_values_b + head * ring_values_h
    copied = tl.load(values_ptr + source * values_l + column, mask)
    tl.store(ring_values_ptr + target * ring_values_l + column, copied, mask)
