"""A mixed step: attention by the codes of all entries, and exactly by the few that have weight in it, in four launches.

The unit is a block of 64 positions, as the codes have them: `score` gives each entry a logit, from its codes where it
has some; `count` finds the log-sum-exp of each head, and counts the largest weights of its GQA group in the buckets of
`rounding.worth_reading`; `attend` takes the largest ones exactly, the values of the others from their codes, and leaves
out blocks of little weight; and splits are merged. Logits are kept in between (4 bytes a query head and entry, where
keys and values at two bits take 64 a KV head at head dim 128), so that all launches choose alike.

Products are those with codes, which are small numbers and exact in 16 bits: a query is multiplied by the step of each
dim before, a sum of values after. So a query that is not finite, or one in float16 that such a product leaves its range
for, gives NaN where the restored key may give -inf.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Attended, AttendOptions, Entries
from refreshkv.kernels.reference.attention import without_list
from refreshkv.kernels.triton import codes as layout
from refreshkv.kernels.triton.codes import (
    BLOCK,
    LONG,
    codes_of,
    copy_of,
    each_of,
    grid_of,
    offset_of,
    place_of,
)
from refreshkv.kernels.triton.common import (
    MOST_SPLITS,
    finished_logits,
    merge,
    on_its_device,
    padded,
    span,
    split_count,
)
from refreshkv.kernels.triton.layout import (
    asked_for,
    kept_row,
    look_up,
    options_of,
    own_length,
    page_of,
    shown,
    store_of,
    strides,
)
from refreshkv.kernels.triton.rough import (
    BUCKETS,
    UNSPECIALIZED,
    count_kernel,
    cut,
    depth_of,
    score_kernel,
)

MOST_QUERIES = 16  # of a KV head: columns of a matrix product
LEAST_QUERIES = 8  # columns of one, and of one in `score` by the larger padded head dim
LEAST_SCORED = {64: 16, 128: 16, 256: 8}
_LIFT = 2.0**12  # of weights in float16, which has no number between 0 and 2^-24
COUNTED = 1024  # entries whose weights one program counts at once
WARPS = {2: 4, 4: 8}  # by the bytes of an element
# Registers of a thread in `attend`, by the larger padded head dim: in 16 bits three programs fit an SM of Hopper, or
# two. In `score` as many as there are: left to itself, the assembler spills a few bytes for the sake of a further one.
REGISTERS = {64: 192, 128: 168, 256: 255}
MOST_REGISTERS = 255


def serves(query: Tensor, entries: Entries, codes: Codes, options: AttendOptions, **_: Any) -> bool:
    """As for codes; and the queries of a KV head have to fit into a program."""
    return layout.serves(entries, codes) and query.shape[1] <= MOST_QUERIES * entries.kv_heads


@on_its_device
def attend_mixed(
    query: Tensor,
    entries: Entries,
    codes: Codes,
    options: AttendOptions,
    *,
    first: Tensor,
    finished: Tensor,
    budget: Tensor,
    skip: float = 0.0,
    tally: Tensor,
) -> Attended:
    """See `reference.attend_mixed`."""
    values = without_list(entries).values
    assert values is not None
    (rows, heads, dim), kv_heads, value_dim = query.shape, entries.kv_heads, values.shape[-1]
    widest = max(64, padded(dim), padded(value_dim))
    most = entries.count + BLOCK.value - 1  # positions of the blocks that have any
    splits = split_count(rows * kv_heads, most, BLOCK.value)
    width = triton.cdiv(most, BLOCK.value) * BLOCK.value
    logits = query.new_empty(rows, heads, width, dtype=torch.float32)
    lse = logits.new_empty(rows, heads, splits)
    alone, total = logits.new_empty(2, rows, heads)
    output = logits.new_empty(rows, heads, splits, value_dim)
    counts = logits.new_empty(rows, kv_heads, BUCKETS.value, dtype=torch.int32)
    store, limits = store_of(entries)
    copy, copy_limits = copy_of(codes, entries, first, finished)
    how = options_of(options, rows, kv_heads)
    group = heads // kv_heads
    warps = WARPS[query.element_size()]
    where = store, *limits, copy, *copy_limits, how
    score_kernel[(splits, kv_heads, rows)](
        query,
        *where,
        logits,
        lse,
        counts,
        entries.count,
        width,
        *strides(query, 2),
        PAGE=page_of(entries),
        EACH=each_of(codes),
        GROUP=group,
        TILE=padded(group, LEAST_SCORED[widest]),
        DIM=dim,
        DIM_PAD=padded(dim, LONG.value),
        BITS=codes.bits,
        maxnreg=MOST_REGISTERS,
        num_warps=warps,
        num_stages=1,
    )
    count_kernel[(split_count(rows * kv_heads, width, COUNTED), kv_heads, rows)](
        *where,
        logits,
        lse,
        alone,
        total,
        counts,
        entries.count,
        width,
        splits,
        EACH=each_of(codes),
        GROUP=group,
        TILE=padded(group, 1),
        MOST=MOST_SPLITS,
        AT_ONCE=COUNTED,
        num_warps=8,
    )
    attend_kernel[(splits, kv_heads, rows)](
        query,
        *where,
        logits,
        alone,
        total,
        counts,
        budget.contiguous(),
        output,
        lse,
        tally,
        skip,
        entries.count,
        width,
        *strides(query, 2),
        *strides(tally, 3),
        *codes.block_bytes,
        PAGE=page_of(entries),
        EACH=each_of(codes),
        GROUP=group,
        TILE=padded(group, LEAST_QUERIES),
        DIM=dim,
        DIM_PAD=padded(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        BITS=codes.value_bits,
        maxnreg=REGISTERS[widest] if query.element_size() == 2 else None,
        LIFT=_LIFT if query.dtype == torch.float16 else 1.0,
        num_warps=warps,
        num_stages=1,
    )
    return merge(
        output,
        lse,
        query.shape[:-1],
        dtype=values.dtype,
        sinks=options.sinks,
        heads=how.heads_ptr,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_kernel(
    query_ptr,  # [B, Hq, D]
    store,
    width,
    kept,
    pages,
    copy,
    room,
    coded,
    how,
    logits_ptr,  # [B, Hq, n'] float32
    alone_ptr,  # [B, Hq] float32, the log-sum-exp without the sink
    total_ptr,  # [B, Hq] float32
    counts_ptr,  # [B, Hkv, BUCKETS] int32
    budget_ptr,  # [B] int64
    output_ptr,  # [B, Hq, S, Dv] float32
    lse_ptr,  # [B, Hq, S] float32
    tally_ptr,  # [B, Hkv, 2] int64
    skip,
    entries,
    columns,
    query_row,
    query_head,
    tally_row,
    tally_head,
    tally_kind,
    key_bytes,
    value_bytes,
    PAGE: tl.constexpr,
    EACH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BITS: tl.constexpr,
    LIFT: tl.constexpr,
):
    """The chosen entries exactly, others by their codes where their block has weight; grid (S, Hkv, B)."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    if not asked_for(how.heads_ptr, row, head, kv_heads):
        return
    own = row * kv_heads + head
    member = tl.arange(0, TILE)
    real = member < GROUP
    queries = own * GROUP + member
    kept = kept_row(store.rows_ptr, row, kept)
    block_0, before, ahead, finished, end = cut(copy, how, row, head, room, kept, entries)
    tally_ptr += row * tally_row + head * tally_head
    if split == 0:
        behind = own_length(how, row, head, entries) - tl.maximum(block_0 + finished * BLOCK, 0)
        tl.atomic_add(tally_ptr, tl.maximum(behind, 0).to(tl.int64))
        tl.atomic_add(tally_ptr + tally_kind, finished.to(tl.int64) * key_bytes)
    first, stop = span(end, BLOCK)
    if first >= stop:
        tl.store(lse_ptr + queries * splits + split, float("-inf"), mask=real)
        return

    counts = tl.load(counts_ptr + own * BUCKETS + tl.arange(0, BUCKETS))
    fit = tl.sum((tl.cumsum(counts, 0) <= tl.load(budget_ptr + row)).to(tl.int32), 0)
    blocks = tl.maximum(tl.load(copy.finished_ptr + row), 1).to(tl.float32)
    total = tl.load(total_ptr + queries, mask=real, other=0.0)
    alone = tl.load(alone_ptr + queries, mask=real, other=0.0)
    base = tl.where(alone == float("-inf"), 0.0, alone)
    beside = tl.where(alone == float("-inf"), 0.0, tl.exp(alone - total))  # what a sink leaves
    dims, value_dims, lanes = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD), tl.arange(0, BLOCK)
    query_ptr += row * query_row + (head * GROUP + member)[:, None] * query_head
    query = tl.load(
        query_ptr + dims[None, :], mask=real[:, None] & (dims < DIM)[None, :], other=0.0
    )
    offset: tl.constexpr = offset_of(query.dtype, BITS)
    exact_acc = tl.zeros([VALUE_PAD, TILE], tl.float32)
    exact_mass = tl.zeros([TILE], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    # Of what is rounded the log-sum-exp is known before: its weights are at most 1, without a maximum.
    rounded_acc, rounded_mass = exact_acc, exact_mass
    exact, read = finished * 0, finished * 0
    for start in tl.range(first, stop, BLOCK):
        index = start + lanes
        logits = tl.load(
            logits_ptr + queries[None, :] * columns + index[:, None],
            mask=real[None, :],
            other=float("-inf"),
        )
        page, place = place_of(copy, coded, row, before + start // BLOCK, finished, EACH)
        wanted = lanes >= 0
        if page >= 0:
            wanted = depth_of(logits, total) < fit
            rounded = (logits > float("-inf")) | (logits != logits)
            weights = tl.exp(logits - base[None, :])
            weights = tl.where(rounded & (wanted[:, None] == 0), weights, 0.0)
            mass = tl.sum(weights, 0)
            if has_weight(mass * beside, skip / blocks):
                grids = copy.value_grids_ptr + page * copy.value_grid_row
                grids += head * copy.value_grid_head + place * copy.value_grid_block
                middle, step = grid_of(grids, value_dims, VALUE_DIM, BITS)
                planes = copy.values_ptr + page * copy.value_row + head * copy.value_head
                planes += place * copy.value_block
                codes = codes_of(planes, value_dims, BLOCK, VALUE_DIM, BLOCK, BITS, query.dtype)
                short = (weights * LIFT).to(query.dtype)
                sums = tl.dot(codes, short, input_precision="ieee")
                sums -= (tl.sum(short.to(tl.float32), 0) * offset)[None, :]
                rounded_acc += middle[:, None] * mass[None, :] + step[:, None] * (sums / LIFT)
                rounded_mass += mass
                read += 1
        chosen = tl.sum(wanted.to(tl.int32), 0)
        if chosen > 0:
            position = index - ahead
            seen = shown(how, row, head, position, wanted & (position >= 0) & (index < end))
            key_at, value_at, seen = look_up(
                store, width, pages, row, kept, head, position, seen, PAGE
            )
            if page >= 0:
                exact += chosen
                keys = tl.load(
                    store.keys_ptr + key_at[:, None] + dims[None, :],
                    mask=seen[:, None] & (dims < DIM)[None, :],
                    other=0.0,
                )
                products = tl.dot(keys, tl.trans(query), input_precision="ieee")
                logits = finished_logits(products, how.scale, how.softcap)
                logits = tl.where(seen[:, None], logits, float("-inf"))
            values = tl.load(
                store.values_ptr + value_at[:, None] + value_dims[None, :],
                mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
            new_top = tl.maximum(top, tl.max(logits, 0))
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp(logits - origin[None, :])
            decay = tl.exp(top - origin)
            exact_mass = exact_mass * decay + tl.sum(weights, 0)
            exact_acc = exact_acc * decay[None, :]
            short = weights.to(values.dtype)
            exact_acc += tl.dot(tl.trans(values), short, input_precision="ieee")
            top = new_top

    tl.atomic_add(tally_ptr, exact.to(tl.int64), mask=exact > 0)
    tl.atomic_add(tally_ptr + tally_kind, read.to(tl.int64) * value_bytes, mask=read > 0)
    top_of_all = tl.maximum(top, tl.where(rounded_mass == 0, float("-inf"), base))
    origin = tl.where(top_of_all == float("-inf"), 0.0, top_of_all)
    of_exact, of_rounded = tl.exp(top - origin), tl.exp(base - origin)
    of_rounded = tl.where(rounded_mass == 0, 0.0, of_rounded)
    mass = exact_mass * of_exact + rounded_mass * of_rounded
    acc = exact_acc * of_exact[None, :] + rounded_acc * of_rounded[None, :]
    lse = tl.where(mass == 0, float("-inf"), origin + tl.log(mass))  # NaN stays
    tl.store(lse_ptr + queries * splits + split, lse, mask=real)
    acc /= tl.where(mass == 0, 1.0, mass)[None, :]
    tl.store(
        output_ptr + (queries * splits + split)[None, :] * VALUE_DIM + value_dims[:, None],
        acc,
        mask=real[None, :] & (value_dims < VALUE_DIM)[:, None],
    )


@triton.jit
def has_weight(masses, least):
    """Whether any query head gives a block weight `[M]`, and not less than `least`."""
    broken = tl.max((masses != masses).to(tl.int32), 0) > 0
    most = tl.max(masses, 0)
    return broken | ((most != 0) & (most >= least))
