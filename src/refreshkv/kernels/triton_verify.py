"""Several queries of a row at once on a GPU: the verification of a draft, and the votes of an observation window.

Group and queries together are the rows of one matrix product, so keys and values are read once for all G * T queries of
a KV head; where these need several tiles, the tiles run side by side and share the L2 cache. A query's share of
attention is known only with its log-sum-exp, after the last split. The votes then read the keys a second time, which
for T = 9, G = 4, D = 128 in 16 bits is 256 bytes a key beside the 512 of the first pass. Logits kept in float32 would
be 288, and with more queries or heads in a group more still; kept in 16 bits they would be fewer, and rounded.

Not yet run on a GPU: interpreter and ahead-of-time compilation only. Same signatures as `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.reference import Attended, Scored
from refreshkv.kernels.triton_common import (
    Config,
    absorb,
    contiguous_rows,
    finished_logits,
    for_every_head,
    merge,
    on_its_device,
    padded,
    span,
    split_count,
    strides,
)

# By padded head dim, for 16-bit caches: keys a block. A float32 cache takes half the block.
_ATTEND = {64: Config(128, 4, 3), 128: Config(64, 4, 3), 256: Config(32, 8, 2)}
_VOTE = {64: Config(256, 8, 1), 128: Config(128, 8, 1), 256: Config(64, 8, 1)}
_TILE = 64  # queries of a group in one matrix product


@on_its_device
def verify(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    reduction: Reduction = "max",
    window: int | None = None,
) -> tuple[Attended, Scored]:
    """See `reference.verify`."""
    options = (starts, counts, scale, softcap, sinks, visible, window)
    query, keys, values = map(contiguous_rows, (query, keys, values))
    attended = _attend(query, keys, values, *options)
    return attended, _vote(query, keys, attended.lse, *options, reduction)


@on_its_device
def vote(
    query: Tensor,
    keys: Tensor,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    reduction: Reduction = "max",
) -> Scored:
    """See `reference.vote`."""
    options = (starts, counts, scale, softcap, sinks, visible, None)
    query, keys = map(contiguous_rows, (query, keys))
    return _vote(query, keys, _attend(query, keys, None, *options).lse, *options, reduction)


def _attend(
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
    """Output (0 in width without values) and log-sum-exp of every query."""
    rows, heads, queries, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    value_dim = 0 if values is None else values.shape[-1]
    config = _config(_ATTEND, max(dim, value_dim), keys.dtype)
    tile = min(padded(heads // kv_heads * queries), _TILE)
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
        window,
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
    shape = (rows, heads, queries)
    return Attended(merged.output.view(*shape, -1), merged.lse.view(shape))


def _vote(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    starts: Tensor,
    counts: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    visible: Tensor | None,
    window: int | None,
    reduction: Reduction,
) -> Scored:
    rows, heads, queries, dim = query.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    config = _config(_VOTE, dim, keys.dtype)
    group_pad = triton.next_power_of_2(heads // kv_heads)
    tile = min(padded(group_pad * queries), _TILE)
    shown = for_every_head(visible, rows, kv_heads)
    scores = lse.new_empty(rows, kv_heads, length)
    vote_kernel[(triton.cdiv(length, config.block), kv_heads, rows)](
        query,
        keys,
        lse,
        shown,
        starts,
        counts,
        sinks,
        scores,
        length,
        scale,
        softcap,
        window,
        *strides(query, 3),
        *strides(keys, 3),
        *strides(shown, 3),
        GROUP=heads // kv_heads,
        GROUP_PAD=group_pad,
        QUERIES=queries,
        DIM=dim,
        DIM_PAD=padded(dim),
        TILE=tile,
        TILES=triton.cdiv(group_pad * queries, tile),
        BLOCK=config.block,
        MEAN=reduction == "mean",
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return Scored(scores, lse)


def _config(table: dict[int, Config], dim: int, dtype: torch.dtype) -> Config:
    config = table[padded(dim, least=64)]
    wide = dtype == torch.float32
    return Config(config.block // 2 if wide else config.block, config.warps, config.stages)


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

    start = tl.load(starts_ptr + row)
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
        if visible_ptr is not None:
            shown_ptr = visible_ptr + row * visible_row + head * visible_head
            shown = tl.load(shown_ptr + places * visible_place, mask=shown, other=0) != 0
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


@triton.jit
def vote_kernel(
    query_ptr,  # [B, Hq, T, D]
    keys_ptr,  # [B, Hkv, L, D]
    lse_ptr,  # [B, Hq, T] float32
    visible_ptr,  # [B, Hkv, L] bool, or None
    starts_ptr,  # [B] int64
    counts_ptr,  # [B] int64, or None
    sinks_ptr,  # [Hq], or None
    scores_ptr,  # [B, Hkv, L] float32
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
    visible_row,
    visible_head,
    visible_place,
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
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scores_ptr += (row * kv_heads + head) * length
    voting = tl.full([], QUERIES, tl.int64)
    if counts_ptr is not None:
        voting = tl.load(counts_ptr + row)
    start = tl.load(starts_ptr + row)
    begin, end = reach(start, voting, length, window)
    shown = (places >= begin) & (places < end)
    if (voting == 0) | (tl.max(shown.to(tl.int32), 0) == 0):
        tl.store(scores_ptr + places, tl.zeros([BLOCK], tl.float32), mask=places < length)
        return

    dims = tl.arange(0, DIM_PAD)
    keys = tl.load(
        keys_ptr + row * keys_row + head * keys_head + places[:, None] * keys_place + dims[None, :],
        mask=shown[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if visible_ptr is not None:
        shown_ptr = visible_ptr + row * visible_row + head * visible_head
        shown = tl.load(shown_ptr + places * visible_place, mask=shown, other=0) != 0
    votes = tl.zeros([BLOCK], tl.float32)
    for tile in tl.static_range(TILES):
        member = tile * TILE + tl.arange(0, TILE)  # query by query, each a padded group of heads
        query, own_head = member // GROUP_PAD, head * GROUP + member % GROUP_PAD
        votes_here = (query < voting) & (member % GROUP_PAD < GROUP)
        queries = tl.load(
            query_ptr
            + row * query_row
            + own_head[None, :] * query_head
            + query[None, :] * query_place
            + dims[:, None],
            mask=votes_here[None, :] & (dims < DIM)[:, None],
            other=0.0,
        )
        own_lse = (row * kv_heads * GROUP + own_head) * QUERIES + query
        lse = tl.load(lse_ptr + own_lse, mask=votes_here, other=0.0)
        products = tl.dot(keys, queries, input_precision="ieee")
        logits = finished_logits(products, scale, softcap)
        last = start + query
        seen = seen_by(last[None, :], places[:, None], shown[:, None], window)
        seen = seen & votes_here[None, :]
        weights = tl.where(seen, tl.exp(logits - lse[None, :]), 0.0)
        if sinks_ptr is not None:
            sinks = tl.load(sinks_ptr + own_head, mask=votes_here, other=0.0).to(tl.float32)
            weights *= tl.sigmoid(lse - sinks)[None, :]
        if MEAN:
            votes += tl.sum(weights, 1) / GROUP
        else:
            by_query = tl.reshape(weights, [BLOCK, TILE // GROUP_PAD, GROUP_PAD])
            votes += tl.sum(tl.max(by_query, 2), 1)
    tl.store(scores_ptr + places, votes / voting, mask=places < length)
