"""Selection on a GPU: the K best tokens of each head, exactly those and in the order of `selection.select`.

One program a head finds them. It leaves the score of each token, pooled and with the rules applied, in scratch as one
integer, and finds the K-th largest 6 bits at a time, from histograms: first of all tokens, soon of the few that may
still be it. What is larger is chosen, and of its equals those that come last. A program also sorts as many as it can
hold; more take two further launches. Launches are the same whatever the scores, and nothing asks the device.

Source: ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.triton.common import Config, on_its_device, padded
from refreshkv.kernels.triton.layout import strides
from refreshkv.kernels.triton.order import (
    LARGEST,
    SORT,
    ascending,
    slot_kernel,
    sort_kernel,
)
from refreshkv.policy.selection import FREE, Selected, pool_width, slot_count

CHOOSE = Config(block=4096, warps=16, stages=1)  # tokens
SLOT = Config(block=512, warps=4, stages=1)  # keys
# The bits of 2^-31: the first histogram has a bin for each half octave from there to 2, where shares of attention lie.
LIKELY = tl.constexpr((127 - 31) << 23)
FEW = tl.constexpr(8)  # a list of one token in so many is quicker to look through than all of them
ANCHORS = tl.constexpr(512)  # at once


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
    """See `selection.select`. The heads left out get `FREE` slots."""
    rows, kv_heads, length = scores.shape
    most = slot_count(budget, slots, length)
    pairs = (rows, kv_heads)
    ranks = budget.new_empty(*pairs, length, dtype=torch.int32)
    chosen = budget.new_empty(*pairs, most, dtype=torch.int64)
    positions = budget.new_empty(*pairs, most, dtype=torch.int32)
    filled = budget.new_empty(pairs, dtype=torch.int64)
    newest = recent if isinstance(recent, Tensor) else None
    in_order = most <= SORT.block
    choose_kernel[(kv_heads, rows)](
        scores,
        visible,
        heads,
        newest,
        anchors,
        ends,
        budget,
        ranks,
        torch.empty_like(ranks),
        chosen,
        positions if in_order else None,
        filled,
        length,
        0 if isinstance(recent, Tensor) else max(0, min(recent, length)),
        0 if anchors is None else anchors.shape[2],
        most,
        *scores.stride(),
        *strides(visible, 2),
        *strides(heads, 2),
        *strides(anchors, 3),
        *strides(newest, 1),
        *strides(ends, 1),
        *strides(budget, 1),
        POOL=pool_width(pool_kernel, length),
        CHUNK=padded(most, least=min(SORT.block, 1024)),
        BLOCK=CHOOSE.block,
        num_warps=CHOOSE.warps,
        num_stages=CHOOSE.stages,
    )
    if not in_order:
        chunks = (triton.cdiv(most, SORT.block), *pairs[::-1])
        sort_kernel[chunks](chosen, filled, most, CHUNK=SORT.block, num_warps=SORT.warps)
        slot_kernel[(triton.cdiv(most, SLOT.block), *pairs[::-1])](
            chosen,
            filled,
            positions,
            most,
            FREE=FREE,
            CHUNK=SORT.block,
            BLOCK=SLOT.block,
            num_warps=SLOT.warps,
        )
    return Selected(positions, filled)


@triton.jit
def ranked(
    scores_ptr,
    visible_ptr,
    tokens,
    end,
    newest,
    scores_token,
    visible_token,
    LIFT: tl.constexpr,
    POOL: tl.constexpr,
):
    """`selection.candidates` of some tokens of a head as bits; -1 for what does not count, which may be outside.

    Args:
        scores_ptr: of the head; visible_ptr: of the row, or None.
        newest: the first of the newest tokens, which are kept by rule.
        LIFT: what the rule for anchors adds.
    """
    pooled = tl.zeros(tokens.shape, tl.float32)
    for step in tl.static_range(POOL):
        near = tokens + (step - POOL // 2)
        shown = (near >= 0) & (near < end)
        if visible_ptr is not None:
            visible = visible_ptr + near.to(tl.int64) * visible_token
            shown = tl.load(visible, mask=shown, other=0) != 0
        score = tl.load(scores_ptr + near.to(tl.int64) * scores_token, mask=shown, other=0.0)
        # Not a maximum: a NaN, -0 and -1 count as 0.
        score = score.to(tl.float32)
        pooled = tl.where(score > pooled, score, pooled)
        if step == POOL // 2:
            counted = shown
    pooled = tl.where(tokens >= newest, 4.0, pooled + LIFT)
    return tl.where(counted, pooled.to(tl.int32, bitcast=True), -1)


@triton.jit
def load_ranks(ranks_ptr, listed_ptr, index, count):
    """Ranks of the tokens of a list, or of all where it is None; and these tokens. -1 from `count` on."""
    tokens = index
    if listed_ptr is not None:
        tokens = tl.load(listed_ptr + index, mask=index < count, other=0)
    return tl.load(ranks_ptr + tokens, mask=index < count, other=-1), tokens


@triton.jit
def narrowed(
    ranks_ptr, listed_ptr, total, low, left, need, count, GUESS: tl.constexpr, BLOCK: tl.constexpr
):
    """The next 6 bits of the `need`-th largest, need >= 1, of the `count` ranks from `low` to low + 2^left.

    Returns the same four numbers for the bin that it lies in.

    Args:
        listed_ptr: the `total` tokens to look at; None: the first, which are all.
        GUESS: the interval may be a wrong one: `need` and `count` are of all ranks. What it leaves out counts in its
            outermost bins, and if the rank wanted lies in these, the interval returned is that of all.
    """
    shift = tl.maximum(left - 6, 0)
    counts = tl.zeros([64], tl.int32)
    for start in range(0, total, BLOCK):
        bits, _ = load_ranks(ranks_ptr, listed_ptr, start + tl.arange(0, BLOCK), total)
        digit = (bits - low) >> shift
        if GUESS:
            counted = bits >= 0
            digit = tl.minimum(tl.maximum(digit, 0), 63)
        else:
            counted = ((bits - low) >> left) == 0
        counts += tl.histogram(digit, 64, mask=counted)
    bins = tl.arange(0, 64)
    above = tl.cumsum(counts, reverse=True) - counts
    digit = tl.sum((above >= need).to(tl.int32))
    if GUESS and ((digit == 0) | (digit == 63)):
        low, left = 0, 31
    else:
        low += digit << shift
        left = shift
        need -= tl.sum(tl.where(bins > digit, counts, 0))
        count = tl.sum(tl.where(bins == digit, counts, 0))
    return low, left, need, count


@triton.jit
def two_counts(first, second):
    """How often each is true, all in all and up to every place: one number, the second in its upper 16 bits."""
    ones = first.to(tl.int32) + (second.to(tl.int32) << 16)
    return tl.sum(ones), tl.cumsum(ones)


@triton.jit
def split(ranks_ptr, listed_ptr, chosen_ptr, length, low, left, most, BLOCK: tl.constexpr):
    """Keys of the ranks from low + 2^left on, and a list of the tokens from `low` to there; how many are in each."""
    larger, near = 0, 0
    for start in range(0, length, BLOCK):
        bits, tokens = load_ranks(ranks_ptr, None, start + tl.arange(0, BLOCK), length)
        digit = (bits - low) >> left
        both, order = two_counts(digit > 0, digit == 0)
        slot = larger + (order & 0xFFFF) - 1
        key = (bits.to(tl.int64) << 32) | tokens
        tl.store(chosen_ptr + slot, key, mask=(digit > 0) & (slot < most))
        tl.store(listed_ptr + near + (order >> 16) - 1, tokens, mask=digit == 0)
        larger += both & 0xFFFF
        near += both >> 16
    return larger, near


@triton.jit
def collect(
    ranks_ptr,
    listed_ptr,
    chosen_ptr,
    count,
    taken,
    smallest,
    left_out,
    most,
    BLOCK: tl.constexpr,
):
    """After `taken` keys those of the listed ranks above `smallest`, and of its equals but the first `left_out`."""
    larger, equal = 0, 0
    for start in range(0, count, BLOCK):
        bits, tokens = load_ranks(ranks_ptr, listed_ptr, start + tl.arange(0, BLOCK), count)
        both, order = two_counts(bits > smallest, bits == smallest)
        later = tl.maximum(equal + (order >> 16) - left_out, 0)  # of the equals so far
        slot = taken + larger + (order & 0xFFFF) + later - 1
        enters = (bits > smallest) | ((bits == smallest) & (later > 0))
        key = (bits.to(tl.int64) << 32) | tokens
        tl.store(chosen_ptr + slot, key, mask=enters & (slot < most))
        larger += both & 0xFFFF
        equal += both >> 16


@triton.jit(do_not_specialize=["length", "recent", "anchors"])
def choose_kernel(
    scores_ptr,  # [B, Hkv, L]
    visible_ptr,  # [B, L] bool, or None
    heads_ptr,  # [B, Hkv] bool, or None
    recent_ptr,  # [B] int64, or None
    anchors_ptr,  # [B, Hkv, A] int32, or None
    ends_ptr,  # [B] int64, or None
    budget_ptr,  # [B] int64
    ranks_ptr,  # [B, Hkv, L] int32
    listed_ptr,  # [B, Hkv, L] int32
    chosen_ptr,  # [B, Hkv, K] int64
    positions_ptr,  # [B, Hkv, K] int32; None where more than CHUNK have to be sorted
    filled_ptr,  # [B, Hkv] int64
    length,
    recent,
    anchors,
    most,
    scores_row,
    scores_head,
    scores_token,
    visible_row,
    visible_token,
    heads_row,
    heads_head,
    anchors_row,
    anchors_head,
    anchors_token,
    recent_row,
    ends_row,
    budget_row,
    POOL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys of the tokens that a head keeps, and in order where they fit; grid (Hkv, B)."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = row * tl.num_programs(0) + head
    ranks_ptr += own * length
    listed_ptr += own * length
    chosen_ptr += own * most
    scores_ptr += row * scores_row + head * scores_head
    if visible_ptr is not None:
        visible_ptr += row * visible_row
    budget = tl.load(budget_ptr + row * budget_row)
    if heads_ptr is not None:
        asked = tl.load(heads_ptr + row * heads_row + head * heads_head)
        budget = tl.where(asked, budget, 0)
    need = tl.minimum(tl.maximum(budget, 0), most).to(tl.int32)
    if need > 0:
        end = length
        if ends_ptr is not None:
            end = tl.minimum(tl.maximum(tl.load(ends_ptr + row * ends_row), 0), length)
            end = end.to(tl.int32)
        if recent_ptr is not None:
            recent = tl.load(recent_ptr + row * recent_row)
            recent = tl.minimum(tl.maximum(recent, 0), length).to(tl.int32)
        newest = end - recent
        counts = tl.zeros([BLOCK // 2], tl.int32)
        for start in range(0, length, BLOCK // 2):  # no more fits into the registers
            tokens = start + tl.arange(0, BLOCK // 2)
            bits = ranked(
                scores_ptr, visible_ptr, tokens, end, newest, scores_token, visible_token, 0.0, POOL
            )
            tl.store(ranks_ptr + tokens, bits, mask=tokens < length)
            counts += (bits >= 0).to(tl.int32)
        if anchors_ptr is not None:
            anchors_ptr += row * anchors_row + head * anchors_head
            tl.debug_barrier()  # anchors are written over what other threads wrote
            for start in range(0, anchors, ANCHORS):
                each = start + tl.arange(0, ANCHORS)
                tokens = tl.load(anchors_ptr + each * anchors_token, mask=each < anchors, other=-1)
                bits = ranked(
                    scores_ptr,
                    visible_ptr,
                    tokens,
                    end,
                    newest,
                    scores_token,
                    visible_token,
                    2.0,
                    POOL,
                )
                inside = (tokens >= 0) & (tokens < length)
                tl.store(ranks_ptr + tokens, bits, mask=inside & (bits >= 0))
        tl.debug_barrier()
        count = tl.sum(counts)
        need = tl.minimum(need, count)
        filled = need
        if need > 0:
            low, left = tl.cast(LIKELY, tl.int32), 28
            if count > need:
                low, left, need, count = narrowed(
                    ranks_ptr, None, length, low, left, need, count, True, BLOCK
                )
            else:
                low, left = 0, 31
            while (left > 0) & (count > tl.maximum(need, length // FEW)):
                low, left, need, count = narrowed(
                    ranks_ptr, None, length, low, left, need, count, False, BLOCK
                )
            # Most are decided; the others make a list.
            taken, near = split(ranks_ptr, listed_ptr, chosen_ptr, length, low, left, most, BLOCK)
            tl.debug_barrier()
            while (left > 0) & (count > need):
                low, left, need, count = narrowed(
                    ranks_ptr, listed_ptr, near, low, left, need, count, False, BLOCK // 2
                )
            left_out = count - need
            collect(ranks_ptr, listed_ptr, chosen_ptr, near, taken, low, left_out, most, BLOCK)
        tl.debug_barrier()
        need = filled
    tl.store(filled_ptr + own, need.to(tl.int64))
    if positions_ptr is not None:  # they fit into a chunk
        slot = tl.arange(0, CHUNK)
        keys = tl.load(chosen_ptr + slot, mask=slot < need, other=LARGEST)
        position = ascending(keys, CHUNK).to(tl.int32)
        tl.store(positions_ptr + own * most + slot, position, mask=slot < most)
