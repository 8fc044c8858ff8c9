"""The kernels as `torch.library` operators, so that a decode step is one graph for `torch.compile`.

An operator is opaque to the compiler: it runs what `backend_for` picks for the device of its tensors, which on a CPU
may look at them. What the compiler learns is shapes, and those follow from shapes alone. Signatures as in
`reference.py`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import REFERENCE, Backend, backend_for
from refreshkv.kernels.reference import Attended, Scored
from refreshkv.policy.selection import Selection

_ATTENTION = (
    "float scale, float? softcap, Tensor? sinks, Tensor? visible, Tensor? lengths, Tensor? heads"
)


def _operator(
    name: str,
    arguments: str,
    results: int,
    shapes: Callable[..., Any],
    writes: tuple[str, ...] = (),
    named: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `refreshkv::name`, and return a call with the signature of the reference.

    Args:
        name: of a kernel in `Backend`.
        arguments: of the operator, as in a schema.
        results: how many tensors come back.
        shapes: empty results, from the arguments by name.
        writes: the arguments that the kernel writes into.
        named: makes what the caller gets of several results; `None`: there is one or none.
    """
    names = [argument.split()[-1] for argument in arguments.split(", ")]
    signature = inspect.signature(getattr(REFERENCE, name))
    places = [key for key, p in signature.parameters.items() if p.kind != p.KEYWORD_ONLY]
    defaults = {key: p.default for key, p in signature.parameters.items() if p.default != p.empty}

    def run(*given: Any) -> Any:
        found = getattr(backend_for(given[0].device), name)(
            **{name: value for name, value in zip(names, given, strict=True) if value is not None}
        )
        if results == 0:
            return None
        tensors = _distinct(found)
        return tensors[0] if results == 1 else tuple(tensors)

    operator = torch.library.custom_op(
        f"refreshkv::{name}",
        run,
        mutates_args=writes,
        schema=f"({arguments}) -> ({', '.join(['Tensor'] * results)})",
    )
    operator.register_fake(lambda *given: shapes(**dict(zip(names, given, strict=True))))

    # Not `signature.bind`, which the compiler would have to look into.
    def call(*given: Any, **options: Any) -> Any:
        every = {**defaults, **dict(zip(places, given, strict=False)), **options}
        wrong = [key for key in (*names, *every) if key not in every or key not in names]
        wrong += [key for key in places[: len(given)] if key in options]
        if wrong or len(given) > len(places):
            raise TypeError(f"{name}{signature} is missing, does not know, or has twice: {wrong}")
        found = operator(*(every[key] for key in names))
        return found if named is None else named(*found)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _distinct(found: Any) -> list[Tensor]:
    """The tensors of nested results, each once, contiguous."""
    if isinstance(found, Tensor):
        return [found.contiguous()]
    tensors: list[Tensor] = []
    for part in found:
        tensors += [new for new in _distinct(part) if not any(new is old for old in tensors)]
    return tensors


def _attended(query: Tensor, values: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """As `Attended`."""
    return (
        values.new_empty(*query.shape[:2], values.shape[-1]),
        query.new_empty(query.shape[:2], dtype=torch.float32),
    )


def _scores(keys: Tensor, **_: Any) -> Tensor:
    return keys.new_empty(keys.shape[:3], dtype=torch.float32)


def _attended_and_scored(output: Tensor, lse: Tensor, scores: Tensor) -> tuple[Attended, Scored]:
    return Attended(output, lse), Scored(scores, lse)


def _selected(scores: Tensor, slots: int, **_: Any) -> tuple[Tensor, Tensor]:
    """As `Selection`."""
    shape = (*scores.shape[:2], max(0, min(slots, scores.shape[2])))
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(
        shape[:2], dtype=torch.int64
    )


_attend = _operator(
    "attend",
    f"Tensor query, Tensor keys, Tensor values, {_ATTENTION}",
    2,
    _attended,
    named=Attended,
)
_attend_and_score = _operator(
    "attend_and_score",
    f"Tensor query, Tensor keys, Tensor values, {_ATTENTION}, str reduction",
    3,
    lambda **given: (*_attended(**given), _scores(**given)),
    named=_attended_and_scored,
)
_attend_and_rank = _operator(
    "attend_and_rank",
    f"Tensor query, Tensor keys, Tensor values, {_ATTENTION}, str reduction, Tensor newest, int count",
    3,
    lambda **given: (
        *_attended(**given),
        given["newest"].new_empty(
            *given["newest"].shape, max(0, min(given["count"], given["keys"].shape[2]))
        ),
    ),
    named=lambda output, lse, best: (Attended(output, lse), best),
)
_score = _operator(
    "score",
    f"Tensor query, Tensor keys, {_ATTENTION}, str reduction",
    2,
    lambda **given: (_scores(**given), _attended(**given, values=given["keys"])[1]),
    named=Scored,
)
_verify = _operator(
    "verify",
    "Tensor query, Tensor keys, Tensor values, Tensor starts, Tensor? counts, float scale, float? softcap,"
    " Tensor? sinks, Tensor? visible, str reduction, int? window",
    3,
    lambda query, keys, values, **_: (
        values.new_empty(*query.shape[:3], values.shape[-1]),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        _scores(keys),
    ),
    named=_attended_and_scored,
)
_select = _operator(
    "select",
    "Tensor scores, Tensor budget, int pool_kernel, Tensor? visible, Tensor? heads, Tensor? recent,"
    " Tensor? anchors, Tensor? ends, int slots",
    2,
    _selected,
    named=Selection,
)
_gather = _operator(
    "gather",
    "Tensor source, Tensor positions, Tensor(a!) out, Tensor? heads",
    0,
    lambda **_: None,
    writes=("out",),
)
_insert = _operator(
    "insert",
    "Tensor keys, Tensor values, Tensor wanted, Tensor(a!) ring_keys, Tensor(b!) ring_values,"
    " Tensor(c!) ring_positions, Tensor filled, Tensor(d!) pushed, Tensor budget",
    1,
    lambda pushed, **_: torch.empty_like(pushed),
    writes=("ring_keys", "ring_values", "ring_positions", "pushed"),
)


def _select_named(
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
    if slots is None:
        raise ValueError(
            "select needs slots: the compiler would have to look at the largest budget"
        )
    if not isinstance(recent, Tensor):
        kept = max(0, min(recent, scores.shape[2]))
        recent = budget.new_full(budget.shape, kept) if kept else None  # type: ignore[assignment]
    rules = {"visible": visible, "recent": recent, "anchors": anchors, "ends": ends}
    return _select(scores, budget, pool_kernel=pool_kernel, heads=heads, slots=slots, **rules)


def _of_the_device(name: str) -> Callable[..., Any]:
    """A kernel that no compiled pass calls."""

    @functools.wraps(getattr(REFERENCE, name))
    def run(query: Tensor, *given: Any, **options: Any) -> Any:
        return getattr(backend_for(query.device), name)(query, *given, **options)

    return run


OPERATORS = Backend(
    name="operators",
    attend=_attend,
    attend_and_score=_attend_and_score,
    attend_and_rank=_attend_and_rank,
    attend_at=_of_the_device("attend_at"),
    score=_score,
    verify=_verify,
    vote=_of_the_device("vote"),
    select=_select_named,
    gather=_gather,
    insert=_insert,
)
