"""What fills a ring on a GPU: copies of a selection, and single entries after it. One launch each."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Entries
from refreshkv.kernels.triton.common import Config, on_its_device, padded
from refreshkv.kernels.triton.layout import (
    LIMITS,
    asked_for,
    contiguous_rows,
    kept_row,
    look_up,
    page_of,
    store_of,
    strides,
)

CONFIG = Config(block=1024, warps=4, stages=2)
_COPY_BYTES = 16384  # of keys or values, of a program in `gather`


@on_its_device
def gather(
    entries: Entries,
    wanted: Tensor,
    *,
    ring_keys: Tensor,
    ring_values: Tensor,
    heads: Tensor | None = None,
) -> None:
    """See `reference.gather`."""
    rows, kv_heads, slots = wanted.shape
    store, limits = store_of(replace(entries, positions=None))
    assert store.values_ptr is not None
    dim, value_dim = ring_keys.shape[-1], ring_values.shape[-1]
    block = max(1, _COPY_BYTES // (padded(max(dim, value_dim)) * ring_keys.itemsize))
    wanted = contiguous_rows(wanted)
    gather_kernel[(triton.cdiv(slots, block), kv_heads, rows)](
        store,
        *limits,
        entries.rows,
        wanted,
        None if heads is None else heads.contiguous(),
        ring_keys,
        ring_values,
        slots,
        len(ring_keys),
        *strides(wanted, 2),
        *strides(ring_keys, 3),
        *strides(ring_values, 3),
        PAGE=page_of(entries),
        DIM=dim,
        DIM_PAD=padded(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        BLOCK=block,
        num_warps=8,
    )


@on_its_device
def insert(
    entries: Entries,
    wanted: Tensor,
    *,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    filled: Tensor,
    pushed: Tensor,
    budget: Tensor,
) -> Tensor:
    """See `reference.insert`."""
    rows, kv_heads, count = wanted.shape
    store, limits = store_of(replace(entries, positions=None))
    wanted = contiguous_rows(wanted)
    dim, value_dim = (0 if x is None else x.shape[-1] for x in (ring_keys, ring_values))
    entered = filled.new_empty(rows, kv_heads)
    insert_kernel[(kv_heads, rows)](
        store,
        *limits,
        entries.rows,
        wanted,
        ring_keys,
        ring_values,
        ring_positions,
        filled,
        pushed,
        budget.contiguous(),
        entered,
        ring_positions.shape[2],
        len(ring_positions),
        *strides(wanted, 2),
        *strides(ring_keys, 3),
        *strides(ring_values, 3),
        *strides(ring_positions, 2),
        *strides(filled, 2),
        *strides(pushed, 2),
        PAGE=page_of(entries),
        COUNT=count,
        COUNT_PAD=padded(count, least=1),
        DIM=dim,
        DIM_PAD=padded(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        BLOCK=CONFIG.block,
        num_warps=CONFIG.warps,
        num_stages=CONFIG.stages,
    )
    return entered


@triton.jit
def copy(source_ptr, source_at, ring_ptr, ring_at, chosen, DIM: tl.constexpr, PAD: tl.constexpr):
    """The `chosen` of some keys or values into a ring, from and to the offsets given."""
    dims = tl.arange(0, PAD)[None, :]
    mask = chosen[:, None] & (dims < DIM)
    content = tl.load(source_ptr + source_at[:, None] + dims, mask=mask, other=0.0)
    tl.store(ring_ptr + ring_at[:, None] + dims, content, mask=mask)


@triton.jit(do_not_specialize=LIMITS)
def gather_kernel(
    store,
    width,
    kept,
    pages,
    rows_ptr,  # [B] int32, or None
    wanted_ptr,  # [B, Hkv, K]
    heads_ptr,  # [B, Hkv] bool, or None
    ring_keys_ptr,  # [R, Hkv, C, D]
    ring_values_ptr,  # [R, Hkv, C, Dv]
    slots,
    rings,
    wanted_row,
    wanted_head,
    ring_keys_row,
    ring_keys_head,
    ring_keys_entry,
    ring_values_row,
    ring_values_head,
    ring_values_entry,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of slots, Hkv, B)."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if not asked_for(heads_ptr, row, head, tl.num_programs(1)):
        return
    ring, kept = kept_row(rows_ptr, row, rings), kept_row(store.rows_ptr, row, kept)
    if (ring < 0) | (kept < 0):
        return
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted_ptr += row * wanted_row + head * wanted_head
    wanted = tl.load(wanted_ptr + slot, mask=slot < slots, other=-1)
    key_at, value_at, exists = look_up(
        store, width, pages, row, kept, head, wanted, slot < slots, PAGE
    )
    ring_keys_ptr += ring * ring_keys_row + head * ring_keys_head
    copy(store.keys_ptr, key_at, ring_keys_ptr, slot * ring_keys_entry, exists, DIM, DIM_PAD)
    ring_values_ptr += ring * ring_values_row + head * ring_values_head
    slot_at = slot * ring_values_entry
    copy(store.values_ptr, value_at, ring_values_ptr, slot_at, exists, VALUE_DIM, VALUE_PAD)


@triton.jit(do_not_specialize=LIMITS)
def insert_kernel(
    store,
    width,
    kept,
    pages,
    rows_ptr,  # [B] int32, or None
    wanted_ptr,  # [B, Hkv, COUNT]
    ring_keys_ptr,  # [R, Hkv, C, D], or None
    ring_values_ptr,  # [R, Hkv, C, Dv], or None
    ring_positions_ptr,  # [R, Hkv, C] int32
    filled_ptr,  # [R, Hkv] int64
    pushed_ptr,  # [R, Hkv] int64
    budget_ptr,  # [R] int64
    entered_ptr,  # [B, Hkv] int64
    slots,
    rings,
    wanted_row,
    wanted_head,
    ring_keys_row,
    ring_keys_head,
    ring_keys_entry,
    ring_values_row,
    ring_values_head,
    ring_values_entry,
    ring_positions_row,
    ring_positions_head,
    filled_row,
    filled_head,
    pushed_row,
    pushed_head,
    PAGE: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program looks through the positions of a ring and then writes: nothing is decided twice. Grid (Hkv, B)."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    entered_ptr += row * tl.num_programs(0) + head
    ring, kept = kept_row(rows_ptr, row, rings), kept_row(store.rows_ptr, row, kept)
    if (ring < 0) | (kept < 0):
        tl.store(entered_ptr, tl.cast(0, tl.int64))
        return
    each = tl.arange(0, COUNT_PAD)
    wanted_ptr += row * wanted_row + head * wanted_head
    wanted = tl.load(wanted_ptr + each, mask=each < COUNT, other=-1)
    key_at, value_at, exists = look_up(
        store, width, pages, row, kept, head, wanted, each < COUNT, PAGE
    )

    ring_positions_ptr += ring * ring_positions_row + head * ring_positions_head
    held = tl.zeros([COUNT_PAD], tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        position = tl.load(ring_positions_ptr + slot, mask=slot < slots, other=-1)
        held = tl.maximum(held, tl.max((position[:, None] == wanted[None, :]).to(tl.int32), 0))
    tl.debug_barrier()  # every thread has looked before any writes
    budget = tl.minimum(tl.load(budget_ptr + ring), slots)
    enters = exists & (held == 0) & (budget > 0)
    order = tl.cumsum(enters.to(tl.int64), 0) - 1
    total = tl.sum(enters.to(tl.int64), 0)

    pushed_ptr += ring * pushed_row + head * pushed_head
    pushed = tl.load(pushed_ptr)
    filled = tl.load(filled_ptr + ring * filled_row + head * filled_head)
    room = tl.maximum(budget, 1)
    slot = (filled + pushed + order) % room
    slot = (slot + room) % room  # the first remainder of a negative number is negative or 0
    # Of more entries than slots the last stay.
    written = enters & (order >= total - budget)
    tl.store(ring_positions_ptr + slot, wanted.to(tl.int32), mask=written)
    tl.store(pushed_ptr, pushed + total)
    tl.store(entered_ptr, total)
    if ring_keys_ptr is not None:
        ring_keys_ptr += ring * ring_keys_row + head * ring_keys_head
        copy(store.keys_ptr, key_at, ring_keys_ptr, slot * ring_keys_entry, written, DIM, DIM_PAD)
    if ring_values_ptr is not None:
        ring_values_ptr += ring * ring_values_row + head * ring_values_head
        slot_at = slot * ring_values_entry
        copy(store.values_ptr, value_at, ring_values_ptr, slot_at, written, VALUE_DIM, VALUE_PAD)
