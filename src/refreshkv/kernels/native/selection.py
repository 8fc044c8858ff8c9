"""Selection: what `selection.cpp` is called with. Signatures as in `reference`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels.native.build import address, compiled, ready, whole
from refreshkv.kernels.native.entries import numbers, pointers
from refreshkv.policy.selection import FREE, Selected, pool_width, slot_count


class Choice(ctypes.Structure):
    """`struct Choice` of `selection.cpp`, field by field."""

    _fields_ = (
        *pointers("scores", "budget", "visible", "heads", "recent", "anchors", "ends"),
        *pointers("positions", "filled"),
        *numbers("rows", "kv_heads", "length", "anchor_count", "slots", "pool_kernel", "threads"),
    )


def select(
    scores: Tensor,
    budget: Tensor,
    *,
    pool_kernel: int = 7,
    visible: Tensor | None = None,
    heads: Tensor | None = None,
    recent: int | Tensor = 0,
    anchors: Tensor | None = None,
    ends: Tensor | None = None,
    slots: int | None = None,
) -> Selected:
    """See `selection.select`."""
    rows, kv_heads, length = scores.shape
    slots = slot_count(budget, slots, length)
    positions = torch.full((rows, kv_heads, slots), FREE, dtype=torch.int32)
    filled = torch.empty(rows, kv_heads, dtype=torch.int64)
    if not isinstance(recent, Tensor):
        recent = torch.full((rows,), max(0, min(recent, length)))
    visible = None if visible is None else visible.expand(rows, -1)
    anchors = whole(anchors, torch.int32)
    # The list keeps what are copies.
    inputs = list(map(whole, (scores.float(), budget, visible, heads, recent, anchors, ends)))
    job = Choice(
        *map(address, (*inputs, positions, filled)),
        *(rows, kv_heads, length, 0 if anchors is None else anchors.shape[-1], slots),
        *(pool_width(pool_kernel, length), torch.get_num_threads()),
    )
    if compiled().refreshkv_select(ctypes.byref(job)):
        raise MemoryError(f"selection among {length} tokens: not enough memory")
    return Selected(positions, filled)


def top_slots(scores: Tensor, newest: Tensor, count: int) -> Tensor:
    """See `reference.top_slots`."""
    *parts, slots = scores.shape
    scores, newest = whole(scores), whole(newest)
    best = newest.new_empty(*parts, max(0, min(count, slots)))
    compiled().refreshkv_top_slots(
        *map(address, (scores, newest, best)), newest.numel(), slots, best.shape[-1]
    )
    return best


def serves(*_: Any, **__: Any) -> bool:
    """Whether these functions may run here: they take any arguments."""
    return ready()
