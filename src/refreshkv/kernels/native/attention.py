"""Attention in bfloat16: what `attention.cpp` is called with. Signatures as in `reference.py`."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels.native.build import address, compiled, ready, whole
from refreshkv.kernels.native.selection import top_slots
from refreshkv.kernels.options import Attended, AttendOptions, Entries, Scored, window_within

_WIDTH, _WIDEST = 32, 512  # a head dim is a multiple of the first, and at most the second
_MOST_QUERIES = 1024  # of a row and KV head


class Job(ctypes.Structure):
    """`struct Job` of `attention.cpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "output", "lse", "scores")),
        *((name, ctypes.c_void_p) for name in ("visible", "heads", "lengths", "starts", "counts", "sinks")),
        *((name, ctypes.c_int64) for name in ("rows", "kv_heads", "group", "queries", "length", "dim", "value_dim")),
        *((f"{of}_{step}", ctypes.c_int64) for of in ("query", "key", "value") for step in ("row", "head", "token")),
        *((f"{of}_{step}", ctypes.c_int64) for of in ("visible", "lengths") for step in ("row", "head")),
        *((name, ctypes.c_int64) for name in ("window", "mean", "threads")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )  # fmt: skip


def serves(query: Tensor, entries: Entries, options: AttendOptions, **_: Any) -> bool:
    """Whether these kernels take such tensors here; they compute no gradients."""
    keys, values = entries.keys, entries.values
    tensors = (query, keys) if values is None else (query, keys, values)
    return (
        entries.blocks is None and entries.positions is None and entries.rows is None
        and all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in tensors)
        and all(x.shape[-1] <= _WIDEST and not x.shape[-1] % _WIDTH for x in tensors)
        and query.shape[1] // keys.shape[1] * (query.shape[2] if query.dim() == 4 else 1) <= _MOST_QUERIES
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and ready()
    )  # fmt: skip


def attend(query: Tensor, entries: Entries, options: AttendOptions) -> Attended:
    """See `reference.attend`."""
    output, lse, _ = run(query[:, :, None], entries, options, scored=False)
    return Attended(output.squeeze(2), lse.squeeze(2))


def attend_and_score(
    query: Tensor, entries: Entries, options: AttendOptions
) -> tuple[Attended, Scored]:
    """See `reference.attend_and_score`."""
    output, lse, scores = run(query[:, :, None], entries, options)
    lse = lse.squeeze(2)
    return Attended(output.squeeze(2), lse), Scored(scores, lse)


def score(query: Tensor, entries: Entries, options: AttendOptions) -> Scored:
    """See `reference.score`."""
    _, lse, scores = run(query[:, :, None], replace(entries, values=None), options)
    return Scored(scores, lse.squeeze(2))


def attend_and_rank(
    query: Tensor, entries: Entries, options: AttendOptions, *, newest: Tensor, count: int
) -> tuple[Attended, Tensor]:
    """See `reference.attend_and_rank`."""
    attended, scored = attend_and_score(query, entries, options)
    return attended, top_slots(scored.scores, newest, count)


def verify(
    query: Tensor, entries: Entries, options: AttendOptions, **rows: Any
) -> tuple[Attended, Scored]:
    """See `reference.verify`."""
    output, lse, scores = run(query, entries, options, **rows)
    return Attended(output, lse), Scored(scores, lse)


def vote(query: Tensor, entries: Entries, options: AttendOptions, **rows: Any) -> Scored:
    """See `reference.vote`."""
    _, lse, scores = run(query, replace(entries, values=None), options, **rows)
    return Scored(scores, lse)


def run(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    window: int | None = None,
    scored: bool = True,
    threads: int | None = None,
    library: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, Hq, T, Dv]`, log-sum-exp `[B, Hq, T]` and scores `[B, Hkv, L]` of queries `[B, Hq, T, D]`.

    Without `starts` every query sees all places. Without `values` the output is empty, and without `scored` the scores.
    `threads`: as many as torch uses; `library`: another build of it. The rest as in `reference.verify`.
    """
    keys, values = entries.keys, entries.values
    visible, lengths, heads, sinks = options.visible, options.lengths, options.heads, options.sinks
    (rows, query_heads, queries, dim), (_, kv_heads, length, _) = query.shape, keys.shape
    value_dim = 0 if values is None else values.shape[-1]
    output = query.new_empty(rows, query_heads, queries, value_dim)
    lse = query.new_empty(rows, query_heads, queries, dtype=torch.float32)
    scores = query.new_empty(rows, kv_heads, length if scored else 0, dtype=torch.float32)
    if not length:  # an address of nothing would be one that was not given
        return output.zero_(), lse.fill_(float("-inf")), scores
    # Copies live as long as these names do.
    visible = None if visible is None else visible.expand(rows, kv_heads, -1)
    if visible is not None and visible.stride(-1) != 1:
        visible = visible.contiguous()
    lengths = None if lengths is None else lengths.expand(rows, kv_heads)
    heads, starts, counts = whole(heads), whole(starts), whole(counts)
    sinks = None if sinks is None else whole(sinks.float())
    strides = [x.stride() for x in (query, keys, keys if values is None else values)]
    job = Job(
        *map(address, (query, keys, values, output, lse, scores if scored else None)),
        *map(address, (visible, heads, lengths, starts, counts, sinks)),
        *(rows, kv_heads, query_heads // kv_heads, queries, length, dim, value_dim),
        *(step for three in strides for step in three[:3]),
        *((0, 0) if visible is None else visible.stride()[:2]),
        *((0, 0) if lengths is None else lengths.stride()),
        *(
            window_within(window, length + queries) or 0,
            options.reduction == "mean",
            threads or torch.get_num_threads(),
        ),
        *(options.scale, options.softcap or 0.0),
    )
    if (library or compiled()).refreshkv_attend(ctypes.byref(job)):
        raise MemoryError(f"attention over {length} tokens: not enough memory for its weights")
    return output, lse, scores
