"""Selection and what follows it: what `selection.cpp` is called with. Signatures as in `reference.py`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels.native.build import address, compiled, whole
from refreshkv.policy.selection import FREE, Selection, pool_width, slot_count

_WRITTEN = ("ring_positions", "pushed")


class Choice(ctypes.Structure):
    """`struct Choice` of `selection.cpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "budget", "visible", "heads", "recent", "anchors", "ends")),
        *((name, ctypes.c_void_p) for name in ("positions", "filled")),
        *((name, ctypes.c_int64) for name in ("rows", "kv_heads", "length", "anchor_count", "slots", "pool_kernel")),
        ("threads", ctypes.c_int64),
    )  # fmt: skip


class Entry(ctypes.Structure):
    """`struct Entry` of `selection.cpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "ring_keys", "ring_values", "wanted")),
        *((name, ctypes.c_void_p) for name in ("ring_positions", "filled", "pushed", "budget", "entered")),
        *((name, ctypes.c_int64) for name in ("rows", "kv_heads", "length", "wanted_count", "slots")),
        *((name, ctypes.c_int64) for name in ("key_bytes", "value_bytes")),
        *((f"{of}_{step}", ctypes.c_int64) for of in ("key", "value", "ring_key", "ring_value")
          for step in ("row", "head", "token")),
    )  # fmt: skip


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
) -> Selection:
    """See `selection.select`."""
    rows, kv_heads, length = scores.shape
    slots = slot_count(budget, slots, length)
    positions = torch.full((rows, kv_heads, slots), FREE)
    filled = torch.empty(rows, kv_heads, dtype=torch.int64)
    if not isinstance(recent, Tensor):
        recent = torch.full((rows,), max(0, min(recent, length)))
    visible = None if visible is None else visible.expand(rows, -1)
    # The list keeps what are copies.
    inputs = list(map(whole, (scores.float(), budget, visible, heads, recent, anchors, ends)))
    job = Choice(
        *map(address, (*inputs, positions, filled)),
        *(rows, kv_heads, length, 0 if anchors is None else anchors.shape[-1], slots),
        *(pool_width(pool_kernel, length), torch.get_num_threads()),
    )
    if compiled().refreshkv_select(ctypes.byref(job)):
        raise MemoryError(f"selection among {length} tokens: not enough memory")
    return Selection(positions, filled)


def gather(source: Tensor, positions: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """See `reference.gather`."""
    rows, kv_heads, slots = positions.shape
    positions, heads = whole(positions), whole(heads)
    size = source.element_size()
    compiled().refreshkv_gather(
        *map(address, (source, positions, out, heads)),
        *(rows, kv_heads, source.shape[2], slots, source.shape[-1] * size),
        *(step * size for x in (source, out) for step in x.stride()[:3]),
        torch.get_num_threads(),
    )


def insert(
    keys: Tensor,
    values: Tensor,
    wanted: Tensor,
    *,
    ring_keys: Tensor,
    ring_values: Tensor,
    ring_positions: Tensor,
    filled: Tensor,
    pushed: Tensor,
    budget: Tensor,
) -> Tensor:
    """See `reference.insert`."""
    rows, kv_heads, count = wanted.shape
    wanted, filled, budget = whole(wanted), whole(filled), whole(budget)
    entered = torch.empty_like(filled)
    size = keys.element_size()
    job = Entry(
        *map(address, (keys, values, ring_keys, ring_values, wanted)),
        *map(address, (ring_positions, filled, pushed, budget, entered)),
        *(rows, kv_heads, keys.shape[2], count, ring_positions.shape[2]),
        *(x.shape[-1] * size for x in (keys, values)),
        *(step * size for x in (keys, values, ring_keys, ring_values) for step in x.stride()[:3]),
    )  # fmt: skip
    compiled().refreshkv_insert(ctypes.byref(job))
    return entered


def top_slots(scores: Tensor, newest: Tensor, count: int) -> Tensor:
    """See `reference.top_slots`."""
    *parts, slots = scores.shape
    scores, newest = whole(scores), whole(newest)
    best = newest.new_empty(*parts, max(0, min(count, slots)))
    compiled().refreshkv_top_slots(
        *map(address, (scores, newest, best)), newest.numel(), slots, best.shape[-1]
    )
    return best


def serves(*given: Any, **named: Any) -> bool:
    """Whether these functions take such arguments here."""
    return False
