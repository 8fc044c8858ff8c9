"""Codes of blocks, bit for bit as `rounding.round_block` makes them: a program for the keys or the values of one block.

One launch for all rows, heads and blocks. A program leaves at once where its row has no such block, so a decode step
can launch it every time, although it completes a block in one of 64.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Entries
from refreshkv.kernels.triton import codes as layout
from refreshkv.kernels.triton.codes import (
    BLOCK,
    COPY_LIMITS,
    FURTHEST,
    LONG,
    SHORT,
    STEP_BASE,
    STEP_BITS,
    STEP_MASK,
    STEP_SHIFT,
    copy_of,
    each_of,
    low_and_step,
    place_of,
    words_of,
)
from refreshkv.kernels.triton.common import on_its_device, padded
from refreshkv.kernels.triton.layout import (
    LIMITS,
    contiguous_rows,
    kept_row,
    look_up,
    page_of,
    store_of,
    strides,
)
from refreshkv.policy import rounding

# A step for a grid that lies at the farthest: so long that the least value is so many quarters of it away.
_HALF = tl.constexpr(1 << (rounding.STEP_SHIFT - 1))  # of a step, as its bits are kept
_REACH = tl.constexpr(rounding.QUARTERS / rounding.FURTHEST)
_ROUND = tl.constexpr(
    1.5 * 2**23
)  # plus and minus this, a float32 of less than 2^22 is rounded half to even
WARPS = {32: 4, 64: 4, 128: 4, 256: 8}  # by padded head dim


def serves(entries: Entries, codes: Codes, **_: Any) -> bool:
    """See `codes.serves`."""
    return layout.serves(entries, codes)


@on_its_device
def encode(
    entries: Entries,
    codes: Codes,
    *,
    first: Tensor,
    begin: Tensor,
    end: Tensor,
    most: int,
    visible: Tensor | None = None,
) -> None:
    """See `reference.encode`."""
    if most < 1 or not codes.keys.numel():
        return
    assert entries.values is not None
    rows = len(begin)
    if visible is not None:
        visible = contiguous_rows(visible.expand(rows, -1))
    store, limits = store_of(entries)
    copy, copy_limits = copy_of(codes, entries, first, None)
    dim, value_dim = entries.keys.shape[-1], entries.values.shape[-1]
    pads = padded(dim, LONG.value), padded(value_dim, LONG.value)
    encode_kernel[(most, 2 * entries.kv_heads, rows)](
        store,
        *limits,
        copy,
        *copy_limits,
        begin.contiguous(),
        end.contiguous(),
        visible,
        1 if visible is None else visible.shape[1],
        *strides(visible, 1),
        PAGE=page_of(entries),
        EACH=each_of(codes),
        DIM=dim,
        DIM_PAD=pads[0],
        BITS=codes.bits,
        VALUE_DIM=value_dim,
        VALUE_PAD=pads[1],
        VALUE_BITS=codes.value_bits,
        num_warps=max(WARPS[pad] for pad in pads),
    )


@triton.jit(do_not_specialize=[*LIMITS, *COPY_LIMITS, "columns"])
def encode_kernel(
    store,
    width,
    kept,
    pages,
    copy,
    room,
    coded,
    begin_ptr,  # [B] int64
    end_ptr,  # [B] int64
    visible_ptr,  # [B, L] bool, or None
    columns,
    visible_row,
    PAGE: tl.constexpr,
    EACH: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """Grid (blocks, Hkv * 2, B): the keys of a head, then its values."""
    head, part = (tl.program_id(1) // 2).to(tl.int64), tl.program_id(1) % 2
    row = tl.program_id(2).to(tl.int64)
    block = tl.load(begin_ptr + row) + tl.program_id(0)
    end = tl.minimum(tl.maximum(tl.load(end_ptr + row), 0), room)
    page, place = place_of(copy, coded, row, block, end, EACH)
    if page < 0:
        return
    kept = kept_row(store.rows_ptr, row, kept)
    position = tl.load(copy.first_ptr + row) + block * BLOCK + tl.arange(0, BLOCK)
    seen = (position >= 0) & (position < width) & (kept >= 0)
    if visible_ptr is not None:
        column = tl.minimum(tl.maximum(position, 0), columns - 1)
        seen = seen & tl.load(visible_ptr + row * visible_row + column, mask=seen, other=False)
    key_at, value_at, seen = look_up(store, width, pages, row, kept, head, position, seen, PAGE)
    if part == 0:
        numbers = numbers_of(store.keys_ptr, key_at, seen, DIM, DIM_PAD)
        codes, kept_grid = rounded(numbers, seen, BITS)
        planes = copy.keys_ptr + page * copy.key_row + head * copy.key_head
        write_codes(planes + place * copy.key_block, codes, DIM, BLOCK, BITS)
        grids = copy.key_grids_ptr + page * copy.key_grid_row + head * copy.key_grid_head
        write_grid(grids + place * copy.key_grid_block, kept_grid, DIM, DIM_PAD)
    else:
        numbers = numbers_of(store.values_ptr, value_at, seen, VALUE_DIM, VALUE_PAD)
        codes, kept_grid = rounded(numbers, seen, VALUE_BITS)
        planes = copy.values_ptr + page * copy.value_row + head * copy.value_head
        planes += place * copy.value_block
        write_codes(planes, tl.trans(codes), BLOCK, VALUE_DIM, VALUE_BITS)
        grids = copy.value_grids_ptr + page * copy.value_grid_row + head * copy.value_grid_head
        write_grid(grids + place * copy.value_grid_block, kept_grid, VALUE_DIM, VALUE_PAD)


@triton.jit
def numbers_of(numbers_ptr, at, seen, DIM: tl.constexpr, PAD: tl.constexpr):
    """`[64, PAD]` float32, 0 where nothing is seen."""
    dims = tl.arange(0, PAD)
    mask = seen[:, None] & (dims < DIM)[None, :]
    return tl.load(numbers_ptr + at[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(numbers, seen, BITS: tl.constexpr):
    """Codes `[64, PAD]` and grids `[PAD]`, int32; as `rounding.round_block`."""
    counted = seen[:, None]
    if BITS == 1:
        count = tl.maximum(tl.sum(seen.to(tl.int32), 0), 1).to(tl.float32)
        center = tl.div_rn(in_order(numbers), count)
        away = tl.where(counted, tl.abs(numbers - center[None, :]), 0.0)
        distance = tl.div_rn(in_order(away), count)
        low, step = center - distance, distance * 2
    else:
        low = tl.min(tl.where(counted, numbers, float("inf")), 0)
        high = tl.max(tl.where(counted, numbers, float("-inf")), 0)
        nothing = tl.max(seen.to(tl.int32), 0) == 0
        low, high = tl.where(nothing, 0.0, low), tl.where(nothing, 0.0, high)
        step = tl.div_rn(high - low, tl.full(low.shape, 2**BITS - 1, tl.float32))
    # A minimum may drop a NaN.
    broken = tl.max((numbers != numbers).to(tl.int32), 0) > 0
    kept = kept_grid(low, tl.where(broken, float("nan"), step))
    low, step = low_and_step(kept)
    codes = tl.div_rn(numbers - low[None, :], step[None, :])
    codes = nearest(tl.minimum(tl.maximum(codes, 0.0), 2**BITS - 1))
    return tl.where(counted & (low == low)[None, :], codes, 0.0).to(tl.int32), kept


@triton.jit
def in_order(numbers):
    """The sum of `[64, PAD]` over the tokens, from the first on: another order would come to other bits."""
    tokens = tl.arange(0, BLOCK)
    total = tl.zeros([numbers.shape[1]], tl.float32)
    for token in tl.range(BLOCK):
        total += tl.sum(tl.where((tokens == token)[:, None], numbers, 0.0), 0)
    return total


@triton.jit
def kept_grid(low, step):
    """As `rounding._kept`, int32."""
    step = tl.maximum(step, tl.abs(low) * _REACH, propagate_nan=tl.PropagateNan.ALL)
    bits = (step.to(tl.int32, bitcast=True) + _HALF) >> STEP_SHIFT
    broken = (step < float("inf")) == 0
    kept = tl.where(broken, 0, tl.minimum(tl.maximum(bits - STEP_BASE, 0), STEP_MASK))
    unit = ((kept + STEP_BASE) << STEP_SHIFT).to(tl.float32, bitcast=True)
    quarters = tl.div_rn(tl.where(broken, 0.0, low), unit) * 4
    quarters = nearest(tl.minimum(tl.maximum(quarters, -FURTHEST), FURTHEST))
    quarters = tl.where(broken, -FURTHEST - 1, quarters.to(tl.int32))
    return (quarters << STEP_BITS) | kept


@triton.jit
def nearest(numbers):
    """Rounded half to even, of float32 below 2^22."""
    return (numbers + _ROUND) - _ROUND


@triton.jit
def shifts():
    """Which bit of a word each of its numbers has, in their order: pairs have the same in either half."""
    number = tl.arange(0, LONG)
    return number // 2 + number % 2 * 16


@triton.jit
def write_codes(planes_ptr, codes, SUMMED: tl.constexpr, ACROSS: tl.constexpr, BITS: tl.constexpr):
    """Codes `[A, PAD]` of one block, by the words that hold them; see `codes.words_of`."""
    A: tl.constexpr = codes.shape[0]
    PAD: tl.constexpr = codes.shape[1]
    at, exist = words_of(tl.arange(0, A), SUMMED, ACROSS, PAD, BITS)
    codes = tl.reshape(codes, [A, PAD // LONG, LONG])
    for bit in tl.static_range(BITS):
        words = tl.sum(((codes >> bit) & 1) << shifts()[None, None, :], 2)
        tl.store(planes_ptr + at + bit * SHORT, words, mask=exist)


@triton.jit
def write_grid(grids_ptr, kept, DIM: tl.constexpr, PAD: tl.constexpr):
    """Grids `[PAD]` of one block."""
    dims = tl.arange(0, PAD)
    tl.store(grids_ptr + dims, kept.to(tl.int16), mask=dims < DIM)
