"""Several queries of a row at once on a GPU: the verification of a draft, and the votes of an observation window.

A query's share of attention is known only with its log-sum-exp, after the last split. The votes therefore read the keys
a second time, which for T = 9, G = 4, D = 128 in 16 bits is 256 bytes a key beside the 512 of the first pass. Logits
kept in float32 would be 288, and with more queries or heads in a group more still; in 16 bits they would be 144, and
rounded.

Same signatures as `reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.options import Attended, Scored, window_within
from refreshkv.kernels.triton.causal import TILE, attend_causal, reach, seen_by, start_of
from refreshkv.kernels.triton.common import (
    Config,
    beside_sink,
    contiguous_rows,
    finished_logits,
    for_every_head,
    on_its_device,
    padded,
    strides,
)

# By padded head dim and the bytes of an element, as in `triton_causal`.
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
    options = (*_of_rows(starts, counts), scale, softcap, sinks, visible, window)
    query, keys, values = map(contiguous_rows, (query, keys, values))
    attended = attend_causal(query, keys, values, *options)
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
    options = (*_of_rows(starts, counts), scale, softcap, sinks, visible, None)
    query, keys = map(contiguous_rows, (query, keys))
    return _vote(query, keys, attend_causal(query, keys, None, *options).lse, *options, reduction)


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
    group_pad = triton.next_power_of_2(heads // kv_heads)
    kind = (padded(dim, least=64), keys.itemsize)
    config, tile = VOTE[kind], min(padded(group_pad * queries), TILE[kind])
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
        window_within(window, length + queries),
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


def _of_rows(starts: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One number a row in memory, as the kernels read it; what comes in may be expanded."""
    return starts.contiguous(), None if counts is None else counts.contiguous()


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
        voting = tl.minimum(tl.maximum(tl.load(counts_ptr + row), 0), QUERIES)
    start = start_of(starts_ptr, row, QUERIES, length)
    begin, end = reach(start, voting, length, window)
    shown = (places >= begin) & (places < end)
    if (voting == 0) | (tl.max(shown.to(tl.int32), 0) == 0):
        tl.store(scores_ptr + places, tl.zeros([BLOCK], tl.float32), mask=places < length)
        return

    if visible_ptr is not None:
        shown_ptr = visible_ptr + row * visible_row + head * visible_head
        shown = tl.load(shown_ptr + places * visible_place, mask=shown, other=0) != 0
    dims = tl.arange(0, DIM_PAD)
    keys = tl.load(
        keys_ptr + row * keys_row + head * keys_head + places[:, None] * keys_place + dims[None, :],
        mask=shown[:, None] & (dims < DIM)[None, :],
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
        broken = tl.where(lse != lse, lse, 0.0)  # a NaN, which a maximum might not keep
        if sinks_ptr is not None:
            share = beside_sink(lse, tl.load(sinks_ptr + own_head, mask=votes_here, other=0.0))
            weights *= share[None, :]
            broken += share * 0
        votes += tl.sum(broken, 0)
        if MEAN:
            votes += tl.sum(weights, 1) / GROUP
        else:
            by_query = tl.reshape(weights, [BLOCK, TILE // GROUP_PAD, GROUP_PAD])
            votes += tl.sum(tl.max(by_query, 2), 1)
    tl.store(scores_ptr + places, votes / voting, mask=places < length)
