"""One pass over keys and values: each split of a KV head on its own, for the query heads of a group together.

The queries of a group, one token or the newest T of a row, are the rows of one matrix product, padded to the 16 that
tensor cores take: keys and values are read once for all of them, and at 1 to 8 queries the pass waits for memory
either way. Where G * T queries need several tiles, these run side by side and share the L2 cache. The logits are kept
where the scores or ranks of one token follow, so that no key is read twice. The votes of several queries follow at once
from a guess of each log-sum-exp, where there is one: then no key is read twice either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Attended, AttendOptions, Entries, window_within
from refreshkv.kernels.triton.common import (
    LOG2_E,
    Config,
    absorb,
    beside_sink,
    finished_logits,
    merge,
    padded,
    span,
    split_count,
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

# By the larger padded head dim and the bytes of an element. In 16 bits none spills and two programs fit an SM. Products
# of float32 take no tensor cores.
IN_PLACE = {
    (64, 2): Config(block=128, warps=4, stages=3),
    (128, 2): Config(block=64, warps=4, stages=3),
    (256, 2): Config(block=32, warps=8, stages=3),
    (64, 4): Config(block=64, warps=8, stages=2),
    (128, 4): Config(block=32, warps=8, stages=2),
    (256, 4): Config(block=16, warps=8, stages=2),
}
# Entries by a list or in pages. The list is read ahead of the keys, which takes stages: with these, as many keys are
# under way.
LISTED = {
    (64, 2): Config(block=64, warps=4, stages=5),
    (128, 2): Config(block=64, warps=4, stages=5),
    (256, 2): Config(block=32, warps=4, stages=5),
    (64, 4): Config(block=32, warps=8, stages=3),
    (128, 4): Config(block=16, warps=8, stages=3),
    (256, 4): Config(block=16, warps=8, stages=3),
}
_SECOND_LIST_STAGES = 2  # more, for positions in pages
# Several queries of a row are more rows of a product, which leaves fewer registers: what they take in place of those.
IN_PLACE_SEVERAL = IN_PLACE | {
    (256, 2): Config(block=16, warps=4, stages=3),
    (64, 4): Config(block=32, warps=8, stages=2),
    (128, 4): Config(block=16, warps=8, stages=2),
}
LISTED_SEVERAL = LISTED | {(128, 2): Config(block=32, warps=4, stages=5)}
# With votes, which take registers as well: in place of either.
GUESSED = {
    (64, 2): Config(block=64, warps=4, stages=5),
    (64, 4): Config(block=16, warps=8, stages=3),
}
# Queries of a group in one matrix product.
TILE = {(64, 2): 64, (128, 2): 64, (256, 2): 32, (64, 4): 32, (128, 4): 32, (256, 4): 16}


def attend_in_splits(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    window: int | None = None,
    expected: Tensor | None = None,
    keep_logits: bool = False,
    into: Tensor | None = None,
) -> tuple[Attended, Tensor | None]:
    """`reference.attend`, or with `starts` that of `reference.verify`; and more where it is asked for.

    Without values the log-sum-exp alone. In second place the logits `[B, Hq, n]` if kept, or with `expected` the scores
    of `reference.verify`. `into` as in `reference.attend_and_score`.
    """
    query = contiguous_rows(query)
    (rows, heads, *several), dim = query.shape[:-1], query.shape[-1]
    queries = several[0] if several else 1
    kv_heads, values = entries.kv_heads, entries.values
    value_dim = 0 if values is None else values.shape[-1]
    kind = (padded(max(dim, value_dim), least=64), entries.keys.itemsize)
    lists = (entries.positions is not None) + (entries.blocks is not None)
    plain = not lists and starts is None and entries.keys.itemsize == 2
    tables = (IN_PLACE, LISTED) if starts is None else (IN_PLACE_SEVERAL, LISTED_SEVERAL)
    config = tables[lists > 0][kind]
    if expected is not None:
        config = GUESSED.get(kind, config)
    group = heads // kv_heads
    # A maximum over the heads of a group needs them in one tile.
    by_heads = expected is not None and options.reduction == "max"
    group_pad = triton.next_power_of_2(group) if by_heads else group
    tile = min(padded(group_pad * queries), TILE[kind])
    if by_heads:
        tile = max(tile, group_pad)
    tiles = triton.cdiv(group_pad * queries, tile)
    splits = split_count(rows * kv_heads * tiles, entries.count, config.block)
    lse = query.new_empty(rows, heads * queries, splits, dtype=torch.float32)
    output = None if values is None else lse.new_empty(*lse.shape, value_dim)
    logits = lse.new_empty(rows, heads * queries, entries.count) if keep_logits else None
    votes = None
    if expected is not None:
        expected = expected.contiguous()
        votes = lse.new_empty(rows, kv_heads, tiles, entries.count)
    store, limits = store_of(entries)
    how = options_of(options, rows, kv_heads)
    attend_kernel[(splits, kv_heads * tiles, rows)](
        query,
        store,
        *limits,
        how,
        starts,
        counts,
        expected,
        output,
        lse,
        logits,
        votes,
        entries.count,
        window_within(window, entries.count + queries),
        *strides(query, 3),
        PAGE=page_of(entries),
        GROUP=group,
        QUERIES=queries,
        HEADS=group_pad if by_heads else 0,
        DIM=dim,
        DIM_PAD=padded(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        TILE=tile,
        TILES=tiles,
        BLOCK=config.block,
        num_warps=config.warps,
        num_stages=config.stages + _SECOND_LIST_STAGES * (lists == 2),
        maxnreg=None if plain else _registers(config, entries.keys.itemsize),
    )
    attended = merge(
        output,
        lse,
        query.shape[:-1],
        dtype=query.dtype if values is None else values.dtype,
        sinks=options.sinks,
        heads=how.heads_ptr,
        into=into,
    )
    if votes is not None:
        return attended, votes[:, :, 0] if tiles == 1 else votes.sum(2)
    return attended, logits


def _registers(config: Config, itemsize: int) -> int:
    """Of a thread, so that two programs fit an SM in 16 bits.

    Left to itself, the assembler spills a few bytes for the sake of a further one. A plain step needs so few that it
    never does.
    """
    return min(255, 65536 // (32 * config.warps * (2 if itemsize == 2 else 1)))


@triton.jit
def start_of(starts_ptr, row, queries, length):
    """The position of a row's first query, int32, which does not lie outside of -queries .. length."""
    return tl.minimum(tl.maximum(tl.load(starts_ptr + row), -queries), length).to(tl.int32)


@triton.jit
def reach(start, queries, length, window):
    """The first position that the first of the queries sees, and the end of what the last one sees."""
    begin = start * 0
    if window is not None:
        begin = tl.maximum(start - window + 1, 0)
    return begin, tl.minimum(start + queries, length)


@triton.jit
def seen_by(last, positions, inside, window):
    """Whether the query at position `last` sees a position; the arguments broadcast."""
    seen = (positions <= last) & inside
    if window is not None:
        seen = seen & (positions > last - window)
    return seen


@triton.jit
def clear_outside(votes_ptr, entries, begin, end, BLOCK: tl.constexpr):
    """No votes in this program's share of what lies before `begin` or from `end` on."""
    first, stop = span(tl.cast(entries, tl.int32), BLOCK)
    nothing = tl.zeros([BLOCK], tl.float32)
    before, after = tl.minimum(stop, begin), tl.maximum(first, end)
    for block in tl.range(first, before, BLOCK):
        index = block + tl.arange(0, BLOCK)
        tl.store(votes_ptr + index, nothing, mask=index < before)
    for block in tl.range(after, stop, BLOCK):
        index = block + tl.arange(0, BLOCK)
        tl.store(votes_ptr + index, nothing, mask=index < stop)


@triton.jit
def guessed(expected_ptr, sinks_ptr, queries, heads, share):
    """Of each query by its guess, as powers of 2: what turns its logits into votes, and the most that it can give.

    `share` is that without a sink, 0 for a query that does not vote. One without a guess gives nothing either.
    """
    votes_here = share > 0
    guess = tl.load(expected_ptr + queries, mask=votes_here, other=float("nan"))
    if sinks_ptr is not None:
        share *= beside_sink(guess, tl.load(sinks_ptr + heads, mask=votes_here, other=0.0))
    finite = tl.abs(guess) < float("inf")  # a NaN is not
    most = tl.where(finite, tl.log2(share), float("-inf"))
    return tl.where(finite, guess * LOG2_E - most, 0.0), most


@triton.constexpr_function
def side_by_side(heads):
    """Queries of a head next to each other in a tile: the 16 rows of a tensor core are all heads of these."""
    return max(1, 16 // heads)


@triton.jit
def guessed_votes(logits, guess, most, HEADS: tl.constexpr):
    """What a tile of queries gives to each key, `[N]`, from logits `[M, N]` and what `guessed` says of them, `[M]`.

    The sum over the queries of the maximum over their `HEADS`; 0: over all. A NaN among the logits gives nothing.
    """
    power = logits * LOG2_E - guess[:, None]
    power = tl.where(power == power, tl.minimum(power, most[:, None]), float("-inf"))
    weights = tl.exp2(power)
    if HEADS:
        side: tl.constexpr = side_by_side(HEADS)
        rest: tl.constexpr = weights.shape[0] // (side * HEADS)
        weights = tl.max(tl.reshape(weights, [rest, HEADS, side, weights.shape[1]]), 1)
        weights = tl.reshape(weights, [rest * side, weights.shape[2]])
    return tl.sum(weights, 0)


@triton.jit(do_not_specialize=LIMITS)
def attend_kernel(
    query_ptr,  # [B, Hq, T, D]
    store,
    width,
    kept,
    pages,
    how,
    starts_ptr,  # [B] int64, or None: every query sees everything
    counts_ptr,  # [B] int64, or None
    expected_ptr,  # [B, Hq, T] float32, or None
    output_ptr,  # [B, Hq * T, S, Dv] float32, or None: the log-sum-exp alone is wanted
    lse_ptr,  # [B, Hq * T, S] float32
    logits_ptr,  # [B, Hq * T, n] float32, or None
    votes_ptr,  # [B, Hkv, tiles, n] float32, with `expected_ptr`
    entries,
    window,
    query_row,
    query_head,
    query_token,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,  # of a group, padded, where the votes are their maximum; or 0
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
    head, kv_heads = (tl.program_id(1) // TILES).to(tl.int64), tl.num_programs(1) // TILES
    row = tl.program_id(2).to(tl.int64)
    if not asked_for(how.heads_ptr, row, head, kv_heads):
        return
    tile, slot = tl.program_id(1) % TILES, tl.arange(0, TILE)
    if HEADS:  # all heads of a query are in one tile
        side: tl.constexpr = side_by_side(HEADS)
        own_head = slot // side % HEADS
        token = tile * (TILE // HEADS) + slot // (side * HEADS) * side + slot % side
    else:  # head by head, query by query
        member = tile * TILE + slot
        own_head, token = member // QUERIES, member % QUERIES
    own = (own_head < GROUP) & (token < QUERIES)
    own_head += head * GROUP
    queries = (row * kv_heads * GROUP + own_head) * QUERIES + token

    kept = kept_row(store.rows_ptr, row, kept)
    end = tl.where(kept >= 0, own_length(how, row, head, entries), 0)
    begin = end * 0
    last = token * 0
    voting = tl.full([], QUERIES, tl.int32)
    if starts_ptr is not None:
        start = start_of(starts_ptr, row, QUERIES, entries)
        begin, reached = reach(start, QUERIES, entries, window)
        last = start + token
        end = tl.minimum(end, reached)
        if counts_ptr is not None:
            voting = tl.minimum(tl.maximum(tl.load(counts_ptr + row), 0), QUERIES).to(tl.int32)
            end = tl.where(voting > 0, end, begin)
    if expected_ptr is not None:
        votes_ptr += (row * tl.num_programs(1) + tl.program_id(1)) * entries
        clear_outside(votes_ptr, entries, begin, end, BLOCK)
    first, stop = span(tl.maximum(end - begin, 0), BLOCK)
    if first >= stop:
        tl.store(lse_ptr + queries * splits + split, float("-inf"), mask=own)
        return

    dims, value_dims = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    query_ptr += row * query_row + own_head[:, None] * query_head + token[:, None] * query_token
    query = tl.load(query_ptr + dims[None, :], mask=own[:, None] & (dims < DIM)[None, :], other=0.0)
    acc = tl.zeros([TILE, VALUE_PAD], tl.float32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    if expected_ptr is not None:
        share = 1.0 / (voting if HEADS else voting * GROUP)
        share = tl.where(own & (token < voting), share, 0.0)
        guess, most = guessed(expected_ptr, how.sinks_ptr, queries, own_head, share)
    for block in tl.range(begin + first, begin + stop, BLOCK):
        index = block + tl.arange(0, BLOCK)
        inside = index < begin + stop
        seen = shown(how, row, head, index, inside)
        key_at, value_at, seen = look_up(store, width, pages, row, kept, head, index, seen, PAGE)
        # What is not seen is not read: it may hold anything.
        keys = tl.load(
            store.keys_ptr + key_at[:, None] + dims[None, :],
            mask=seen[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        products = tl.dot(query, tl.trans(keys), input_precision="ieee")
        logits = finished_logits(products, how.scale, how.softcap)
        counted = seen[None, :]
        if starts_ptr is not None:
            counted = seen_by(last[:, None], index[None, :], counted, window)
        logits = tl.where(counted, logits, float("-inf"))
        if logits_ptr is not None:
            tl.store(
                logits_ptr + queries[:, None] * entries + index[None, :],
                logits,
                mask=own[:, None] & inside[None, :],
            )
        if expected_ptr is not None:
            votes = guessed_votes(logits, guess, most, HEADS)
            tl.store(votes_ptr + index, votes, mask=inside)
        values = None
        if store.values_ptr is not None:
            values = tl.load(
                store.values_ptr + value_at[:, None] + value_dims[None, :],
                mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
        acc, top, mass = absorb(logits, values, acc, top, mass)

    lse = tl.where(mass == 0, float("-inf"), top + tl.log(mass))  # NaN stays
    tl.store(lse_ptr + queries * splits + split, lse, mask=own)
    if store.values_ptr is not None:
        acc /= tl.where(mass == 0, 1.0, mass)[:, None]
        tl.store(
            output_ptr + (queries * splits + split)[:, None] * VALUE_DIM + value_dims[None, :],
            acc,
            mask=own[:, None] & (value_dims < VALUE_DIM)[None, :],
        )
