"""Several queries of a row at once on a GPU: the verification of a draft, and the votes of an observation window.

A query's share of attention is known only with its log-sum-exp, after the last split. With a guess of it the votes are
given in the one pass over the keys. Without one they read the keys a second time, which for T = 8, G = 4, D = 128 in 16
bits is 256 bytes a key beside the 512 of the first pass. Logits kept in float32 would be 256 as well, and with more
queries or heads in a group more; in 16 bits they would be half of that, and rounded.

With a guess there are two launches, and one that adds the votes where the queries of a group need several tiles;
without one three. `options.verify_queries` says with how many queries the rows of a tile are full.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Attended, AttendOptions, Entries, Scored, window_within
from refreshkv.kernels.reference.attention import without_list
from refreshkv.kernels.triton.common import (
    LOG2_E,
    Config,
    beside_sink,
    finished_logits,
    on_its_device,
    padded,
)
from refreshkv.kernels.triton.layout import (
    LIMITS,
    asked_for,
    contiguous_rows,
    kept_row,
    look_up,
    options_of,
    own_length,
    page_of,
    shown,
    store_of,
    strides,
)
from refreshkv.kernels.triton.layout import serves as serves
from refreshkv.kernels.triton.split import TILE, attend_in_splits, reach, seen_by, start_of

# By padded head dim and the bytes of an element, as in `split`.
VOTE = {
    (64, 2): Config(block=128, warps=8, stages=1),
    (128, 2): Config(block=64, warps=8, stages=1),
    (256, 2): Config(block=32, warps=8, stages=1),
    (64, 4): Config(block=32, warps=8, stages=1),
    (128, 4): Config(block=32, warps=8, stages=1),
    (256, 4): Config(block=32, warps=8, stages=1),
}


@on_its_device
def verify(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    window: int | None = None,
    expected: Tensor | None = None,
) -> tuple[Attended, Scored]:
    """See `reference.verify`."""
    starts, counts = starts.contiguous(), None if counts is None else counts.contiguous()
    attended, votes = attend_in_splits(
        query,
        without_list(entries),
        options,
        starts=starts,
        counts=counts,
        window=window,
        expected=expected,
    )
    if votes is not None:
        return attended, Scored(votes, attended.lse)
    query, kv_heads = contiguous_rows(query), entries.kv_heads
    rows, heads, queries, dim = query.shape
    group_pad = triton.next_power_of_2(heads // kv_heads)
    kind = (padded(dim, least=64), entries.keys.itemsize)
    config, tile = VOTE[kind], max(group_pad, min(padded(group_pad * queries), TILE[kind]))
    scores = attended.lse.new_empty(rows, kv_heads, entries.count)
    store, limits = store_of(replace(entries, values=None))
    vote_kernel[(triton.cdiv(entries.count, config.block), kv_heads, rows)](
        query,
        store,
        *limits,
        options_of(options, rows, kv_heads),
        starts,
        counts,
        attended.lse,
        scores,
        entries.count,
        window_within(window, entries.count + queries),
        *strides(query, 3),
        PAGE=page_of(entries),
        GROUP=heads // kv_heads,
        GROUP_PAD=group_pad,
        QUERIES=queries,
        DIM=dim,
        DIM_PAD=padded(dim),
        TILE=tile,
        TILES=triton.cdiv(group_pad * queries, tile),
        BLOCK=config.block,
        MEAN=options.reduction == "mean",
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return attended, Scored(scores, attended.lse)


@on_its_device
def vote(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
) -> Scored:
    """See `reference.vote`."""
    return verify(query, replace(entries, values=None), options, starts=starts, counts=counts)[1]


@triton.jit(do_not_specialize=LIMITS)
def vote_kernel(
    query_ptr,  # [B, Hq, T, D]
    store,
    width,
    kept,
    pages,
    how,
    starts_ptr,  # [B] int64
    counts_ptr,  # [B] int64, or None
    lse_ptr,  # [B, Hq, T] float32
    scores_ptr,  # [B, Hkv, L] float32
    entries,
    window,
    query_row,
    query_head,
    query_token,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    MEAN: tl.constexpr,
):
    """What the queries of a group give to one block of keys; grid (blocks, Hkv, B)."""
    head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    if not asked_for(how.heads_ptr, row, head, kv_heads):
        return
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scores_ptr += (row * kv_heads + head) * entries
    voting = tl.full([], QUERIES, tl.int32)
    if counts_ptr is not None:
        voting = tl.minimum(tl.maximum(tl.load(counts_ptr + row), 0), QUERIES).to(tl.int32)
    start = start_of(starts_ptr, row, QUERIES, entries)
    begin, end = reach(start, voting, entries, window)
    kept = kept_row(store.rows_ptr, row, kept)
    end = tl.where(kept >= 0, tl.minimum(end, own_length(how, row, head, entries)), 0)
    inside = (index >= begin) & (index < end)
    if (voting == 0) | (tl.max(inside.to(tl.int32), 0) == 0):
        tl.store(scores_ptr + index, tl.zeros([BLOCK], tl.float32), mask=index < entries)
        return

    some = shown(how, row, head, index, inside)
    at, _, some = look_up(store, width, pages, row, kept, head, index, some, PAGE)
    dims = tl.arange(0, DIM_PAD)
    keys = tl.load(
        store.keys_ptr + at[:, None] + dims[None, :],
        mask=some[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    votes = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        member = tile * TILE + tl.arange(0, TILE)  # query by query, each a padded group of heads
        query, own_head = member // GROUP_PAD, head * GROUP + member % GROUP_PAD
        votes_here = (query < voting) & (member % GROUP_PAD < GROUP)
        queries = tl.load(
            query_ptr
            + row * query_row
            + own_head[None, :] * query_head
            + query[None, :] * query_token
            + dims[:, None],
            mask=votes_here[None, :] & (dims < DIM)[:, None],
            other=0.0,
        )
        own_lse = (row * kv_heads * GROUP + own_head) * QUERIES + query
        lse = tl.load(lse_ptr + own_lse, mask=votes_here, other=0.0)
        products = tl.dot(keys, queries, input_precision="ieee")
        logits = finished_logits(products, how.scale, how.softcap)
        last = start + query
        seen = seen_by(last[None, :], index[:, None], some[:, None], window)
        seen = seen & votes_here[None, :]
        weights = tl.where(seen, tl.exp2(logits * LOG2_E - (lse * LOG2_E)[None, :]), 0.0)
        broken = tl.where(lse != lse, lse, 0.0)  # a NaN, which a maximum might not keep
        if how.sinks_ptr is not None:
            sink = tl.load(how.sinks_ptr + own_head, mask=votes_here, other=0.0)
            share = beside_sink(lse, sink)
            weights *= share[None, :]
            broken += share * 0
        votes += tl.sum(broken, 0)
        if MEAN:
            votes += tl.sum(weights, 1) / GROUP
        else:
            by_query = tl.reshape(weights, [BLOCK, TILE // GROUP_PAD, GROUP_PAD])
            votes += tl.sum(tl.max(by_query, 2), 1)
    tl.store(scores_ptr + index, votes / voting, mask=index < entries)
