"""What a decode step keeps: what `rings.cpp` is called with. Signatures as in `reference`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import options
from refreshkv.kernels.native.build import address, compiled, ready, whole
from refreshkv.kernels.native.entries import Entries, numbers, pointers, strides

_STRIDES = tuple(f"{of}_{step}" for of in ("key", "value") for step in ("row", "head", "token"))


class Ring(ctypes.Structure):
    """`struct Ring` of `rings.cpp`, field by field; `made_of` keeps alive what it points at."""

    _fields_ = (
        *pointers("keys", "values", "positions", "state", "budget"),
        *numbers("kept", "kv_heads", "slots", "key_bytes", "value_bytes", *_STRIDES),
    )

    def __init__(
        self,
        keys: Tensor | None,
        values: Tensor | None,
        positions: Tensor,
        state: Tensor,
        budget: Tensor,
    ) -> None:
        self.made_of = keys, values, positions, state, whole(budget)
        bytes_of = (0 if x is None else x.shape[-1] * x.element_size() for x in (keys, values))
        at = *map(address, self.made_of), *positions.shape, *bytes_of
        super().__init__(*at, *strides(keys), *strides(values))


class Tally(ctypes.Structure):
    """`struct Tally` of `rings.cpp`, field by field."""

    _fields_ = (*pointers("counts", "rows"), *numbers("row", "head", "count"))

    def __init__(self, tally: Tensor | None, counted: Tensor | None = None) -> None:
        self.made_of = tally, whole(counted)
        super().__init__(
            *map(address, self.made_of), *((0,) * 3 if tally is None else tally.stride())
        )


class Write(ctypes.Structure):
    """`struct Write` of `rings.cpp`, field by field."""

    _fields_ = (
        ("entries", Entries),
        ("tally", Tally),
        *pointers("keys", "values", "starts", "hidden"),
        *numbers("rows", "count", "full", "key_bytes", "value_bytes", *_STRIDES),
    )


class Push(ctypes.Structure):
    """`struct Push` of `rings.cpp`, field by field."""

    _fields_ = (
        ("entries", Entries),
        ("ring", Ring),
        ("tally", Tally),
        *pointers("at", "full"),
        *numbers("rows", "back"),
    )


class Fetch(ctypes.Structure):
    """`struct Fetch` of `rings.cpp`, field by field."""

    _fields_ = (
        ("entries", Entries),
        ("ring", Ring),
        ("tally", Tally),
        *pointers("best", "ends", "full"),
        *numbers("rows", "count"),
    )


class Refresh(ctypes.Structure):
    """`struct Refresh` of `rings.cpp`, field by field."""

    _fields_ = (
        ("entries", Entries),
        ("ring", Ring),
        ("tally", Tally),
        *pointers("wanted", "filled", "heads", "reference", "summary", "ends", "hidden"),
        *numbers("rows", "count", "remembered", "threads"),
    )


def write(
    entries: options.Entries,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    starts: Tensor,
    tally: Tensor | None = None,
    hidden: Tensor | None = None,
    full: bool = False,
) -> None:
    """See `reference.write`."""
    where, counts, new = Entries(entries), Tally(tally), (new_keys, new_values)
    starts, hidden = whole(starts), whole(hidden)
    job = Write(
        where,
        counts,
        *map(address, (*new, starts, hidden)),
        *(len(new_keys), new_keys.shape[2], full),
        *(x.shape[-1] * x.element_size() for x in new),
        *(step for x in new for step in strides(x)),
    )
    compiled().refreshkv_write(ctypes.byref(job))


def push(
    entries: options.Entries,
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
    where, counts = Entries(entries), Tally(tally, counted)
    ring = Ring(ring_keys, ring_values, ring_positions, state, budget)
    at, full = whole(at), whole(full)
    job = Push(where, ring, counts, *map(address, (at, full)), len(at), back)
    compiled().refreshkv_push(ctypes.byref(job))


def fetch(
    entries: options.Entries,
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
    where, counts = Entries(entries), Tally(tally, counted)
    ring = Ring(ring_keys, ring_values, ring_positions, state, budget)
    tensors = whole(best), whole(ends), whole(full)
    job = Fetch(where, ring, counts, *map(address, tensors), len(best), best.shape[2])
    compiled().refreshkv_fetch(ctypes.byref(job))


def refresh(
    entries: options.Entries,
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
    where, counts = Entries(entries), Tally(tally, counted)
    ring = Ring(ring_keys, ring_values, ring_positions, state, budget)
    wanted, filled, heads = whole(wanted, torch.int32), whole(filled), whole(heads)
    summary, ends, hidden = whole(summary), whole(ends), whole(hidden)
    tensors = wanted, filled, heads, reference, summary, ends, hidden
    remembered = 0 if reference is None else reference.shape[2]
    sizes = *wanted.shape[::2], remembered, torch.get_num_threads()
    job = Refresh(where, ring, counts, *map(address, tensors), *sizes)
    compiled().refreshkv_refresh(ctypes.byref(job))


def serves(*given: Any, **named: Any) -> bool:
    """Whether these functions take such arguments: bytes move, between tensors of one kind that lie in one piece."""
    every = dict(zip(("entries", "new_keys", "new_values"), given, strict=False)) | named
    entries = every["entries"]
    pairs = [
        (stored, every[name])
        for of, stored in (("keys", entries.keys), ("values", entries.values))
        for name in (f"new_{of}", f"ring_{of}")
        if stored is not None and isinstance(every.get(name), Tensor) and every[name].dim() == 4
    ]
    written = [every.get(name) for name in ("ring_positions", "state", "reference")]
    return (
        ready()
        and all(
            one.stride(-1) == other.stride(-1) == 1
            and (one.dtype, one.shape[1::2]) == (other.dtype, other.shape[1::2])
            for one, other in pairs
        )
        and all(x is None or x.is_contiguous() for x in written)
    )
