"""Selection and gather on a GPU: the K best tokens of each head, exactly those and in the order of `selection.select`.

A radix selection: what a token is ranked by becomes one integer, the bits of its score over its position, so that all
differ. Five counts of a digit each, the first 8 and the others 12 bits wide, find the K-th largest; what reaches it is
collected, sorted in chunks, and each token looks up how many of the other chunks go before it. The launches are the
same whatever the scores, the cost depends on K only in the last two, and nothing asks the device.

Source: ours. Not yet run on a GPU: interpreter and ahead-of-time compilation only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.triton_common import Config, on_its_device, padded, strides
from refreshkv.selection import FREE, Selection

_PLACE_BITS = tl.constexpr(25)
_DIGIT_BITS = tl.constexpr(12)
_DIGITS = tl.constexpr(
    5
)  # 31 bits of a score >= 0 and those of its place, the first digit being short
_BINS = tl.constexpr(1 << 12)
_COUNT = Config(block=4096, warps=8, stages=1)  # tokens
_SORT = Config(block=1024, warps=8, stages=1)  # tokens
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
    """See `selection.select`. The heads left out get `FREE` slots. At most 2^25 tokens."""
    rows, kv_heads, length = scores.shape
    if length > 1 << _PLACE_BITS.value:
        raise ValueError(f"{length} tokens are more than the {1 << _PLACE_BITS.value} a key holds")
    most = min(int(budget.max()) if slots is None else slots, length)
    if isinstance(recent, int):
        recent = torch.full_like(budget, recent) if recent else None
    pairs = (rows, kv_heads)
    lifts = None
    if anchors is not None:
        lifts = scores.new_zeros(*pairs, length)
        lift_kernel[(triton.cdiv(anchors.shape[-1], 1024), kv_heads, rows)](
            anchors, lifts, anchors.shape[-1], length, *anchors.stride(), BLOCK=1024
        )
    ranks = scores.new_empty(*pairs, length, dtype=torch.int32)
    counts = scores.new_zeros(*pairs, _DIGITS.value, _BINS.value, dtype=torch.int32)
    found = budget.new_empty(*pairs, _DIGITS.value, 2)
    filled = budget.new_empty(pairs)
    taken = budget.new_empty(pairs)
    chosen = budget.new_empty(*pairs, most)
    positions = torch.empty_like(chosen)

    blocks = (triton.cdiv(length, _COUNT.block), kv_heads, rows)
    rank_kernel[blocks](
        scores,
        visible,
        heads,
        recent,
        lifts,
        ends,
        ranks,
        counts,
        length,
        *scores.stride(),
        *strides(visible, 2),
        *strides(heads, 2),
        POOL=pool_kernel,
        BLOCK=_COUNT.block,
        num_warps=_COUNT.warps,
    )
    for digit in range(1, _DIGITS.value):
        count_kernel[blocks](
            ranks,
            budget,
            counts,
            found,
            filled,
            taken,
            length,
            DIGIT=digit,
            BLOCK=_COUNT.block,
            num_warps=_COUNT.warps,
        )
    collect_kernel[blocks](
        ranks,
        counts,
        found,
        taken,
        chosen,
        length,
        most,
        BLOCK=_COUNT.block,
        num_warps=_COUNT.warps,
    )
    chunks = (triton.cdiv(most, _SORT.block), kv_heads, rows)
    sort_kernel[chunks](chosen, filled, most, CHUNK=_SORT.block, num_warps=_SORT.warps)
    merge_kernel[chunks](
        chosen, filled, positions, most, FREE=FREE, CHUNK=_SORT.block, num_warps=_SORT.warps
    )
    return Selection(positions, filled)


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
    """What rule adds to the scores of anchors; grid (blocks of anchors, Hkv, B)."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    anchors_ptr += row * anchors_row + head * anchors_head
    place = tl.load(anchors_ptr + index * anchors_place, mask=index < anchors, other=-1)
    lifts_ptr += (row * tl.num_programs(1) + head) * length
    tl.atomic_add(lifts_ptr + place, 2.0, mask=place >= 0)


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
    end = tl.cast(length, tl.int64)
    if ends_ptr is not None:
        end = tl.load(ends_ptr + row)
    scores_ptr += row * scores_row + head * scores_head
    pooled = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(POOL):
        near = places + (step - POOL // 2)
        shown = (near >= 0) & (near < tl.minimum(end, length))
        if visible_ptr is not None:
            visible = visible_ptr + row * visible_row + near * visible_place
            shown = tl.load(visible, mask=shown, other=0) != 0
        score = tl.load(scores_ptr + near.to(tl.int64) * scores_place, mask=shown, other=0.0)
        pooled = tl.maximum(pooled, score.to(tl.float32))
        if step == POOL // 2:
            counted = shown
    if lifts_ptr is not None:
        pooled += tl.load(lifts_ptr + own * length + places, mask=counted, other=0.0)
    if recent_ptr is not None:
        pooled = tl.where(places >= end - tl.load(recent_ptr + row), 4.0, pooled)
    bits = tl.where(counted, pooled.to(tl.int32, bitcast=True), -1)
    tl.store(ranks_ptr + own * length + places, bits, mask=places < length)
    count = tl.histogram(bits >> 23, 256, mask=counted)
    bins = tl.arange(0, 256)
    tl.atomic_add(counts_ptr + own * _DIGITS * _BINS + bins, count, mask=count > 0)


@triton.jit
def next_digit(counts_ptr, need):
    """The digit of the `need`-th largest, need >= 1, from the counts of each digit; and how many with it are needed."""
    bins = tl.arange(0, _BINS)
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
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the digit DIGIT of what agrees with the K-th largest in those before; grid (blocks, Hkv, B)."""
    row = tl.program_id(2).to(tl.int64)
    own = row * tl.num_programs(1) + tl.program_id(1)
    counts_ptr += (own * _DIGITS + DIGIT) * _BINS
    found_ptr += (own * _DIGITS + DIGIT) * 2
    first = tl.program_id(0) == 0
    if DIGIT == 1:
        prefix = tl.cast(0, tl.int64)
        tokens = tl.sum(tl.load(counts_ptr - _BINS + tl.arange(0, _BINS)))
        need = tl.minimum(tl.load(budget_ptr + row), tokens)
        tl.store(filled_ptr + own, need, mask=first)
        tl.store(taken_ptr + own, tl.cast(0, tl.int64), mask=first)
    else:
        prefix, need = tl.load(found_ptr - 2), tl.load(found_ptr - 1)
    if need > 0:
        digit, need = next_digit(counts_ptr - _BINS, need)
        prefix = (prefix << _DIGIT_BITS) | digit
        places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = load_keys(ranks_ptr + own * length, places, length)
        key >>= _DIGIT_BITS * (_DIGITS - 1 - DIGIT)
        agrees = (key >> _DIGIT_BITS) == prefix
        tl.atomic_add(counts_ptr + (key & (_BINS - 1)), 1, mask=agrees)
    tl.store(found_ptr, prefix, mask=first)
    tl.store(found_ptr + 1, need, mask=first)


@triton.jit
def load_keys(ranks_ptr, places, length):
    """Score over position, negative for what does not count."""
    bits = tl.load(ranks_ptr + places, mask=places < length, other=-1)
    return (bits.to(tl.int64) << _PLACE_BITS) | places


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
    last = own * _DIGITS + _DIGITS - 1
    need = tl.load(found_ptr + last * 2 + 1)
    if need > 0:
        digit, _ = next_digit(counts_ptr + last * _BINS, need)
        smallest = (tl.load(found_ptr + last * 2) << _DIGIT_BITS) | digit
        places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = load_keys(ranks_ptr + own * length, places, length)
        reaches = (key >= smallest).to(tl.int32)
        enough = tl.sum(reaches)
        if enough > 0:
            before = tl.atomic_add(taken_ptr + own, enough.to(tl.int64))
            slot = before + tl.cumsum(reaches) - 1
            tl.store(chosen_ptr + own * most + slot, key, mask=reaches > 0)


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
    # A bitonic network. tl.sort is the same with its partner found by xor, which the interpreter does one by one.
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
def merge_kernel(
    chosen_ptr,  # [B, Hkv, K] int64, sorted chunks
    filled_ptr,  # [B, Hkv] int64
    positions_ptr,  # [B, Hkv, K] int64
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
    tl.store(positions_ptr + slot, tl.cast(FREE, tl.int64), mask=(slot >= filled) & (slot < most))
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
    place_mask = (tl.cast(1, tl.int64) << _PLACE_BITS) - 1
    tl.store(positions_ptr + rank, key & place_mask, mask=used)


@triton.jit
def gather_kernel(
    source_ptr,  # [B, Hkv, L, D]
    positions_ptr,  # [B, Hkv, K] int64
    out_ptr,  # [B, Hkv, C, D]
    heads_ptr,  # [B, Hkv] bool, or None
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
    wanted = (place >= 0)[:, None] & (dims < DIM)
    source_ptr += row * source_row + head * source_head
    out_ptr += row * out_row + head * out_head
    content = tl.load(
        source_ptr + place[:, None] * source_place + dims * source_dim, mask=wanted, other=0.0
    )
    tl.store(out_ptr + slot[:, None] * out_slot + dims * out_dim, content, mask=wanted)
