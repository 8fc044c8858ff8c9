"""Attention of the newest T tokens of a row, causal among them: one pass over keys and values for all of them.

Group and queries together are the rows of one matrix product, so keys and values are read once for all G * T queries of
a KV head; where these need several tiles, the tiles run side by side and share the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Attended, window_within
from refreshkv.kernels.triton.common import (
    Config,
    absorb,
    finished_logits,
    for_every_head,
    merge,
    padded,
    span,
    split_count,
    strides,
)

# By the larger padded head dim and the bytes of an element: two programs or more fit an SM, none spills. Products of
# float32 take no tensor cores.
ATTEND = {
    (64, 2): Config(block=128, warps=4, stages=3),
    (128, 2): Config(block=64, warps=4, stages=3),
    (256, 2): Config(block=32, warps=4, stages=2),
    (64, 4): Config(block=32, warps=8, stages=2),
    (128, 4): Config(block=16, warps=8, stages=2),
    (256, 4): Config(block=16, warps=8, stages=2),
}
# Queries of a group in one matrix product.
TILE = {(64, 2): 64, (128, 2): 64, (256, 2): 32, (64, 4): 32, (128, 4): 32, (256, 4): 16}


def attend_causal(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    starts: Tensor,
    counts: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
    window: int | None,
) -> Attended:
    """Output and log-sum-exp as in `reference.verify`; without values the log-sum-exp alone."""
    rows, heads, queries, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    value_dim = 0 if values is None else values.shape[-1]
    kind = (padded(max(dim, value_dim), least=64), keys.itemsize)
    config, tile = ATTEND[kind], min(padded(heads // kv_heads * queries), TILE[kind])
    tiles = triton.cdiv(heads // kv_heads * queries, tile)
    splits = split_count(rows * kv_heads * tiles, length, config.block)
    shown = for_every_head(visible, rows, kv_heads)
    lse = query.new_empty(rows, heads * queries, splits, dtype=torch.float32)
    partial = None if values is None else lse.new_empty(*lse.shape, value_dim)
    attend_kernel[(splits, kv_heads * tiles, rows)](
        query,
        keys,
        values,
        shown,
        starts,
        counts,
        partial,
        lse,
        length,
        scale,
        softcap,
        window_within(window, length + queries),
        *strides(query, 3),
        *strides(keys, 3),
        *strides(values, 3),
        *strides(shown, 3),
        GROUP=heads // kv_heads,
        QUERIES=queries,
        DIM=dim,
        DIM_PAD=padded(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        TILE=tile,
        TILES=tiles,
        BLOCK=config.block,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    merged = merge(
        partial,
        lse,
        dtype=query.dtype if values is None else values.dtype,
        sinks=sinks,
        heads=None,
        queries=queries,
    )
    return Attended(*(x.unflatten(1, (heads, queries)) for x in merged))


@triton.jit
def start_of(starts_ptr, row, queries, length):
    """The place of a row's first query, none of which lies outside of -queries .. length."""
    return tl.minimum(tl.maximum(tl.load(starts_ptr + row), -queries), length)


@triton.jit
def reach(start, queries, length, window):
    """The first place that the first of the queries sees, and the end of what the last one sees."""
    begin = start * 0
    if window is not None:
        begin = tl.maximum(start - window + 1, 0)
    return begin, tl.minimum(start + queries, length)


@triton.jit
def seen_by(last, places, shown, window):
    """Whether the query at place `last` sees a place; the arguments broadcast."""
    seen = (places <= last) & shown
    if window is not None:
        seen = seen & (places > last - window)
    return seen


@triton.jit
def attend_kernel(
    query_ptr,  # [B, Hq, T, D]
    keys_ptr,  # [B, Hkv, L, D]
    values_ptr,  # [B, Hkv, L, Dv], or None: the log-sum-exp alone is wanted
    visible_ptr,  # [B, Hkv, L] bool, or None
    starts_ptr,  # [B] int64
    counts_ptr,  # [B] int64, or None
    partial_ptr,  # [B, Hq * T, S, Dv] float32, or None
    partial_lse_ptr,  # [B, Hq * T, S] float32
    length,
    scale,
    softcap,
    window,
    query_row,
    query_head,
    query_place,
    keys_row,
    keys_head,
    keys_place,
    values_row,
    values_head,
    values_place,
    visible_row,
    visible_head,
    visible_place,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of a group's queries over one split; grid (S, Hkv * tiles, B)."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    head, row = tl.program_id(1) // TILES, tl.program_id(2).to(tl.int64)
    member = tl.program_id(1) % TILES * TILE + tl.arange(0, TILE)  # head by head, query by query
    exists = member < GROUP * QUERIES
    dims, value_dims = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)

    start = start_of(starts_ptr, row, QUERIES, length)
    begin, end = reach(start, QUERIES, length, window)
    if counts_ptr is not None:
        end = tl.where(tl.load(counts_ptr + row) > 0, end, begin)
    first, stop = span(tl.maximum(end - begin, 0), BLOCK)

    query_ptr += row * query_row + (head * GROUP + member // QUERIES)[:, None] * query_head
    query_ptr += (member % QUERIES)[:, None] * query_place
    keys_ptr += row * keys_row + head * keys_head + dims[:, None]
    has_dim = dims < DIM
    queries = tl.load(query_ptr + dims[None, :], mask=exists[:, None] & has_dim[None, :], other=0.0)
    last = start + member % QUERIES
    acc = tl.zeros([TILE, VALUE_PAD], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    for block in range(begin + first, begin + stop, BLOCK):
        places = block + tl.arange(0, BLOCK)
        shown = places < begin + stop
        if visible_ptr is not None:
            shown_ptr = visible_ptr + row * visible_row + head * visible_head
            shown = tl.load(shown_ptr + places * visible_place, mask=shown, other=0) != 0
        keys = tl.load(
            keys_ptr + places[None, :] * keys_place,
            mask=shown[None, :] & has_dim[:, None],
            other=0.0,
        )
        values = None
        if values_ptr is not None:
            values = tl.load(
                values_ptr
                + row * values_row
                + head * values_head
                + places[:, None] * values_place
                + value_dims[None, :],
                mask=shown[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
        products = tl.dot(queries, keys, input_precision="ieee")
        logits = finished_logits(products, scale, softcap)
        seen = seen_by(last[:, None], places[None, :], shown[None, :], window)
        logits = tl.where(seen, logits, float("-inf"))
        acc, top, mass = absorb(logits, values, acc, top, mass)

    place = (row * tl.num_programs(1) // TILES + head) * GROUP * QUERIES + member
    place = place * splits + split
    tl.store(partial_lse_ptr + place, top + tl.log(mass), mask=exists)
    if values_ptr is not None:
        found = exists & (mass > 0)
        tl.store(
            partial_ptr + place[:, None] * VALUE_DIM + value_dims[None, :],
            acc / mass[:, None],
            mask=found[:, None] & (value_dims < VALUE_DIM)[None, :],
        )
