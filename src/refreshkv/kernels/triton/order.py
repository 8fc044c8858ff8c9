"""Distinct integers in ascending order on a GPU: a chunk by a sorting network, many chunks by looking up.

A chunk is what one program sorts. Where there are more, each key counts how many of every chunk go before it. A key is
a score above a position, which is its lower half.

Source: ours; the network is Batcher's bitonic one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refreshkv.kernels.triton.common import Config

SORT = Config(block=4096, warps=16, stages=1)  # keys
LARGEST = tl.constexpr((1 << 63) - 1)  # above every key; its lower half is FREE


@triton.constexpr_function
def exponent(count):
    """Of a power of two."""
    return count.bit_length() - 1


@triton.jit
def ascending(keys, COUNT: tl.constexpr):
    """`keys` `[COUNT]` int64 in order; tl.sort, which takes the interpreter half a minute."""
    for merged in tl.static_range(exponent(COUNT)):
        for level in tl.static_range(merged + 1):
            keys = exchanged(keys, 1 << (merged - level), level, COUNT)
    return keys


@triton.jit
def exchanged(keys, DISTANCE: tl.constexpr, LEVEL: tl.constexpr, COUNT: tl.constexpr):
    """Each two keys at a distance in order, which every 2^LEVEL groups of such pairs turns round."""
    GROUPS: tl.constexpr = COUNT // (2 * DISTANCE)
    pairs = tl.reshape(keys, [GROUPS, 2, DISTANCE])
    partner = tl.sum(pairs, 1, keep_dims=True) - pairs
    group = tl.arange(0, GROUPS)[:, None, None]
    takes_larger = tl.arange(0, 2)[None, :, None] != ((group >> LEVEL) & 1)
    pairs = tl.where((partner > pairs) == takes_larger, partner, pairs)
    return tl.reshape(pairs, [COUNT])


@triton.jit
def sort_kernel(
    chosen_ptr,  # [B, Hkv, K] int64
    filled_ptr,  # [B, Hkv] int64
    most,
    CHUNK: tl.constexpr,
):
    """Each chunk in order, in place; grid (chunks, Hkv, B)."""
    own = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    filled = tl.load(filled_ptr + own)
    if tl.program_id(0) * CHUNK < filled:
        chosen_ptr += own * most
        keys = tl.load(chosen_ptr + slot, mask=slot < filled, other=LARGEST)
        tl.store(chosen_ptr + slot, ascending(keys, CHUNK), mask=slot < filled)


@triton.jit
def slot_kernel(
    chosen_ptr,  # [B, Hkv, K] int64, sorted chunks
    filled_ptr,  # [B, Hkv] int64
    positions_ptr,  # [B, Hkv, K] int32
    most,
    FREE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slot of each key is the number of smaller ones, by bisection in every chunk; grid (blocks, Hkv, B)."""
    own = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    filled = tl.load(filled_ptr + own).to(tl.int32)
    used = slot < filled
    chosen_ptr += own * most
    positions_ptr += own * most
    tl.store(positions_ptr + slot, FREE, mask=(slot >= filled) & (slot < most))
    key = tl.load(chosen_ptr + slot, mask=used, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    for chunk in range(0, filled, CHUNK):
        size = tl.minimum(filled - chunk, CHUNK)
        smaller = tl.zeros([BLOCK], tl.int32)
        step = CHUNK
        while step > 0:
            further = smaller + step
            fits = used & (further <= size)
            probe = tl.load(chosen_ptr + chunk + further - 1, mask=fits, other=0)
            smaller = tl.where(fits & (probe < key), further, smaller)
            step //= 2
        rank += smaller
    tl.store(positions_ptr + rank, key.to(tl.int32), mask=used & (rank < most))
