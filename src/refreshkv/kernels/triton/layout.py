"""What a kernel is told of `Entries` and `AttendOptions`, and the one way from an entry to its key and value.

Triton takes a named tuple apart at a launch: a field that is `None` is one at compile time. Last dimensions are
contiguous, which every store has anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import AttendOptions, Entries


class Store(NamedTuple):
    """Where entries lie. The tensors are those of `Entries`, and `<tensor>_<axis>` are strides in elements."""

    keys_ptr: Tensor
    values_ptr: Tensor | None
    blocks_ptr: Tensor | None
    positions_ptr: Tensor | None
    rows_ptr: Tensor | None
    key_row: int  # of a page, with blocks
    key_head: int
    key_entry: int
    value_row: int
    value_head: int
    value_entry: int
    block_row: int
    position_row: int
    position_head: int


class Limits(NamedTuple):
    """What an index has to stay below: positions of a row, rows of what is kept, pages.

    Single arguments of a kernel, and `LIMITS`: for a store that grows, it would be compiled for lengths that 16
    divides, and for others.
    """

    width: int
    kept: int
    pages: int


LIMITS = list(Limits._fields)


class Options(NamedTuple):
    """How a step attends. As in `AttendOptions`, with strides, and one mask and length for every row and head."""

    scale: float
    softcap: float | None
    sinks_ptr: Tensor | None
    visible_ptr: Tensor | None
    lengths_ptr: Tensor | None
    heads_ptr: Tensor | None
    visible_row: int
    visible_head: int
    length_row: int
    length_head: int


def serves(query: Tensor, entries: Entries, options: AttendOptions, **_: object) -> bool:
    """Wider heads would not fit into a program."""
    return max(x.shape[-1] for x in (entries.keys, entries.values) if x is not None) <= 256


def store_of(entries: Entries) -> tuple[Store, Limits]:
    """Arguments of a kernel that looks entries up. The constant `PAGE` is `page_of` the same."""
    keys, listed = contiguous_rows(entries.keys), entries.positions
    values = None if entries.values is None else contiguous_rows(entries.values)
    blocks = None if entries.blocks is None else contiguous_rows(entries.blocks)
    positions = None if listed is None else contiguous_rows(listed)
    by_row = [x for x in (positions, keys if blocks is None else None) if x is not None]
    store = Store(
        keys,
        values,
        blocks,
        positions,
        entries.rows.contiguous() if by_row and entries.rows is not None else None,
        *strides(keys, 3),
        *strides(values, 3),
        *strides(blocks, 1),
        *strides(positions, 2),
    )
    kept = min((x.shape[0] for x in by_row), default=2**31 - 1)
    return store, Limits(entries.width, kept, keys.shape[0])


def page_of(entries: Entries) -> int:
    """P, or 1: nothing divides by 0."""
    return 1 if entries.blocks is None else max(1, entries.keys.shape[2])


def options_of(options: AttendOptions, rows: int, kv_heads: int) -> Options:
    """Arguments of a kernel that attends, for `rows` rows."""
    visible, lengths, heads = options.visible, options.lengths, options.heads
    if visible is not None:
        visible = contiguous_rows(visible.expand(rows, kv_heads, -1))
    if lengths is not None:
        lengths = lengths.expand(rows, kv_heads)
    return Options(
        options.scale,
        options.softcap,
        options.sinks,
        visible,
        lengths,
        None if heads is None else heads.contiguous(),
        *strides(visible, 2),
        *strides(lengths, 2),
    )


def contiguous_rows(tensor: Tensor) -> Tensor:
    """`tensor` with its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first `count` strides in elements; zeros for no tensor."""
    return (0,) * count if tensor is None else tensor.stride()[:count]


@triton.jit
def kept_row(rows_ptr, row, kept):
    """Where what is kept for a row of the step lies among `kept` rows, int64; -1 where it does not."""
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row).to(tl.int64)
    return tl.where((row >= 0) & (row < kept), row, -1)


@triton.jit
def look_up(store, width, pages, row, kept, head, index, inside, PAGE: tl.constexpr):
    """Offsets of the keys and of the values of some entries of a row, int64, and which of these exist.

    Args:
        row: of the step, which has a line of the block table; kept: its `kept_row`, at least 0 where anything is
            `inside`; head: int64.
        index: of the entries, or their positions where the store has no list; of any size.
        inside: which of them are meant. Nothing is read of the others.
    """
    if store.positions_ptr is not None:
        listed = store.positions_ptr + kept * store.position_row + head * store.position_head
        position = tl.load(listed + index, mask=inside, other=-1)
    else:
        position = tl.where(inside, index, -1)
    exists = (position >= 0) & (position < width)
    if store.blocks_ptr is None:
        page, entry = kept, position.to(tl.int64)
    else:
        block = store.blocks_ptr + row * store.block_row + position // PAGE
        page, entry = tl.load(block, mask=exists, other=-1).to(tl.int64), position % PAGE
        exists = (page >= 0) & (page < pages)
    key = page * store.key_row + head * store.key_head + entry * store.key_entry
    value = page * store.value_row + head * store.value_head + entry * store.value_entry
    return key, value, exists


@triton.jit
def asked_for(heads_ptr, row, head, kv_heads):
    """Whether the caller uses the result of a KV head."""
    asked = True
    if heads_ptr is not None:
        asked = tl.load(heads_ptr + row * kv_heads + head)
    return asked


@triton.jit
def own_length(how, row, head, entries):
    """How many of the entries count for this head, int32."""
    length = tl.cast(entries, tl.int32)
    if how.lengths_ptr is not None:
        own = tl.load(how.lengths_ptr + row * how.length_row + head * how.length_head)
        length = tl.minimum(length, tl.maximum(own.to(tl.int64), 0)).to(tl.int32)
    return length


@triton.jit
def shown(how, row, head, index, inside):
    """Which of the entries `inside` the mask lets through."""
    if how.visible_ptr is not None:
        visible = how.visible_ptr + row * how.visible_row + head * how.visible_head
        inside = inside & tl.load(visible + index, mask=inside, other=False)
    return inside
