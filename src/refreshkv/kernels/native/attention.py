"""Attention: what `attention.cpp` is called with. Signatures as in `reference`."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels.native import entries as native
from refreshkv.kernels.native.build import address, compiled, ready, whole
from refreshkv.kernels.native.entries import numbers, pointers
from refreshkv.kernels.native.selection import top_slots
from refreshkv.kernels.options import Attended, AttendOptions, Entries, Scored, window_within
from refreshkv.kernels.reference.attention import without_list, written_into

KINDS = torch.bfloat16, torch.float16, torch.float32  # as `refreshkv_attend` numbers them
WIDEST = 512  # of a head
MOST_QUERIES = 1024  # of a row and KV head


class Job(ctypes.Structure):
    """`struct Job` of `job.h`, field by field."""

    _fields_ = (
        ("entries", native.Entries),
        *pointers("query", "output", "lse", "scores"),
        *pointers("visible", "heads", "lengths", "starts", "counts", "sinks"),
        *numbers("kind", "rows", "group", "queries", "dim", "value_dim"),
        *numbers("query_row", "query_head", "query_token"),
        *numbers("visible_row", "visible_head", "lengths_row", "lengths_head"),
        *numbers("window", "mean", "threads"),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )


def serves(query: Tensor, entries: Entries, options: AttendOptions, **_: Any) -> bool:
    """Whether these kernels take such tensors here; they compute no gradients."""
    tensors = [x for x in (query, entries.keys, entries.values) if x is not None]
    queries = query.shape[2] if query.dim() == 4 else 1
    return (
        query.dtype in KINDS
        and all(x.dtype == query.dtype and x.stride(-1) == 1 for x in tensors)
        and all(x.shape[-1] <= WIDEST for x in tensors)
        and query.shape[1] // entries.kv_heads * queries <= MOST_QUERIES
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and ready()
    )


def attend(query: Tensor, entries: Entries, options: AttendOptions) -> Attended:
    """See `reference.attend`."""
    output, lse, _ = run(query[:, :, None], entries, options, scored=False)
    return Attended(output.squeeze(2), lse.squeeze(2))


def attend_and_score(
    query: Tensor, entries: Entries, options: AttendOptions, *, into: Tensor | None = None
) -> tuple[Attended, Scored]:
    """See `reference.attend_and_score`."""
    output, lse, scores = run(query[:, :, None], entries, options)
    lse = lse.squeeze(2)
    attended = written_into(into, Attended(output.squeeze(2), lse), options)
    return attended, Scored(scores, lse)


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
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    window: int | None = None,
    expected: Tensor | None = None,
) -> tuple[Attended, Scored]:
    """See `reference.verify`. One pass gives the scores of every log-sum-exp as it is, so `expected` is not used."""
    given = query, without_list(entries), options
    output, lse, scores = run(*given, starts=starts, counts=counts, window=window)
    return Attended(output, lse), Scored(scores, lse)


def vote(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
) -> Scored:
    """See `reference.vote`."""
    keys = replace(without_list(entries), values=None)
    _, lse, scores = run(query, keys, options, starts=starts, counts=counts)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, Hq, T, Dv]`, log-sum-exp `[B, Hq, T]` and scores `[B, Hkv, n]` of queries `[B, Hq, T, D]`.

    Without `starts` every query sees all entries. Without values the output is empty, and without `scored` the scores.
    `threads`: as many as torch uses. The rest as in `reference.verify`.
    """
    (rows, query_heads, queries, _), count = query.shape, entries.count
    value_dim = 0 if entries.values is None else entries.values.shape[-1]
    output = query.new_empty(rows, query_heads, queries, value_dim)
    lse = query.new_empty(rows, query_heads, queries, dtype=torch.float32)
    scores = query.new_empty(rows, entries.kv_heads, count if scored else 0, dtype=torch.float32)
    window = window_within(window, count + queries) or 0
    if not (
        count and entries.keys.numel()
    ):  # an address of nothing would be one that was not given
        return output.zero_(), lse.fill_(float("-inf")), scores.zero_()
    results = output, lse, scores if scored else None
    job = job_of(
        query,
        entries,
        options,
        results,
        starts=starts,
        counts=counts,
        window=window,
        threads=threads,
    )
    if compiled().refreshkv_attend(ctypes.byref(job)):
        raise MemoryError(f"attention over {count} entries: not enough memory for its weights")
    return output, lse, scores


def job_of(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    results: tuple[Tensor, Tensor, Tensor | None],
    *,
    starts: Tensor | None = None,
    counts: Tensor | None = None,
    window: int = 0,
    threads: int | None = None,
) -> Job:
    """What the kernels are told, whose `made_of` keeps alive what it points at; `results` as `run` returns them."""
    rows, query_heads, queries, dim = query.shape
    visible, lengths, sinks = options.visible, options.lengths, options.sinks
    if visible is not None:
        visible = visible.expand(rows, entries.kv_heads, -1)
        visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    lengths = None if lengths is None else lengths.expand(rows, entries.kv_heads)
    heads, starts, counts = whole(options.heads), whole(starts), whole(counts)
    sinks = whole(sinks, torch.float32)
    made_of = query, *results, visible, heads, lengths, starts, counts, sinks
    where = native.Entries(entries)
    job = Job(
        where,
        *map(address, made_of),
        *(KINDS.index(query.dtype), rows, query_heads // entries.kv_heads, queries),
        *(dim, results[0].shape[-1], *query.stride()[:3]),
        *((0, 0) if visible is None else visible.stride()[:2]),
        *((0, 0) if lengths is None else lengths.stride()),
        *(window, options.reduction == "mean", threads or torch.get_num_threads()),
        *(options.scale, options.softcap or 0.0),
    )
    job.made_of = made_of, where
    return job
