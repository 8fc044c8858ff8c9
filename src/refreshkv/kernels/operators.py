"""The operations as `torch.library` operators, so that a decode step is one graph for `torch.compile`.

An operator is opaque to the compiler: it runs what `backend_for` picks for the device of its tensors, which on a CPU
may look at them. What the compiler learns is shapes, and those follow from shapes alone. Signatures as in `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels.backend import Backend, backend_for
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Attended, AttendOptions, Entries, Scored
from refreshkv.kernels.ring_operators import drift, fetch, push, refresh, write
from refreshkv.kernels.schema import ATTEND as _ATTEND
from refreshkv.kernels.schema import CODES as _CODES
from refreshkv.kernels.schema import ENTRIES as _ENTRIES
from refreshkv.kernels.schema import OPTIONS as _OPTIONS
from refreshkv.kernels.schema import entries_of as _entries
from refreshkv.kernels.schema import operator as _operator
from refreshkv.kernels.schema import options_of as _options
from refreshkv.policy.selection import Selected


def _attended(query: Tensor, values: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """As `Attended`."""
    return (
        values.new_empty(*query.shape[:-1], values.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=torch.float32),
    )


def _scores(
    query: Tensor, keys: Tensor, blocks: Tensor | None, positions: Tensor | None, **_: Any
) -> Tensor:
    entries = Entries(keys, None, blocks, positions)
    shape = (query.shape[0], entries.kv_heads, entries.count)
    return query.new_empty(shape, dtype=torch.float32)


def _selected(scores: Tensor, slots: int, **_: Any) -> tuple[Tensor, Tensor]:
    """As `Selected`."""
    shape = (*scores.shape[:2], max(0, min(slots, scores.shape[2])))
    return scores.new_empty(shape, dtype=torch.int32), scores.new_empty(
        shape[:2], dtype=torch.int64
    )


_attend = _operator("attend", _ATTEND, 2, _attended)
_attend_and_score = _operator(
    "attend_and_score",
    f"{_ATTEND}, Tensor(a!)? into",
    3,
    lambda into, **given: (
        _attended(**given)[0] if into is None else into.new_empty(0),
        _attended(**given)[1],
        _scores(**given),
    ),
    writes=("into",),
)
_attend_and_rank = _operator(
    "attend_and_rank",
    f"{_ATTEND}, Tensor newest, int count",
    3,
    lambda newest, count, **given: (
        *_attended(**given),
        newest.new_empty(*newest.shape, max(0, min(count, _scores(**given).shape[-1]))),
    ),
)
_attend_mixed = _operator(
    "attend_mixed",
    f"Tensor query, {_ENTRIES}, {_CODES}, {_OPTIONS}, Tensor first, Tensor finished, Tensor budget,"
    " float skip, Tensor(a!) tally",
    2,
    _attended,
    writes=("tally",),
)
_score = _operator(
    "score",
    _ATTEND,
    2,
    lambda **given: (_scores(**given), _attended(**{**given, "values": given["keys"]})[1]),
)
_verify = _operator(
    "verify",
    f"{_ATTEND}, Tensor starts, Tensor? counts, int? window, Tensor? expected",
    3,
    lambda **given: (*_attended(**given), _scores(**given)),
)
_select = _operator(
    "select",
    "Tensor scores, Tensor budget, int pool_kernel, Tensor? visible, Tensor? heads, Tensor? recent,"
    " Tensor? anchors, Tensor? ends, int slots",
    2,
    _selected,
)
_encode = _operator(
    "encode",
    f"{_ENTRIES}, Tensor(a!) code_keys, Tensor(b!) key_grids, Tensor(c!) code_values, Tensor(d!) value_grids,"
    " Tensor? code_blocks, Tensor first, Tensor begin, Tensor end, int most, Tensor? visible",
    0,
    lambda **_: None,
    writes=("code_keys", "key_grids", "code_values", "value_grids"),
)


def attend(query: Tensor, entries: Entries, options: AttendOptions) -> Attended:
    """See `reference.attend`."""
    return Attended(*_attend(query, *_entries(entries), *_options(options)))


def attend_and_score(
    query: Tensor, entries: Entries, options: AttendOptions, *, into: Tensor | None = None
) -> tuple[Attended, Scored]:
    """See `reference.attend_and_score`."""
    output, lse, scores = _attend_and_score(query, *_entries(entries), *_options(options), into)
    return Attended(output if into is None else into, lse), Scored(scores, lse)


def attend_and_rank(
    query: Tensor, entries: Entries, options: AttendOptions, *, newest: Tensor, count: int
) -> tuple[Attended, Tensor]:
    """See `reference.attend_and_rank`."""
    flat = *_entries(entries), *_options(options)
    output, lse, best = _attend_and_rank(query, *flat, newest, count)
    return Attended(output, lse), best


def attend_mixed(
    query: Tensor,
    entries: Entries,
    codes: Codes,
    options: AttendOptions,
    *,
    first: Tensor,
    finished: Tensor,
    budget: Tensor,
    skip: float = 0.0,
    tally: Tensor,
) -> Attended:
    """See `reference.attend_mixed`."""
    flat = *_entries(entries), *codes.tensors, codes.blocks, *_options(options)
    return Attended(*_attend_mixed(query, *flat, first, finished, budget, skip, tally))


def score(query: Tensor, entries: Entries, options: AttendOptions) -> Scored:
    """See `reference.score`."""
    return Scored(*_score(query, *_entries(entries), *_options(options)))


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
    """See `reference.verify`."""
    flat = *_entries(entries), *_options(options)
    output, lse, scores = _verify(query, *flat, starts, counts, window, expected)
    return Attended(output, lse), Scored(scores, lse)


def vote(
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
) -> Scored:
    """See `reference.vote`. No compiled pass calls it."""
    vote = backend_for(query.device).vote
    return vote(query, entries, options, starts=starts, counts=counts)


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
    """See `policy.selection.select`."""
    if slots is None:
        raise ValueError(
            "select needs slots: the compiler would have to look at the largest budget"
        )
    if not isinstance(recent, Tensor):
        kept = max(0, min(recent, scores.shape[2]))
        recent = budget.new_full(budget.shape, kept)
    rules = visible, heads, recent, anchors, ends
    return Selected(*_select(scores, budget, pool_kernel, *rules, slots))


def encode(
    entries: Entries,
    codes: Codes,
    *,
    first: Tensor,
    begin: Tensor,
    end: Tensor,
    most: int,
    visible: Tensor | None = None,
) -> None:
    """See `reference.encode`."""
    flat = *_entries(entries), *codes.tensors, codes.blocks
    _encode(*flat, first, begin, end, most, visible)


OPERATORS = Backend(
    "operators",
    attend=attend,
    attend_and_score=attend_and_score,
    attend_and_rank=attend_and_rank,
    attend_mixed=attend_mixed,
    score=score,
    verify=verify,
    vote=vote,
    select=select,
    write=write,
    push=push,
    fetch=fetch,
    refresh=refresh,
    drift=drift,
    encode=encode,
)
