"""What the kernels of rings share: where a ring lies, its counters, and what a step counts."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.reference import rings as reference
from refreshkv.kernels.triton.layout import strides

FILLED, PUSHED, STEPS, NEWEST, USED, FETCHED = map(tl.constexpr, range(len(reference.STATE)))
FULL_STEP = tl.constexpr(reference.FULL)
STEP = tl.constexpr(reference.STEPS)
READ = tl.constexpr(reference.READ)
AVAILABLE = tl.constexpr(reference.AVAILABLE)


class Ring(NamedTuple):
    """The rings of all rows that are kept, as in `reference.rings`, with strides in elements."""

    keys_ptr: Tensor | None
    values_ptr: Tensor | None
    positions_ptr: Tensor
    state_ptr: Tensor
    budget_ptr: Tensor
    key_row: int
    key_head: int
    key_entry: int
    value_row: int
    value_head: int
    value_entry: int
    position_row: int
    position_head: int
    kept: int  # R
    slots: int  # C


class Tally(NamedTuple):
    """`[B, Hkv, 5]` int64 of any strides, or None; and which rows count, `[B]` bool, or None."""

    counts_ptr: Tensor | None
    rows_ptr: Tensor | None
    row: int
    head: int
    count: int


def ring_of(
    keys: Tensor | None, values: Tensor | None, positions: Tensor, state: Tensor, budget: Tensor
) -> Ring:
    """Arguments of a kernel that reads or writes rings."""
    assert state.is_contiguous() and positions.stride(-1) == 1
    return Ring(
        keys,
        values,
        positions,
        state,
        budget.contiguous(),
        *strides(keys, 3),
        *strides(values, 3),
        *strides(positions, 2),
        len(positions),
        positions.shape[2],
    )


def tally_of(tally: Tensor | None, counted: Tensor | None = None) -> Tally:
    """Arguments of a kernel that counts."""
    rows = None if tally is None or counted is None else counted.contiguous()
    return Tally(tally, rows, *strides(tally, 3))


@triton.jit
def add_to(tally, row, head, COUNT: tl.constexpr, amount, tells):
    """`amount` more of a count of a KV head, where `tells`. One program alone may add to it in a launch."""
    if tally.counts_ptr is not None:
        if tally.rows_ptr is not None:
            tells = tells & tl.load(tally.rows_ptr + row)
        at = tally.counts_ptr + row * tally.row + head * tally.head + COUNT * tally.count
        tl.store(at, tl.load(at) + amount, mask=tells)


@triton.jit
def counter(ring, own, kv_heads, head, COUNTER: tl.constexpr):
    """Where a counter of a ring is."""
    return ring.state_ptr + (COUNTER * tl.cast(ring.kept, tl.int64) + own) * kv_heads + head


@triton.jit
def room_of(ring, own):
    """Slots that a ring may use, int64."""
    return tl.minimum(tl.maximum(tl.load(ring.budget_ptr + own), 0), ring.slots)


@triton.jit
def slot_after(entries, room):
    """The slot of the next entry after so many, of any sign."""
    room = tl.maximum(room, 1)
    # The first remainder of a negative number is negative or 0.
    return (entries % room + room) % room


@triton.jit
def copy(source_ptr, source_at, into_ptr, into_at, chosen, DIM: tl.constexpr, PAD: tl.constexpr):
    """The `chosen` of some keys or values, from and to the offsets given."""
    dims = tl.arange(0, PAD)[None, :]
    mask = chosen[:, None] & (dims < DIM)
    content = tl.load(source_ptr + source_at[:, None] + dims, mask=mask, other=0.0)
    tl.store(into_ptr + into_at[:, None] + dims, content, mask=mask)


@triton.jit
def put(
    store,
    ring,
    own,
    head,
    slot,
    key_at,
    value_at,
    chosen,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Copies of the `chosen` of some entries into slots of a ring that has copies."""
    if ring.keys_ptr is not None:
        keys_ptr = ring.keys_ptr + own * ring.key_row + head * ring.key_head
        copy(store.keys_ptr, key_at, keys_ptr, slot * ring.key_entry, chosen, DIM, DIM_PAD)
    if ring.values_ptr is not None:
        values_ptr = ring.values_ptr + own * ring.value_row + head * ring.value_head
        slot_at = slot * ring.value_entry
        copy(store.values_ptr, value_at, values_ptr, slot_at, chosen, VALUE_DIM, VALUE_PAD)
