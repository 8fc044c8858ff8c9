"""The K largest of many distinct integers on a GPU, smallest first.

A key is the bits of a score over the position of its token, so no two are equal. Five counts of a digit each, the first
8 and the others 12 bits wide, find the K-th largest. What reaches it is collected and sorted in chunks, and each key
looks up how many of every chunk go before it. Only these last two depend on K.

Source: ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.triton.common import Config
from refreshkv.policy.selection import FREE

TOKEN_BITS = tl.constexpr(25)
DIGIT_BITS = tl.constexpr(12)
DIGITS = tl.constexpr(
    5
)  # 31 bits of a score >= 0 and those of its token, the first digit being short
BINS = tl.constexpr(1 << 12)
LONGEST = 1 << 25
COUNT = Config(block=4096, warps=8, stages=1)  # tokens
SORT = Config(block=1024, warps=8, stages=1)  # tokens


def largest(ranks: Tensor, counts: Tensor, budget: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The positions of the K highest ranks, lowest first and ties to the later, as in `selection.Selected`.

    Args:
        ranks: `[B, Hkv, L]` int32, the bits of a float32 >= 0; negative for what does not count.
        counts: `[B, Hkv, DIGITS, BINS]` int32, how many of a head have each first digit (bits 23 to 30), then zeros,
            which are used up.
        budget: `[B]` int64, K of each row.
        most: slots of the result.
    """
    rows, kv_heads, length = ranks.shape
    pairs = (rows, kv_heads)
    found = budget.new_empty(*pairs, DIGITS.value, 2)
    filled, taken = budget.new_empty(pairs), budget.new_empty(pairs)
    chosen = budget.new_empty(*pairs, most)
    positions = torch.empty_like(chosen, dtype=torch.int32)
    blocks = (max(1, triton.cdiv(length, COUNT.block)), kv_heads, rows)
    for digit in range(1, DIGITS.value):
        count_kernel[blocks](
            ranks,
            budget,
            counts,
            found,
            filled,
            taken,
            length,
            most,
            DIGIT=digit,
            BLOCK=COUNT.block,
            num_warps=COUNT.warps,
        )
    collect_kernel[blocks](
        ranks, counts, found, taken, chosen, length, most, BLOCK=COUNT.block, num_warps=COUNT.warps
    )
    chunks = (triton.cdiv(most, SORT.block), kv_heads, rows)
    sort_kernel[chunks](chosen, filled, most, CHUNK=SORT.block, num_warps=SORT.warps)
    slot_kernel[chunks](
        chosen, filled, positions, most, FREE=FREE, CHUNK=SORT.block, num_warps=SORT.warps
    )
    return positions, filled


@triton.jit
def next_digit(counts_ptr, need):
    """The digit of the `need`-th largest, need >= 1, from the counts of each digit; and how many with it are needed."""
    bins = tl.arange(0, BINS)
    count = tl.load(counts_ptr + bins)
    above = tl.sum(count) - tl.cumsum(count)
    digit = tl.sum((above >= need).to(tl.int64))
    return digit, need - tl.sum(tl.where(bins > digit, count, 0))


@triton.jit
def count_kernel(
    ranks_ptr,  # [B, Hkv, L] int32
    budget_ptr,  # [B] int64
    counts_ptr,  # [B, Hkv, digits, bins] int32
    found_ptr,  # [B, Hkv, digits, 2] int64: the digits so far, and how many with these are needed
    filled_ptr,  # [B, Hkv] int64
    taken_ptr,  # [B, Hkv] int64
    length,
    most,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the digit DIGIT of what agrees with the K-th largest in those before; grid (blocks, Hkv, B)."""
    row = tl.program_id(2).to(tl.int64)
    own = row * tl.num_programs(1) + tl.program_id(1)
    counts_ptr += (own * DIGITS + DIGIT) * BINS
    found_ptr += (own * DIGITS + DIGIT) * 2
    first = tl.program_id(0) == 0
    if DIGIT == 1:
        prefix = tl.cast(0, tl.int64)
        total = tl.sum(tl.load(counts_ptr - BINS + tl.arange(0, BINS)))
        need = tl.minimum(tl.load(budget_ptr + row), tl.minimum(total, most))
        need = tl.maximum(need, 0)
        tl.store(filled_ptr + own, need, mask=first)
        tl.store(taken_ptr + own, tl.cast(0, tl.int64), mask=first)
    else:
        prefix, need = tl.load(found_ptr - 2), tl.load(found_ptr - 1)
    if need > 0:
        digit, need = next_digit(counts_ptr - BINS, need)
        prefix = (prefix << DIGIT_BITS) | digit
        tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = load_keys(ranks_ptr + own * length, tokens, length)
        key >>= DIGIT_BITS * (DIGITS - 1 - DIGIT)
        agrees = (key >> DIGIT_BITS) == prefix
        tl.atomic_add(counts_ptr + (key & (BINS - 1)), 1, mask=agrees)
    tl.store(found_ptr, prefix, mask=first)
    tl.store(found_ptr + 1, need, mask=first)


@triton.jit
def load_keys(ranks_ptr, tokens, length):
    """Score over position, negative for what does not count."""
    bits = tl.load(ranks_ptr + tokens, mask=tokens < length, other=-1)
    return (bits.to(tl.int64) << TOKEN_BITS) | tokens


@triton.jit
def collect_kernel(
    ranks_ptr,  # [B, Hkv, L] int32
    counts_ptr,  # [B, Hkv, digits, bins] int32
    found_ptr,  # [B, Hkv, digits, 2] int64
    taken_ptr,  # [B, Hkv] int64, zeros
    chosen_ptr,  # [B, Hkv, K] int64
    length,
    most,
    BLOCK: tl.constexpr,
):
    """The keys from the K-th largest up, in any order; grid (blocks, Hkv, B)."""
    own = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    last = own * DIGITS + DIGITS - 1
    need = tl.load(found_ptr + last * 2 + 1)
    if need > 0:
        digit, _ = next_digit(counts_ptr + last * BINS, need)
        smallest = (tl.load(found_ptr + last * 2) << DIGIT_BITS) | digit
        tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = load_keys(ranks_ptr + own * length, tokens, length)
        reaches = (key >= smallest).to(tl.int32)
        enough = tl.sum(reaches)
        if enough > 0:
            before = tl.atomic_add(taken_ptr + own, enough.to(tl.int64))
            slot = before + tl.cumsum(reaches) - 1
            tl.store(chosen_ptr + own * most + slot, key, mask=(reaches > 0) & (slot < most))


@triton.jit
def sort_kernel(
    chosen_ptr,  # [B, Hkv, K] int64
    filled_ptr,  # [B, Hkv] int64
    most,
    CHUNK: tl.constexpr,
):
    """Each chunk ascending, in place; grid (chunks, Hkv, B)."""
    own = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    used = slot < tl.load(filled_ptr + own)
    chosen_ptr += own * most
    largest = tl.cast(1, tl.int64) << 62
    keys = tl.load(chosen_ptr + slot, mask=used, other=largest)
    # A bitonic network; that of tl.sort takes the interpreter half a minute.
    index = tl.arange(0, CHUNK)
    width = 2
    while width <= CHUNK:
        distance = width // 2
        while distance > 0:
            partner = tl.gather(keys, index ^ distance, 0)
            takes_smaller = ((index & distance) == 0) == ((index & width) == 0)
            smaller, larger = tl.minimum(keys, partner), tl.maximum(keys, partner)
            keys = tl.where(takes_smaller, smaller, larger)
            distance //= 2
        width *= 2
    tl.store(chosen_ptr + slot, keys, mask=used)


@triton.jit
def slot_kernel(
    chosen_ptr,  # [B, Hkv, K] int64, sorted chunks
    filled_ptr,  # [B, Hkv] int64
    positions_ptr,  # [B, Hkv, K] int32
    most,
    FREE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The slot of each key is the number of smaller ones, by bisection in every chunk; grid (chunks, Hkv, B)."""
    own = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    filled = tl.load(filled_ptr + own)
    used = slot < filled
    chosen_ptr += own * most
    positions_ptr += own * most
    tl.store(positions_ptr + slot, FREE, mask=(slot >= filled) & (slot < most))
    key = tl.load(chosen_ptr + slot, mask=used, other=0)
    rank = tl.zeros([CHUNK], tl.int64)
    for chunk in range(0, filled, CHUNK):
        size = tl.minimum(filled - chunk, CHUNK)
        smaller = tl.zeros([CHUNK], tl.int64)
        step = CHUNK
        while step > 0:
            further = smaller + step
            fits = used & (further <= size)
            probe = tl.load(chosen_ptr + chunk + further - 1, mask=fits, other=0)
            smaller = tl.where(fits & (probe < key), further, smaller)
            step //= 2
        rank += smaller
    token_mask = (tl.cast(1, tl.int64) << TOKEN_BITS) - 1
    tl.store(positions_ptr + rank, (key & token_mask).to(tl.int32), mask=used & (rank < most))
