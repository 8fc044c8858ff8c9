"""What a kernel is told of `Codes`, and how it reads them: every word once, for the 32 numbers that it has a bit of."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Entries
from refreshkv.kernels.triton.layout import contiguous_rows, kept_row, strides
from refreshkv.policy import rounding

BLOCK = tl.constexpr(rounding.BLOCK)
STEP_BITS = tl.constexpr(rounding.STEP_BITS)
STEP_MASK = tl.constexpr(2**rounding.STEP_BITS - 1)
STEP_BASE = tl.constexpr(rounding.STEP_BASE)
STEP_SHIFT = tl.constexpr(rounding.STEP_SHIFT)
FURTHEST = tl.constexpr(rounding.FURTHEST)
LONG = tl.constexpr(
    32
)  # numbers along the summed dimension that two int16 of a plane, one word, have a bit of
SHORT = tl.constexpr(16)  # words of a plane


class Copy(NamedTuple):
    """Where codes lie. Planes are words of 32 bits; `<tensor>_<axis>` are strides in words, and in numbers of grids."""

    keys_ptr: Tensor
    key_grids_ptr: Tensor
    values_ptr: Tensor
    value_grids_ptr: Tensor
    blocks_ptr: Tensor | None
    rows_ptr: Tensor | None
    first_ptr: Tensor  # [B] int64, where the blocks of each row begin
    finished_ptr: Tensor | None  # [B] int64, how many have codes
    key_row: int  # of a page, with blocks
    key_head: int
    key_block: int
    key_grid_row: int
    key_grid_head: int
    key_grid_block: int
    value_row: int
    value_head: int
    value_block: int
    value_grid_row: int
    value_grid_head: int
    value_grid_block: int
    block_row: int


class CopyLimits(NamedTuple):
    """Blocks of a row that there is room for, and rows or pages of codes; arguments of their own, as `Limits`."""

    room: int
    coded: int


COPY_LIMITS = list(CopyLimits._fields)


def copy_of(
    codes: Codes, entries: Entries, first: Tensor, finished: Tensor | None
) -> tuple[Copy, CopyLimits]:
    """Arguments of a kernel that reads or writes codes. The constant `EACH` is `each_of` the same."""
    planes = [part.view(torch.int32) for part in (codes.keys, codes.values)]
    blocks = None if codes.blocks is None else contiguous_rows(codes.blocks)
    copy = Copy(
        planes[0],
        codes.key_grids,
        planes[1],
        codes.value_grids,
        blocks,
        entries.rows.contiguous() if blocks is None and entries.rows is not None else None,
        first.contiguous(),
        None if finished is None else finished.contiguous(),
        *strides(planes[0], 3),
        *strides(codes.key_grids, 3),
        *strides(planes[1], 3),
        *strides(codes.value_grids, 3),
        *strides(blocks, 1),
    )
    return copy, CopyLimits(codes.row_blocks, len(codes.keys))


def each_of(codes: Codes) -> int:
    """Blocks of a page, or 1: nothing divides by 0."""
    return 1 if codes.blocks is None else max(1, codes.keys.shape[2])


def serves(entries: Entries, codes: Codes) -> bool:
    """Wider heads would not fit into a program, and words are read whole."""
    dims = codes.key_grids.shape[-1], codes.value_grids.shape[-1]
    return max(dims) <= 256 and all(part.stride(-1) == 1 for part in codes.tensors)


@triton.jit
def place_of(copy, coded, row, block, end, EACH: tl.constexpr):
    """Where blocks of a row lie: their row or page, int64, -1 where they have none, and their number in it.

    Args:
        row: of the step; block: any numbers, int32, of any shape.
        end: the blocks from here on are not meant; no more than there is room for.
    """
    meant = (block >= 0) & (block < end)
    if copy.blocks_ptr is None:
        page, index = kept_row(copy.rows_ptr, row, coded), block
    else:
        table = copy.blocks_ptr + row * copy.block_row
        page = tl.load(table + block // EACH, mask=meant, other=-1).to(tl.int64)
        index = block % EACH
    return tl.where(meant & (page >= 0) & (page < coded), page, -1), index


@triton.jit
def grid_of(grids_ptr, dims, DIM: tl.constexpr, BITS: tl.constexpr):
    """Middle and step of each dim of a block, float32."""
    kept = tl.load(grids_ptr + dims, mask=dims < DIM, other=0).to(tl.int32)
    low, step = low_and_step(kept)
    return low + step * ((2**BITS - 1) * 0.5), step


@triton.jit
def low_and_step(kept):
    """As `rounding.low_and_step`, of int32."""
    quarters = kept >> STEP_BITS
    step = (((kept & STEP_MASK) + STEP_BASE) << STEP_SHIFT).to(tl.float32, bitcast=True)
    return tl.where(quarters < -FURTHEST, float("nan"), step * quarters * 0.25), step


@triton.jit
def words_of(across, SUMMED: tl.constexpr, ACROSS: tl.constexpr, PAD: tl.constexpr, BITS):
    """Where the words of the first bit lie, `[A, PAD / 32]`, each further one 16 behind; and which of them exist.

    Args:
        across: `[A]`, tokens of keys, dims of values.
        SUMMED: dims of keys, tokens of values; ACROSS: the other. What lies in their last tile behind them exists too.
        PAD: SUMMED, padded to a power of two, at least 32.
    """
    tile = tl.arange(0, PAD // LONG)
    whole = tl.cdiv(ACROSS, LONG) * LONG
    tiles = tile[None, :] * (whole // SHORT) + across[:, None] // SHORT
    exist = (tile < tl.cdiv(SUMMED, LONG))[None, :] & (across < whole)[:, None]
    return tiles * BITS * SHORT + across[:, None] % SHORT, exist


@triton.jit
def codes_of(
    planes_ptr,
    across,
    SUMMED: tl.constexpr,
    ACROSS: tl.constexpr,
    PAD: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Codes of one block plus `offset_of(DTYPE)`, `[A, PAD]` of that type; arguments as for `words_of`.

    In 16 bits nothing is converted: 2^m plus a code has the code as the last of the m bits of its mantissa. A word is
    halved five times, so that its numbers lie beside each other in one thread.
    """
    at, exist = words_of(across, SUMMED, ACROSS, PAD, BITS)
    if tl.bfloat16 == DTYPE:
        pairs = 0x43004300
    elif tl.float16 == DTYPE:
        pairs = 0x64006400
    else:
        pairs = 0
    for bit in tl.static_range(BITS):
        word = tl.load(planes_ptr + at + bit * SHORT, mask=exist, other=0)
        word = tl.join(word, word >> 8)
        word = tl.join(word, word >> 4)
        word = tl.join(word, word >> 2)
        word = tl.join(word, word >> 1)
        pairs |= (word & 0x00010001) << bit
    codes = tl.join(number_of(pairs, DTYPE), number_of(pairs >> 16, DTYPE))
    return tl.reshape(codes, [across.shape[0], PAD])


@triton.jit
def number_of(pairs, DTYPE: tl.constexpr):
    """The number in the lower half of a word."""
    if tl.float32 == DTYPE:
        number = (pairs & 0xFFFF).to(tl.float32)
    else:
        number = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    return number


@triton.jit
def offset_of(DTYPE: tl.constexpr, BITS: tl.constexpr):
    """What the numbers of `codes_of` are, on an average of all codes."""
    middle: tl.constexpr = (2**BITS - 1) * 0.5
    if tl.bfloat16 == DTYPE:
        offset = middle + 128
    elif tl.float16 == DTYPE:
        offset = middle + 1024
    else:
        offset = middle
    return offset
