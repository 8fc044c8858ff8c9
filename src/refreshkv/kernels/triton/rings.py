"""What fills a ring on a GPU: copies of a selection, and single entries after it. One launch each, books included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Entries
from refreshkv.kernels.triton.books import (
    FETCHED,
    FILLED,
    FULL_STEP,
    NEWEST,
    PUSHED,
    READ,
    STEPS,
    USED,
    Ring,
    add_to,
    counter,
    put,
    ring_of,
    room_of,
    slot_after,
    tally_of,
)
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

CONFIG = Config(block=1024, warps=4, stages=2)  # slots that `fetch` looks through at once
_COPY_BYTES = 16384  # of keys or values, of a program in `refresh`


@on_its_device
def push(
    entries: Entries,
    at: Tensor,
    *,
    back: int = 0,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    state: Tensor,
    budget: Tensor,
    full: Tensor | None = None,
    tally: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """See `reference.push`."""
    store, limits = store_of(replace(entries, positions=None))
    ring = ring_of(ring_keys, ring_values, ring_positions, state, budget)
    push_kernel[(state.shape[2], len(at))](
        store,
        *limits,
        entries.rows,
        ring,
        at.contiguous(),
        None if full is None else full.contiguous(),
        tally_of(tally, counted),
        BACK=back,
        PAGE=page_of(entries),
        **_dims(ring),
        num_warps=1,
    )


@on_its_device
def fetch(
    entries: Entries,
    best: Tensor,
    *,
    ends: Tensor,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    state: Tensor,
    budget: Tensor,
    full: Tensor | None = None,
    tally: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """See `reference.fetch`."""
    rows, kv_heads, count = best.shape
    store, limits = store_of(replace(entries, positions=None))
    ring = ring_of(ring_keys, ring_values, ring_positions, state, budget)
    best = contiguous_rows(best)
    fetch_kernel[(kv_heads, rows)](
        store,
        *limits,
        entries.rows,
        ring,
        best,
        ends.contiguous(),
        None if full is None else full.contiguous(),
        tally_of(tally, counted),
        *strides(best, 2),
        PAGE=page_of(entries),
        COUNT=count,
        COUNT_PAD=padded(count, least=1),
        **_dims(ring),
        BLOCK=CONFIG.block,
        num_warps=CONFIG.warps,
        num_stages=CONFIG.stages,
    )


@on_its_device
def refresh(
    entries: Entries,
    wanted: Tensor,
    filled: Tensor,
    *,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    state: Tensor,
    budget: Tensor,
    heads: Tensor | None = None,
    reference: Tensor | None = None,
    summary: Tensor | None = None,
    ends: Tensor | None = None,
    hidden: Tensor | None = None,
    tally: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """See `reference.refresh`."""
    rows, kv_heads, count = wanted.shape
    store, limits = store_of(replace(entries, positions=None))
    ring = ring_of(ring_keys, ring_values, ring_positions, state, budget)
    dims = _dims(ring)
    line = max(dims["DIM_PAD"], dims["VALUE_PAD"]) * entries.keys.itemsize
    block = max(1, _COPY_BYTES // line)
    wanted = contiguous_rows(wanted)
    summary = None if summary is None else contiguous_rows(summary)
    remembered = 0 if reference is None else reference.shape[2]
    refresh_kernel[(max(1, triton.cdiv(ring.slots, block)), kv_heads, rows)](
        store,
        *limits,
        entries.rows,
        ring,
        wanted,
        filled.contiguous(),
        None if heads is None else heads.contiguous(),
        reference,
        summary,
        ends,
        hidden,
        tally_of(tally, counted),
        count,
        *strides(wanted, 2),
        *strides(reference, 2),
        *strides(summary, 2),
        PAGE=page_of(entries),
        REMEMBERED=remembered,
        REMEMBERED_PAD=padded(remembered, least=1),
        **dims,
        BLOCK=block,
        num_warps=8,
    )


def _dims(ring: Ring) -> dict[str, Any]:
    """Head dims of the copies, and what holds them; 0 where there are none."""
    dim, value_dim = (0 if x is None else x.shape[-1] for x in (ring.keys_ptr, ring.values_ptr))
    return {
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "VALUE_DIM": value_dim,
        "VALUE_PAD": padded(value_dim),
    }


@triton.jit
def read_of_ring(tally, full_ptr, row, head, kv_heads, amount):
    """`amount` entries of a ring were read, unless its head reads everything."""
    tells = amount == amount
    if full_ptr is not None:
        tells = tl.load(full_ptr + row * kv_heads + head) == 0
    add_to(tally, row, head, READ, amount, tells)


@triton.jit(do_not_specialize=LIMITS)
def push_kernel(
    store,
    width,
    kept,
    pages,
    rows_ptr,  # [B] int32, or None
    ring,
    at_ptr,  # [B] int64
    full_ptr,  # [B, Hkv] bool, or None
    tally,
    BACK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Grid (Hkv, B)."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(0)
    own, kept = kept_row(rows_ptr, row, ring.kept), kept_row(store.rows_ptr, row, kept)
    if own < 0:
        return
    room = room_of(ring, own)
    pushed_at = counter(ring, own, kv_heads, head, PUSHED)
    pushed = tl.load(pushed_at)
    filled = tl.load(counter(ring, own, kv_heads, head, FILLED))
    one = tl.arange(0, 1)
    slot = slot_after(filled + pushed, room) + one
    position = tl.load(at_ptr + row) - BACK + one
    inside = (one == 0) & (kept >= 0) & (room > 0)
    kept = tl.maximum(kept, 0)
    key_at, value_at, enters = look_up(store, width, pages, row, kept, head, position, inside, PAGE)
    positions_ptr = ring.positions_ptr + own * ring.position_row + head * ring.position_head
    tl.store(positions_ptr + slot, position.to(tl.int32), mask=enters)
    put(store, ring, own, head, slot, key_at, value_at, enters, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD)

    pushed += tl.sum(enters.to(tl.int64), 0)
    used = tl.minimum(filled + pushed, room)
    steps_at = counter(ring, own, kv_heads, head, STEPS)
    tl.store(pushed_at, pushed)
    tl.store(steps_at, tl.load(steps_at) + 1)
    tl.store(counter(ring, own, kv_heads, head, NEWEST) + one, slot)
    tl.store(counter(ring, own, kv_heads, head, USED), used)
    tl.store(counter(ring, own, kv_heads, head, FETCHED), tl.cast(0, tl.int64))
    read_of_ring(tally, full_ptr, row, head, kv_heads, used)


@triton.jit(do_not_specialize=LIMITS)
def fetch_kernel(
    store,
    width,
    kept,
    pages,
    rows_ptr,  # [B] int32, or None
    ring,
    best_ptr,  # [B, Hkv, COUNT] int64
    ends_ptr,  # [B] int64
    full_ptr,  # [B, Hkv] bool, or None
    tally,
    best_row,
    best_head,
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
    kv_heads = tl.num_programs(0)
    own, kept = kept_row(rows_ptr, row, ring.kept), kept_row(store.rows_ptr, row, kept)
    if own < 0:
        return
    positions_ptr = ring.positions_ptr + own * ring.position_row + head * ring.position_head
    each = tl.arange(0, COUNT_PAD)
    best = tl.load(best_ptr + row * best_row + head * best_head + each, mask=each < COUNT, other=-1)
    before = tl.load(positions_ptr + best, mask=(best >= 0) & (best < ring.slots), other=-1)
    wanted = before.to(tl.int64) + 1
    inside = (before >= 0) & (wanted < tl.load(ends_ptr + row)) & (kept >= 0)
    kept = tl.maximum(kept, 0)
    key_at, value_at, exists = look_up(store, width, pages, row, kept, head, wanted, inside, PAGE)
    held = tl.zeros([COUNT_PAD], tl.int32)
    for start in range(0, ring.slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        position = tl.load(positions_ptr + slot, mask=slot < ring.slots, other=-1)
        held = tl.maximum(held, tl.max((position[:, None] == wanted[None, :]).to(tl.int32), 0))
    pushed_at = counter(ring, own, kv_heads, head, PUSHED)
    pushed = tl.load(pushed_at)
    filled = tl.load(counter(ring, own, kv_heads, head, FILLED))
    tl.debug_barrier()  # every thread has looked before any writes
    room = room_of(ring, own)
    enters = exists & (held == 0) & (room > 0)
    order = tl.cumsum(enters.to(tl.int64), 0) - 1
    total = tl.sum(enters.to(tl.int64), 0)

    slot = slot_after(filled + pushed + order, room)
    # Of more entries than slots the last stay.
    written = enters & (order >= total - room)
    tl.store(positions_ptr + slot, wanted.to(tl.int32), mask=written)
    put(store, ring, own, head, slot, key_at, value_at, written, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD)
    tl.store(pushed_at, pushed + total)
    used = tl.minimum(filled + pushed + total, room)
    tl.store(counter(ring, own, kv_heads, head, USED), used)
    tl.store(counter(ring, own, kv_heads, head, FETCHED), total)
    read_of_ring(tally, full_ptr, row, head, kv_heads, total)


@triton.jit(do_not_specialize=LIMITS)
def refresh_kernel(
    store,
    width,
    kept,
    pages,
    rows_ptr,  # [B] int32, or None
    ring,
    wanted_ptr,  # [B, Hkv, K] int32
    filled_ptr,  # [B, Hkv] int64
    heads_ptr,  # [B, Hkv] bool, or None
    reference_ptr,  # [B, Hkv, X] float32, or None
    summary_ptr,  # the same
    ends_ptr,  # [B] int64, or None
    hidden_ptr,  # [B] int64, or None
    tally,
    count,
    wanted_row,
    wanted_head,
    reference_row,
    reference_head,
    summary_row,
    summary_head,
    PAGE: tl.constexpr,
    REMEMBERED: tl.constexpr,
    REMEMBERED_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of slots, Hkv, B). The program of a ring's first block keeps its books, which no other reads."""
    block, head, row = (
        tl.program_id(0),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    kv_heads = tl.num_programs(1)
    if not asked_for(heads_ptr, row, head, kv_heads):
        return
    own, kept = kept_row(rows_ptr, row, ring.kept), kept_row(store.rows_ptr, row, kept)
    if own < 0:
        return
    slot = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    meant = (slot < count) & (slot < ring.slots)
    wanted_ptr += row * wanted_row + head * wanted_head
    wanted = tl.load(wanted_ptr + slot, mask=meant, other=-1)
    positions_ptr = ring.positions_ptr + own * ring.position_row + head * ring.position_head
    tl.store(positions_ptr + slot, wanted, mask=slot < ring.slots)
    inside = meant & (kept >= 0)
    kept = tl.maximum(kept, 0)
    key_at, value_at, exists = look_up(store, width, pages, row, kept, head, wanted, inside, PAGE)
    put(store, ring, own, head, slot, key_at, value_at, exists, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD)

    if block == 0:
        filled = tl.load(filled_ptr + row * kv_heads + head)
        none = tl.cast(0, tl.int64)
        tl.store(counter(ring, own, kv_heads, head, FILLED), filled)
        tl.store(counter(ring, own, kv_heads, head, PUSHED), none)
        tl.store(counter(ring, own, kv_heads, head, STEPS), none)
        tl.store(counter(ring, own, kv_heads, head, FETCHED), none)
        used = tl.minimum(filled, room_of(ring, own))
        tl.store(counter(ring, own, kv_heads, head, USED), used)
        if reference_ptr is not None:
            dims = tl.arange(0, REMEMBERED_PAD)
            summary_ptr += row * summary_row + head * summary_head
            summary = tl.load(summary_ptr + dims, mask=dims < REMEMBERED, other=0.0)
            reference_ptr += row * reference_row + head * reference_head
            tl.store(reference_ptr + dims, summary, mask=dims < REMEMBERED)
        if tally.counts_ptr is not None:
            read = tl.load(ends_ptr + row) - tl.load(hidden_ptr + row)
            tells = read == read
            add_to(tally, row, head, FULL_STEP, none + 1, tells)
            add_to(tally, row, head, READ, read, tells)
