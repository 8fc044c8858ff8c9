"""What keeps rings and counts, as `torch.library` operators; signatures as in `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from refreshkv.kernels.options import Entries
from refreshkv.kernels.schema import ENTRIES, INDICES, entries_of, operator

_RING = (
    "Tensor(a!)? ring_keys, Tensor(b!)? ring_values, Tensor(c!) ring_positions, Tensor(d!) state,"
    " Tensor budget"
)
_RING_WRITES = ("ring_keys", "ring_values", "ring_positions", "state", "tally")

_write = operator(
    "write",
    f"Tensor(a!) keys, Tensor(b!)? values, {INDICES}, Tensor new_keys, Tensor new_values, Tensor starts,"
    " Tensor(c!)? tally, Tensor? hidden, bool full",
    0,
    lambda **_: None,
    writes=("keys", "values", "tally"),
)
_push = operator(
    "push",
    f"{ENTRIES}, Tensor at, int back, {_RING}, Tensor? full, Tensor(e!)? tally, Tensor? counted",
    0,
    lambda **_: None,
    writes=_RING_WRITES,
)
_fetch = operator(
    "fetch",
    f"{ENTRIES}, Tensor best, Tensor ends, {_RING}, Tensor? full, Tensor(e!)? tally, Tensor? counted",
    0,
    lambda **_: None,
    writes=_RING_WRITES,
)
_refresh = operator(
    "refresh",
    f"{ENTRIES}, Tensor wanted, Tensor filled, {_RING}, Tensor? heads, Tensor(f!)? reference, Tensor? summary,"
    " Tensor? ends, Tensor? hidden, Tensor(e!)? tally, Tensor? counted",
    0,
    lambda **_: None,
    writes=(*_RING_WRITES, "reference"),
)
_drift = operator(
    "drift",
    "Tensor query, Tensor reference, Tensor state, int stride, float threshold, bool per_head",
    2,
    lambda query, reference, state, **_: (
        query.new_empty(state.shape[1:], dtype=torch.bool),
        reference.new_empty(*state.shape[1:], query.shape[-1]),
    ),
)


def write(
    entries: Entries,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    starts: Tensor,
    tally: Tensor | None = None,
    hidden: Tensor | None = None,
    full: bool = False,
) -> None:
    """See `reference.write`."""
    _write(*entries_of(entries), new_keys, new_values, starts, tally, hidden, full)


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
    ring = ring_keys, ring_values, ring_positions, state, budget
    _push(*entries_of(entries), at, back, *ring, full, tally, counted)


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
    ring = ring_keys, ring_values, ring_positions, state, budget
    _fetch(*entries_of(entries), best, ends, *ring, full, tally, counted)


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
    ring = ring_keys, ring_values, ring_positions, state, budget
    more = heads, reference, summary, ends, hidden, tally, counted
    _refresh(*entries_of(entries), wanted, filled, *ring, *more)


def drift(
    query: Tensor,
    reference: Tensor,
    state: Tensor,
    *,
    stride: int,
    threshold: float,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.drift`."""
    full, summary = _drift(query, reference, state, stride, threshold, per_head)
    return full, summary
