"""Attention over a rounded copy of all entries and the exact ones of those that have weight; and that copy (ours).

As everywhere here, no number makes a kernel read or write elsewhere. A NaN or an infinity among the keys of a block
makes the logits of all its tokens NaN, one among the values its own dim of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refreshkv.kernels.codes import (
    Codes,
    pack_keys,
    pack_values,
    restored_keys,
    restored_values,
)
from refreshkv.kernels.options import Attended, AttendOptions, Entries
from refreshkv.kernels.reference.attention import (
    attend,
    entries_at,
    kept_rows,
    log_sum_exp,
    logits_of,
    seen_entries,
    seen_values,
    without_list,
)
from refreshkv.policy.rounding import (
    BLOCK,
    largest_weights,
    round_block,
    worth_reading,
)


def encode(
    entries: Entries,
    codes: Codes,
    *,
    first: Tensor,
    begin: Tensor,
    end: Tensor,
    most: int,
    visible: Tensor | None = None,
) -> None:
    """Write the codes of blocks; block j of row b holds the positions from `first[b] + 64 j` on.

    Args:
        entries: all positions, without a list.
        codes: what is written; blocks for which it has no room are left out.
        first: `[B]` int64.
        begin, end: `[B]` int64, the blocks of each row, `end` not among them.
        most: no row has more of them.
        visible: `[B, L]` bool; what it hides has no say in a grid. `None`: everything is visible.
    """
    if most < 1 or not codes.keys.numel():
        return
    device = entries.keys.device
    block = begin[:, None] + torch.arange(most, device=device)  # [B, most]
    inside = torch.arange(BLOCK, device=device)
    positions = first[:, None, None] + block[..., None] * BLOCK + inside
    everywhere = positions.flatten(1)[:, None].expand(-1, entries.kv_heads, -1)
    keys, values, stored = (
        None if part is None else part.unflatten(2, (most, BLOCK))
        for part in entries_at(entries, everywhere)
    )
    assert keys is not None and values is not None and stored is not None
    if visible is not None:
        there = positions.clamp(0, visible.shape[1] - 1).flatten(1)
        stored = stored & visible.gather(1, there).unflatten(1, (most, BLOCK))[:, None]
    page, slot, wanted = _places(entries, codes, block)
    wanted = wanted & (block >= 0) & (block < end[:, None])
    if most == 1 and codes.blocks is None and entries.rows is None:
        # Every row has a place of its own, so a CUDA graph need not ask which of them write.
        row, column = torch.arange(len(block), device=device), torch.zeros_like(block[:, 0])
    else:
        row, column = wanted.nonzero(as_tuple=True)
    written = wanted[row, column, None, None]
    at = page[row, column], slice(None), slot[row, column]
    seen = stored[row, :, column]
    parts = (
        (keys, codes.bits, pack_keys, codes.keys, codes.key_grids),
        (values, codes.value_bits, pack_values, codes.values, codes.value_grids),
    )
    for numbers, bits, pack, planes, grids in parts:
        rounded = round_block(numbers[row, :, column], bits, seen)
        planes[at] = pack(rounded.codes, bits).where(written, planes[at])
        grids[at] = rounded.grid.where(written, grids[at])


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
    """Attention of one query token `[B, Hq, D]`: few entries exactly, others by their codes, one softmax over both.

    Entries that no finished block covers are exact, and so are those of `policy.rounding.worth_reading`, by the weights
    that the rounded keys give (and the exact ones of entries that are not covered). Blocks of whose values, beside
    those, hardly anything would come are left out: they cost no more than their keys.

    Args:
        entries: all positions, without a list.
        codes: of the finished blocks.
        first, finished: `[B]` int64; the codes of row b cover `64 * finished[b]` positions from `first[b]` on, at most
            those that there is room for.
        budget: `[B]` int64, the most entries of a KV head that are read exactly although they are covered.
        skip: the most weight of a query head, as the rounded keys give it, that blocks left out may have together; each
            has less than this share by the number of finished blocks, in every query head of the group.
        tally: `[B, Hkv, 2]` int64, to which is added what was read: how many entries exactly, and how many bytes of
            codes. See `add_to_tally`.

    Returns:
        See `attend`, without the blocks left out.
    """
    keys, values, visible = seen_entries(without_list(entries), options, len(query))
    assert values is not None
    positions = torch.arange(entries.width, device=keys.device) - first[:, None]
    everywhere = positions[:, None].expand(-1, entries.kv_heads, -1)
    copy = Entries(
        restored_keys(codes),
        restored_values(codes),
        codes.blocks,
        rows=entries.rows,
    )
    rounded_keys, rounded_values, there = entries_at(copy, everywhere)
    assert rounded_values is not None
    block = everywhere // BLOCK
    covered = there & (block < finished[:, None, None])
    if visible is not None:
        covered = covered & visible

    rough = torch.where(covered[..., None], rounded_keys, keys.float())
    logits = logits_of(query, rough, options, visible)
    total = log_sum_exp(logits)
    if options.sinks is not None:
        total = torch.logaddexp(total, options.sinks.float())
    weights = largest_weights(logits, total, entries.kv_heads).masked_fill(~covered, float("-inf"))
    chosen = worth_reading(weights, budget)

    rounded = covered & ~chosen
    masses = _masses(logits, total, rounded, block, codes.row_blocks)
    blocks = finished.clamp(min=1)[:, None, None]
    read = ~(masses < skip / blocks) & (masses != 0)
    there = block.clamp(0, max(read.shape[2] - 1, 0))
    left_out = rounded & ~read.gather(2, there) if read.shape[2] else rounded
    visible = ~left_out if visible is None else visible & ~left_out

    rounded, exact_values = rounded[..., None], seen_values(values, visible)
    mixed = Entries(
        torch.where(rounded, rounded_keys, keys.float()),
        torch.where(rounded, rounded_values, exact_values),
    )
    output, lse = attend(query, mixed, options.over(visible))
    counts = torch.stack([chosen.sum(-1), read.sum(-1)], -1)
    add_to_tally(tally, counts, entries, codes, options, first, finished)
    return Attended(output.to(values.dtype), lse)


def add_to_tally(
    tally: Tensor,
    counts: Tensor,
    entries: Entries,
    codes: Codes,
    options: AttendOptions,
    first: Tensor,
    finished: Tensor,
) -> None:
    """Add to `tally` what a mixed step has read of each KV head; nothing for the heads that nobody asked for.

    That is, of entries, those that were chosen and all behind the finished blocks, whether or not a mask hides them;
    of codes, the keys of all finished blocks and the values of some. `counts` `[B, Hkv, 2]` int64: how many entries
    were chosen, and of how many blocks the values were read.
    """
    finished = finished.clamp(0, codes.row_blocks)[:, None]
    begin = first.clamp(-BLOCK * codes.row_blocks, entries.count)[:, None]
    lengths = entries.count if options.lengths is None else options.lengths.clamp(0, entries.count)
    behind = (lengths - (begin + BLOCK * finished).clamp(min=0)).clamp(min=0)
    keys, values = codes.block_bytes
    read = torch.stack([counts[..., 0] + behind, counts[..., 1] * values + finished * keys], -1)
    tally += read if options.heads is None else read * options.heads[..., None]


def _masses(logits: Tensor, total: Tensor, rounded: Tensor, block: Tensor, blocks: int) -> Tensor:
    """`[B, Hkv, blocks]`: the largest weight in a GQA group of what is rounded in each block.

    `logits` `[B, Hq, n]`, `total` `[B, Hq]` their log-sum-exp; `rounded`, and the `block` that each entry lies in,
    `[B, Hkv, n]`.
    """
    heads = rounded.shape[1]
    weights = (logits - total.masked_fill(total == float("-inf"), 0.0)[..., None]).exp()
    weights = weights.unflatten(1, (heads, -1)) * rounded[:, :, None]
    masses = weights.new_zeros(*weights.shape[:3], blocks + 1)
    into = block.where(rounded, blocks)
    masses.scatter_add_(-1, into[:, :, None].expand_as(weights), weights)
    return masses[..., :blocks].amax(2)


def _places(entries: Entries, codes: Codes, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the blocks `[B, m]` of each row lie, row or page and index in it, 0 where they do not; and whether."""
    rows, each = len(block), codes.keys.shape[2]
    if codes.blocks is None:
        row, there = kept_rows(entries, rows, codes.keys.shape[0])
        return row[:, None].expand_as(block), *_inside(block, each, there[:, None])
    page = torch.div(block, each, rounding_mode="floor")
    index, there = _inside(page, codes.blocks.shape[1], torch.ones_like(block, dtype=torch.bool))
    page = codes.blocks.long().gather(1, index)
    page, there = _inside(page, codes.keys.shape[0], there)
    return page, block % each, there


def _inside(index: Tensor, count: int, there: Tensor) -> tuple[Tensor, Tensor]:
    """An index among `count`, 0 where it is none; and whether it is one, and `there`."""
    there = there & (index >= 0) & (index < count)
    return index.where(there, 0), there
