"""One pass over keys and values for one query token: each split of a head on its own, for all query heads of a group.

The entries are a view of a cache, or those that a list of positions names in a full or a paged cache. The logits are
kept where scores or ranks follow, so that no key is read twice. The G queries of a group are the rows of one matrix
product, padded to the 16 that tensor cores take: at 1 to 8 queries the pass waits for memory either way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.triton.common import (
    Config,
    absorb,
    contiguous_rows,
    finished_logits,
    for_every_head,
    own_length,
    padded,
    span,
    split_count,
    strides,
)

# By the larger padded head dim and the bytes of an element. In 16 bits none spills and two programs fit an SM.
IN_PLACE = {
    (64, 2): Config(block=128, warps=4, stages=3),
    (128, 2): Config(block=64, warps=4, stages=3),
    (256, 2): Config(block=32, warps=8, stages=3),
    (64, 4): Config(block=64, warps=8, stages=2),
    (128, 4): Config(block=32, warps=8, stages=2),
    (256, 4): Config(block=32, warps=8, stages=2),
}
# Entries by a list. The list is read ahead of the keys, which takes stages: with these, as many keys are under way.
LISTED = {
    (64, 2): Config(block=64, warps=4, stages=5),
    (128, 2): Config(block=64, warps=4, stages=5),
    (256, 2): Config(block=32, warps=4, stages=5),
    (64, 4): Config(block=64, warps=8, stages=3),
    (128, 4): Config(block=16, warps=8, stages=3),
    (256, 4): Config(block=16, warps=8, stages=3),
}
_BLOCK_TABLE_STAGES = 2  # more, for the second list of a paged cache


class Parts(NamedTuple):
    """What the splits leave, float32: output `[B, Hq, S, Dv]` and lse `[B, Hq, S]`; logits `[B, Hq, L]` if kept."""

    output: Tensor | None
    lse: Tensor
    logits: Tensor | None


# A store that grows would be compiled for lengths that 16 divides, and for others.
@triton.jit(do_not_specialize=["stored", "pages"])
def split_kernel(
    query_ptr,  # [B, Hq, D]
    keys_ptr,  # [B, Hkv, L, D], or with blocks [N, Hkv, PAGE, D]
    values_ptr,  # the same with VALUE_DIM, or None
    visible_ptr,  # [B, Hkv, L] bool, or None
    lengths_ptr,  # [B, Hkv] int64, or None
    heads_ptr,  # [B, Hkv] bool, or None
    positions_ptr,  # [B, Hkv, L] int64, or None
    blocks_ptr,  # [B, M] int32, or None
    output_ptr,  # [B, Hq, S, VALUE_DIM]
    lse_ptr,  # [B, Hq, S]
    logits_ptr,  # [B, Hq, L], or None
    scale,
    softcap,
    entries,
    stored,  # places that a position may name
    pages,
    key_row,
    key_head,
    key_entry,
    value_row,
    value_head,
    value_entry,
    visible_row,
    visible_head,
    length_row,
    length_head,
    position_row,
    position_head,
    blocks_row,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S, Hkv, B)."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    head, kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    if heads_ptr is not None:
        if not tl.load(heads_ptr + row * kv_heads + head):
            return
    length = own_length(lengths_ptr, row * length_row + head * length_head, entries)
    first, last = span(length, BLOCK)

    members = tl.arange(0, GROUP_PAD)
    own = members < GROUP
    queries = (row * kv_heads + head) * GROUP + members
    if first >= last:
        tl.store(lse_ptr + queries * splits + split, float("-inf"), mask=own)
        return
    dims, value_dims = tl.arange(0, DIM_PAD), tl.arange(0, VALUE_PAD)
    query = tl.load(
        query_ptr + queries[:, None] * DIM + dims[None, :],
        mask=own[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    keys_ptr += head * key_head
    if values_ptr is not None:
        values_ptr += head * value_head
    if blocks_ptr is None:
        keys_ptr += row * key_row
        if values_ptr is not None:
            values_ptr += row * value_row

    acc = tl.zeros([GROUP_PAD, VALUE_PAD], tl.float32)
    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP_PAD], tl.float32)
    for start in tl.range(first, last, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < last
        seen = inside
        if visible_ptr is not None:
            visible = visible_ptr + row * visible_row + head * visible_head
            seen = seen & tl.load(visible + places, mask=inside, other=False)
        key_at, value_at = places * key_entry, places * value_entry
        if positions_ptr is not None:
            listed = positions_ptr + row * position_row + head * position_head
            at = tl.load(listed + places, mask=inside, other=-1)
            seen = seen & (at >= 0) & (at < stored)
            if blocks_ptr is None:
                key_at, value_at = at * key_entry, at * value_entry
            else:
                page = tl.load(blocks_ptr + row * blocks_row + at // PAGE, mask=seen, other=0)
                page = page.to(tl.int64)
                seen = seen & (page >= 0) & (page < pages)
                key_at = page * key_row + at % PAGE * key_entry
                value_at = page * value_row + at % PAGE * value_entry
        # What is not seen is not read: it may hold anything.
        keys = tl.load(
            keys_ptr + key_at[:, None] + dims[None, :],
            mask=seen[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        products = tl.dot(query, tl.trans(keys), input_precision="ieee")
        logits = finished_logits(products, scale, softcap)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        if logits_ptr is not None:
            tl.store(
                logits_ptr + queries[:, None] * entries + places[None, :],
                logits,
                mask=own[:, None] & inside[None, :],
            )
        if values_ptr is not None:
            values = tl.load(
                values_ptr + value_at[:, None] + value_dims[None, :],
                mask=seen[:, None] & (value_dims < VALUE_DIM)[None, :],
                other=0.0,
            )
            acc, top, mass = absorb(logits, values, acc, top, mass)
        else:
            acc, top, mass = absorb(logits, None, acc, top, mass)

    lse = tl.where(mass == 0, float("-inf"), top + tl.log(mass))  # NaN stays
    tl.store(lse_ptr + queries * splits + split, lse, mask=own)
    if values_ptr is not None:
        acc /= tl.where(mass == 0, 1.0, mass)[:, None]
        tl.store(
            output_ptr + (queries * splits + split)[:, None] * VALUE_DIM + value_dims[None, :],
            acc,
            mask=own[:, None] & (value_dims < VALUE_DIM)[None, :],
        )


def attend_in_splits(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    scale: float,
    softcap: float | None,
    visible: Tensor | None,
    lengths: Tensor | None,
    heads: Tensor | None,
    *,
    positions: Tensor | None = None,
    blocks: Tensor | None = None,
    keep_logits: bool = False,
) -> Parts:
    """The splits of `reference.attend`, or with `positions` of `attend_at`; without values, only their lse."""
    rows, count, dim = query.shape
    kv_heads = keys.shape[1]
    entries = keys.shape[2] if positions is None else positions.shape[2]
    keys = contiguous_rows(keys)
    values = None if values is None else contiguous_rows(values)
    value_dim = 1 if values is None else values.shape[-1]
    visible = for_every_head(visible, rows, kv_heads)
    visible = None if visible is None else contiguous_rows(visible)
    positions = None if positions is None else contiguous_rows(positions)
    lengths = for_every_head(lengths, rows, kv_heads)
    table = IN_PLACE if positions is None else LISTED
    config = table[padded(max(dim, value_dim), 64), keys.element_size()]
    splits = split_count(rows * kv_heads, entries, config.block)
    scratch = torch.empty(rows, count, splits, dtype=torch.float32, device=query.device)
    parts = Parts(
        output=None if values is None else scratch.new_empty(rows, count, splits, value_dim),
        lse=scratch,
        logits=scratch.new_empty(rows, count, entries) if keep_logits else None,
    )
    split_kernel[(splits, kv_heads, rows)](
        query.contiguous(),
        keys,
        values,
        visible,
        lengths,
        None if heads is None else heads.contiguous(),
        positions,
        None if blocks is None else contiguous_rows(blocks),
        parts.output,
        parts.lse,
        parts.logits,
        scale,
        softcap,
        entries,
        keys.shape[2] * (1 if blocks is None else blocks.shape[1]),
        keys.shape[0],
        *strides(keys, 3),
        *strides(values, 3),
        *strides(visible, 2),
        *strides(lengths, 2),
        *strides(positions, 2),
        *strides(blocks, 1),
        PAGE=0 if blocks is None else keys.shape[2],
        GROUP=count // kv_heads,
        GROUP_PAD=padded(count // kv_heads),
        DIM=dim,
        DIM_PAD=padded(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        BLOCK=config.block,
        num_warps=config.warps,
        num_stages=config.stages + (0 if blocks is None else _BLOCK_TABLE_STAGES),
    )
    return parts
