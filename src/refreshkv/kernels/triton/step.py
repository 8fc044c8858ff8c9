"""The operations of one query token: the partial step, the full step and the scores, from one pass over the entries.

Scores and ranks need the log-sum-exp of the whole row, so the pass keeps its logits (4 bytes a query head and token,
where keys and values have 512 a KV head at head dim 128) and a second kernel turns them into what is asked for.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Attended, AttendOptions, Entries, Scored
from refreshkv.kernels.triton.common import Config, beside_sink, on_its_device, padded
from refreshkv.kernels.triton.layout import asked_for, options_of, own_length
from refreshkv.kernels.triton.layout import serves as serves
from refreshkv.kernels.triton.split import attend_in_splits

# Entries whose scores are computed by one program.
SCORES = Config(block=1024, warps=4, stages=1)
# One program ranks all entries of a head, so many at once: 8 by each thread. A second launch takes longer.
RANKED_AT_ONCE, RANKED_BY_A_WARP = 8192, 256
_LOWEST = tl.constexpr(-(2**63))


@on_its_device
def attend(query: Tensor, entries: Entries, options: AttendOptions) -> Attended:
    """See `reference.attend`."""
    return attend_in_splits(query, entries, options)[0]


@on_its_device
def attend_and_score(
    query: Tensor, entries: Entries, options: AttendOptions, *, into: Tensor | None = None
) -> tuple[Attended, Scored]:
    """See `reference.attend_and_score`."""
    attended, logits = attend_in_splits(query, entries, options, keep_logits=True, into=into)
    rows, kv_heads = len(query), entries.kv_heads
    scores = attended.lse.new_empty(rows, kv_heads, entries.count)
    score_kernel[(triton.cdiv(entries.count, SCORES.block), kv_heads, rows)](
        logits,
        attended.lse,
        options_of(options, rows, kv_heads),
        scores,
        entries.count,
        GROUP=query.shape[1] // kv_heads,
        MEAN=options.reduction == "mean",
        BLOCK=SCORES.block,
        num_warps=SCORES.warps,
        num_stages=SCORES.stages,
    )
    return attended, Scored(scores, attended.lse)


@on_its_device
def score(query: Tensor, entries: Entries, options: AttendOptions) -> Scored:
    """See `reference.score`."""
    return attend_and_score(query, replace(entries, values=None), options)[1]


@on_its_device
def attend_and_rank(
    query: Tensor, entries: Entries, options: AttendOptions, *, newest: Tensor, count: int
) -> tuple[Attended, Tensor]:
    """See `reference.attend_and_rank`."""
    count = max(0, min(count, entries.count))
    attended, logits = attend_in_splits(query, entries, options, keep_logits=count > 0)
    rows, kv_heads = newest.shape
    if logits is None:
        return attended, newest.new_empty(rows, kv_heads, 0)
    best = newest.new_empty(rows, kv_heads, count)
    block = min(RANKED_AT_ONCE, padded(entries.count))
    best_kernel[(1, kv_heads, rows)](
        logits,
        attended.lse,
        options_of(options, rows, kv_heads),
        newest.contiguous(),
        best,
        entries.count,
        GROUP=query.shape[1] // kv_heads,
        MEAN=options.reduction == "mean",
        COUNT=count,
        COUNT_PAD=triton.next_power_of_2(count),
        BLOCK=block,
        num_warps=max(4, block // RANKED_BY_A_WARP),
        num_stages=1,
        maxnreg=64,
    )
    return attended, best


@triton.jit
def group_weights(
    logits_ptr,  # [B, Hq, n] float32
    lse_ptr,  # [B, Hq] float32
    how,
    row,
    head,
    index,
    entries,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
):
    """What each entry received from the query heads of a KV head, their mean or maximum; 0 beyond the length."""
    length = own_length(how, row, head, entries)
    group = (row * tl.num_programs(1) + head) * GROUP
    reduced = tl.zeros(index.shape, tl.float32)
    for member in tl.static_range(GROUP):
        lse = tl.load(lse_ptr + group + member)
        nothing = lse == float("-inf")  # was seen, and there may be no logits
        logits = tl.load(
            logits_ptr + (group + member) * entries + index,
            mask=index < tl.where(nothing, 0, length),
            other=float("-inf"),
        )
        weights = tl.exp(logits - tl.where(nothing, 0.0, lse))
        if how.sinks_ptr is not None:
            weights *= beside_sink(lse, tl.load(how.sinks_ptr + head * GROUP + member))
        if MEAN:
            reduced += weights / GROUP
        else:
            reduced = tl.maximum(reduced, weights, propagate_nan=tl.PropagateNan.ALL)
    return reduced


@triton.jit
def score_kernel(
    logits_ptr,  # [B, Hq, n] float32
    lse_ptr,  # [B, Hq] float32
    how,
    scores_ptr,  # [B, Hkv, n] float32
    entries,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of entries, Hkv, B)."""
    head, kv_heads, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    if not asked_for(how.heads_ptr, row, head, kv_heads):
        return
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scores = group_weights(logits_ptr, lse_ptr, how, row, head, index, entries, GROUP, MEAN)
    scores_ptr += (row * kv_heads + head) * entries
    tl.store(scores_ptr + index, scores, mask=index < entries)


@triton.jit
def best_kernel(
    logits_ptr,  # [B, Hq, n] float32
    lse_ptr,  # [B, Hq] float32
    how,
    newest_ptr,  # [B, Hkv] int64
    best_ptr,  # [B, Hkv, COUNT] int64
    entries,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best entries of a KV head, block by block, in the order of `selection.rank_keys`; grid (1, Hkv, B)."""
    head, kv_heads, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    if not asked_for(how.heads_ptr, row, head, kv_heads):
        return
    own = row * kv_heads + head
    newest, every = tl.load(newest_ptr + own), tl.arange(0, COUNT_PAD)
    best = tl.full([COUNT_PAD], _LOWEST, tl.int64)
    for first in tl.range(0, entries, BLOCK):
        index = first + tl.arange(0, BLOCK).to(tl.int64)
        scores = group_weights(logits_ptr, lse_ptr, how, row, head, index, entries, GROUP, MEAN)
        scores = tl.where(scores > 0, scores, 0.0)  # which a NaN is not
        scores = tl.where(index == newest, -1.0, scores)
        keys = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index
        keys = tl.where(index < entries, keys, _LOWEST)  # and all others are distinct
        before = best
        for rank in tl.range(COUNT):
            top = tl.maximum(tl.max(keys, 0), tl.max(before, 0))
            keys = tl.where(keys == top, _LOWEST, keys)
            before = tl.where(before == top, _LOWEST, before)
            best = tl.where(every == rank, top, best)
    tl.store(best_ptr + own * COUNT + every, best & 0xFFFFFFFF, mask=every < COUNT)
