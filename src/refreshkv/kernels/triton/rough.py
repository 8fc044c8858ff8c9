"""The first two launches of a mixed step: the logits that codes give, and how many entries have how much weight."""

from __future__ import annotations

import triton
import triton.language as tl

from refreshkv.kernels.triton.codes import (
    BLOCK,
    COPY_LIMITS,
    codes_of,
    grid_of,
    offset_of,
    place_of,
)
from refreshkv.kernels.triton.common import finished_logits, span
from refreshkv.kernels.triton.layout import (
    LIMITS,
    asked_for,
    kept_row,
    look_up,
    own_length,
    shown,
)
from refreshkv.policy import rounding

BUCKETS = tl.constexpr(rounding.BUCKETS)
STEPS_A_NAT = tl.constexpr(rounding.STEPS_A_NAT)
UNSPECIALIZED = [*LIMITS, *COPY_LIMITS, "entries"]


@triton.jit
def cut(copy, how, row, head, room, kept, entries):
    """How a row is cut into blocks. All int32.

    Returns:
        first: the position of block 0, as near as the row has blocks.
        before: the number of the block that holds position 0, less than 0 where positions lie before block 0.
        ahead: where in its block position 0 lies.
        finished: blocks with codes.
        end: where the positions that count end, from the beginning of that block on.
    """
    first = tl.maximum(tl.load(copy.first_ptr + row), (room + 1) * -BLOCK)
    first = tl.minimum(first, entries).to(tl.int32)
    ahead = -first & (BLOCK - 1)
    finished = tl.load(copy.finished_ptr + row)
    finished = tl.minimum(tl.maximum(finished, 0), room).to(tl.int32)
    length = tl.where(kept >= 0, own_length(how, row, head, entries), 0)
    return first, (-first - ahead) // BLOCK, ahead, finished, length + ahead


@triton.jit
def depth_of(logits, total):
    """The bucket of `rounding.worth_reading` of each entry, BUCKETS for no candidate; logits `[N, M]`, total `[M]`."""
    weights = logits - tl.where(total == float("-inf"), 0.0, total)[None, :]
    broken = tl.max((weights != weights).to(tl.int32), 1) > 0  # a maximum may drop a NaN
    largest = tl.where(broken, float("-inf"), tl.max(weights, 1))
    candidate = largest > float("-inf")
    depth = -tl.where(candidate, largest, 0.0) * STEPS_A_NAT
    depth = tl.minimum(tl.maximum(depth, 0.0), BUCKETS - 1).to(tl.int32)
    return tl.where(candidate, depth, BUCKETS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def score_kernel(
    query_ptr,  # [B, Hq, D]
    store,
    width,
    kept,
    pages,
    copy,
    room,
    coded,
    how,
    logits_ptr,  # [B, Hq, n'] float32, by blocks
    lse_ptr,  # [B, Hq, S] float32
    counts_ptr,  # [B, Hkv, BUCKETS] int32
    entries,
    columns,
    query_row,
    query_head,
    PAGE: tl.constexpr,
    EACH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BITS: tl.constexpr,
):
    """Logits by the keys of the codes, or the exact ones of entries without; grid (S, Hkv, B)."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    if not asked_for(how.heads_ptr, row, head, kv_heads):
        return
    own = row * kv_heads + head
    if split == 0:
        tl.store(counts_ptr + own * BUCKETS + tl.arange(0, BUCKETS), 0)
    member = tl.arange(0, TILE)
    real = member < GROUP
    queries = own * GROUP + member
    kept = kept_row(store.rows_ptr, row, kept)
    _first, before, ahead, finished, end = cut(copy, how, row, head, room, kept, entries)
    first, stop = span(end, BLOCK)
    if first >= stop:
        tl.store(lse_ptr + queries * splits + split, float("-inf"), mask=real)
        return

    dims, lanes = tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    query_ptr += row * query_row + (head * GROUP + member)[:, None] * query_head
    query = tl.load(
        query_ptr + dims[None, :], mask=real[:, None] & (dims < DIM)[None, :], other=0.0
    )
    # Of each place in a block by itself: what is common to them waits for the end.
    top = tl.full([BLOCK, TILE], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK, TILE], tl.float32)
    offset: tl.constexpr = offset_of(query.dtype, BITS)
    for start in tl.range(first, stop, BLOCK):
        index = start + lanes
        position = index - ahead
        seen = shown(how, row, head, position, (position >= 0) & (index < end))
        key_at, _value_at, seen = look_up(
            store, width, pages, row, kept, head, position, seen, PAGE
        )
        page, place = place_of(copy, coded, row, before + start // BLOCK, finished, EACH)
        if page >= 0:
            grids = copy.key_grids_ptr + page * copy.key_grid_row + head * copy.key_grid_head
            middle, step = grid_of(grids + place * copy.key_grid_block, dims, DIM, BITS)
            planes = copy.keys_ptr + page * copy.key_row + head * copy.key_head
            planes += place * copy.key_block
            codes = codes_of(planes, lanes, DIM, BLOCK, DIM_PAD, BITS, query.dtype)
            wide = query.to(tl.float32)
            stepped = (wide * step[None, :]).to(query.dtype)
            beside = wide * middle[None, :] - stepped.to(tl.float32) * offset
            products = tl.dot(codes, tl.trans(stepped), input_precision="ieee")
            products += tl.sum(beside, 1)[None, :]
        else:
            # What is not seen is not read: it may hold anything.
            keys = tl.load(
                store.keys_ptr + key_at[:, None] + dims[None, :],
                mask=seen[:, None] & (dims < DIM)[None, :],
                other=0.0,
            )
            products = tl.dot(keys, tl.trans(query), input_precision="ieee")
        logits = finished_logits(products, how.scale, how.softcap)
        logits = tl.where(seen[:, None], logits, float("-inf"))
        kept_logits = logits_ptr + queries[None, :] * columns + index[:, None]
        tl.store(kept_logits, logits, mask=real[None, :])
        new_top = tl.maximum(top, logits)
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        mass = mass * tl.exp(top - origin) + tl.exp(logits - origin)
        top = new_top
    highest = tl.max(top, 0)
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(mass * tl.exp(top - origin[None, :]), 0)
    lse = tl.where(total == 0, float("-inf"), origin + tl.log(total))  # NaN stays
    tl.store(lse_ptr + queries * splits + split, lse, mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def count_kernel(
    store,
    width,
    kept,
    pages,
    copy,
    room,
    coded,
    how,
    logits_ptr,  # [B, Hq, n'] float32
    lse_ptr,  # [B, Hq, S] float32
    alone_ptr,  # [B, Hq] float32, without the sink
    total_ptr,  # [B, Hq] float32
    counts_ptr,  # [B, Hkv, BUCKETS] int32, zeros
    entries,
    columns,
    splits,
    EACH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The log-sum-exp of each head and its sink, and in which buckets the entries are; grid (P, Hkv, B).

    Program p takes every P-th piece of N entries, so that a short row of a wide store is no more work than it is long.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    if not asked_for(how.heads_ptr, row, head, kv_heads):
        return
    own = row * kv_heads + head
    kept = kept_row(store.rows_ptr, row, kept)
    _first, before, _ahead, finished, end = cut(copy, how, row, head, room, kept, entries)
    stop = tl.cdiv(end, BLOCK) * BLOCK
    if (part > 0) & (part * AT_ONCE >= stop):
        return
    member, every = tl.arange(0, TILE), tl.arange(0, MOST)
    real = member < GROUP
    queries = own * GROUP + member
    lses = tl.load(
        lse_ptr + queries[:, None] * splits + every[None, :],
        mask=real[:, None] & (every < splits)[None, :],
        other=float("-inf"),
    )
    top = tl.max(lses, 1)
    origin = tl.where(top == float("-inf"), 0.0, top)
    alone = origin + tl.log(tl.sum(tl.exp(lses - origin[:, None]), 1))
    total = alone
    if how.sinks_ptr is not None:
        sinks = tl.load(how.sinks_ptr + head * GROUP + member, mask=real, other=0.0)
        total = add_exponentials(alone, sinks.to(tl.float32))
    if part == 0:
        tl.store(alone_ptr + queries, alone, mask=real)
        tl.store(total_ptr + queries, total, mask=real)

    count = tl.zeros([BUCKETS], tl.int32)
    for start in tl.range(part * AT_ONCE, stop, parts * AT_ONCE):
        index = start + tl.arange(0, AT_ONCE)
        page, _place = place_of(copy, coded, row, before + index // BLOCK, finished, EACH)
        covered = (page >= 0) & (index < stop)
        logits = tl.load(
            logits_ptr + queries[None, :] * columns + index[:, None],
            mask=real[None, :] & covered[:, None],
            other=float("-inf"),
        )
        depth = depth_of(logits, tl.where(real, total, 0.0))
        count += tl.histogram(depth, BUCKETS, mask=depth < BUCKETS)
    tl.atomic_add(counts_ptr + own * BUCKETS + tl.arange(0, BUCKETS), count, mask=count > 0)


@triton.jit
def add_exponentials(one, other):
    """log(exp(one) + exp(other)), as `torch.logaddexp`."""
    top = tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)
    sum = top + tl.log(tl.exp(one - top) + tl.exp(other - top))
    return tl.where(tl.abs(top) == float("inf"), top, sum)
