"""The mixed mode: what `mixed.cpp` and `rounding.cpp` are called with. Signatures as in `reference`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import codes as layout
from refreshkv.kernels import options as kinds
from refreshkv.kernels.native import entries as native
from refreshkv.kernels.native.attention import KINDS, MOST_QUERIES, WIDEST, Job, job_of
from refreshkv.kernels.native.build import address, compiled, ready, whole
from refreshkv.kernels.native.entries import numbers, pointers
from refreshkv.kernels.options import Attended, AttendOptions
from refreshkv.kernels.reference.mixed import add_to_tally

_MOST_BITS = 7


class Codes(ctypes.Structure):
    """`struct Codes` of `codes.h`, field by field; `made_of` keeps alive what it points at."""

    _fields_ = (
        *pointers("keys", "key_grids", "values", "value_grids", "blocks"),
        *numbers("kept", "each", "pages", "bits", "value_bits"),
        *numbers(
            *(
                f"{of}_{step}"
                for of in ("key", "key_grid", "value", "value_grid")
                for step in ("row", "head", "block")
            )
        ),
    )

    def __init__(self, codes: layout.Codes) -> None:
        blocks = whole(codes.blocks, torch.int32)
        self.made_of = *codes.tensors, blocks
        super().__init__(
            *map(address, self.made_of),
            *(len(codes.keys), codes.keys.shape[2]),
            -1 if blocks is None else blocks.shape[1],
            *(codes.bits, codes.value_bits),
            *(step for part in codes.tensors for step in part.stride()[:3]),
        )


class Mixed(ctypes.Structure):
    """`struct Mixed` of `mixed.h`, field by field."""

    _fields_ = (
        ("job", Job),
        ("codes", Codes),
        *pointers("first", "finished", "budget", "counts"),
        ("skip", ctypes.c_double),
    )


class Coding(ctypes.Structure):
    """`struct Coding` of `rounding.cpp`, field by field."""

    _fields_ = (
        ("entries", native.Entries),
        ("codes", Codes),
        *pointers("first", "begin", "end", "visible"),
        *numbers("kind", "rows", "most", "dim", "value_dim"),
        *numbers("visible_row", "visible_count", "threads"),
    )


def serves(*given: Any, **named: Any) -> bool:
    """Whether these kernels take such arguments here; they compute no gradients."""
    every = *given, *named.values()
    (entries,) = (x for x in every if isinstance(x, kinds.Entries))
    (codes,) = (x for x in every if isinstance(x, layout.Codes))
    queries = [x for x in (*given[:1], named.get("query")) if isinstance(x, Tensor)]
    if entries.values is None or entries.positions is not None:
        return False
    tensors = [entries.keys, entries.values, *queries]
    return (
        entries.keys.dtype in KINDS
        and all(x.dtype == entries.keys.dtype and x.stride(-1) == 1 for x in tensors)
        and all(x.shape[-1] <= WIDEST for x in tensors)
        and all(x.shape[1] // entries.kv_heads <= MOST_QUERIES for x in queries)
        and all(1 <= b <= _MOST_BITS for b in (codes.bits, codes.value_bits))
        and all(x[0:1, 0:1, 0:1].is_contiguous() for x in codes.tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and ready()
    )


def attend_mixed(
    query: Tensor,
    entries: kinds.Entries,
    codes: layout.Codes,
    options: AttendOptions,
    *,
    first: Tensor,
    finished: Tensor,
    budget: Tensor,
    skip: float = 0.0,
    tally: Tensor,
) -> Attended:
    """See `reference.attend_mixed`."""
    rows = {"first": first, "finished": finished, "budget": budget}
    return run(query, entries, codes, options, **rows, skip=skip, tally=tally)


def run(
    query: Tensor,
    entries: kinds.Entries,
    codes: layout.Codes,
    options: AttendOptions,
    *,
    first: Tensor,
    finished: Tensor,
    budget: Tensor,
    skip: float = 0.0,
    tally: Tensor,
    threads: int | None = None,
) -> Attended:
    """`attend_mixed` on so many threads, or as many as torch uses."""
    assert entries.values is not None
    rows, query_heads, _ = query.shape
    output = query.new_empty(rows, query_heads, entries.values.shape[-1])
    lse = query.new_empty(rows, query_heads, dtype=torch.float32)
    counts = torch.zeros(rows, entries.kv_heads, 2, dtype=torch.int64)
    if not (entries.count and entries.keys.numel()):  # as in `attention.run`
        add_to_tally(tally, counts, entries, codes, options, first, finished)
        return Attended(output.zero_(), lse.fill_(float("-inf")))
    job = job_of(query[:, :, None], entries, options, (output, lse, None), threads=threads)
    where = Codes(codes)
    inputs = [whole(x, torch.int64) for x in (first, finished, budget)]
    mixed = Mixed(job, where, *map(address, (*inputs, counts)), skip)
    if compiled().refreshkv_attend_mixed(ctypes.byref(mixed)):
        raise MemoryError(f"attention over {entries.count} entries: not enough memory")
    add_to_tally(tally, counts, entries, codes, options, first, finished)
    return Attended(output, lse)


def encode(
    entries: kinds.Entries,
    codes: layout.Codes,
    *,
    first: Tensor,
    begin: Tensor,
    end: Tensor,
    most: int,
    visible: Tensor | None = None,
) -> None:
    """See `reference.encode`."""
    assert entries.values is not None
    if visible is not None:
        visible = visible.expand(len(first), -1)
        visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    inputs = *(whole(x, torch.int64) for x in (first, begin, end)), visible
    where, into = native.Entries(entries), Codes(codes)
    job = Coding(
        where,
        into,
        *map(address, inputs),
        *(KINDS.index(entries.keys.dtype), len(first), most),
        *(entries.keys.shape[-1], entries.values.shape[-1]),
        *((0, 0) if visible is None else (visible.stride(0), visible.shape[1])),
        torch.get_num_threads(),
    )
    if codes.keys.numel():
        compiled().refreshkv_encode(ctypes.byref(job))
