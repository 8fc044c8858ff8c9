"""The kernels as `torch.library` operators, so that a decode step is one graph for `torch.compile`.

An operator is opaque to the compiler: it runs what `backend_for` picks for the device of its tensors, which on a CPU
may look at them. What the compiler learns is shapes, and those follow from shapes alone. Signatures as in
`reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import Backend, backend_for
from refreshkv.kernels.reference import Attended, Scored
from refreshkv.selection import Selection

_ATTENTION = (
    "float scale, float? softcap, Tensor? sinks, Tensor? visible, Tensor? lengths, Tensor? heads"
)


def _operator(
    name: str,
    arguments: str,
    results: int,
    shapes: Callable[..., Any],
    writes: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Define `refreshkv::name`, and return a call with the arguments of the reference.

    Args:
        name: of a kernel in `Backend`.
        arguments: of the operator, as in a schema. What the caller leaves out is `None`.
        results: how many tensors come back.
        shapes: empty results, from the arguments by name.
        writes: the arguments that the kernel writes into.
    """
    names = [argument.split()[-1] for argument in arguments.split(", ")]

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

    def call(*given: Any, **named: Any) -> Any:
        return operator(*given, *(named.get(name) for name in names[len(given) :]))

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


def _selected(scores: Tensor, slots: int, **_: Any) -> tuple[Tensor, Tensor]:
    """As `Selection`."""
    shape = (*scores.shape[:2], min(slots, scores.shape[2]))
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(
        shape[:2], dtype=torch.int64
    )


_attend = _operator(
    "attend", f"Tensor query, Tensor keys, Tensor values, {_ATTENTION}", 2, _attended
)
_attend_and_score = _operator(
    "attend_and_score",
    f"Tensor query, Tensor keys, Tensor values, {_ATTENTION}, str reduction",
    3,
    lambda **given: (*_attended(**given), _scores(**given)),
)
_attend_and_rank = _operator(
    "attend_and_rank",
    f"Tensor query, Tensor keys, Tensor values, {_ATTENTION}, str reduction, Tensor newest, int count",
    3,
    lambda **given: (
        *_attended(**given),
        given["newest"].new_empty(
            *given["newest"].shape, min(given["count"], given["keys"].shape[2])
        ),
    ),
)
_score = _operator(
    "score",
    f"Tensor query, Tensor keys, {_ATTENTION}, str reduction",
    2,
    lambda **given: (_scores(**given), _attended(**given, values=given["keys"])[1]),
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
)
_select = _operator(
    "select",
    "Tensor scores, Tensor budget, int pool_kernel, Tensor? visible, Tensor? heads, Tensor? recent,"
    " Tensor? anchors, Tensor? ends, int slots",
    2,
    _selected,
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


def _attend_and_score_named(*given: Any, **named: Any) -> tuple[Attended, Scored]:
    output, lse, scores = _attend_and_score(*given, **named)
    return Attended(output, lse), Scored(scores, lse)


def _attend_and_rank_named(*given: Any, **named: Any) -> tuple[Attended, Tensor]:
    output, lse, best = _attend_and_rank(*given, **named)
    return Attended(output, lse), best


def _verify_named(*given: Any, **named: Any) -> tuple[Attended, Scored]:
    output, lse, scores = _verify(*given, **named)
    return Attended(output, lse), Scored(scores, lse)


def _select_named(*given: Any, recent: Tensor | int = 0, **named: Any) -> Selection:
    kept = recent if isinstance(recent, Tensor) else None  # 0, as from `selection.recent_share`
    return Selection(*_select(*given, recent=kept, **named))


OPERATORS = Backend(
    name="operators",
    attend=lambda *given, **named: Attended(*_attend(*given, **named)),
    attend_and_score=_attend_and_score_named,
    attend_and_rank=_attend_and_rank_named,
    score=lambda *given, **named: Scored(*_score(*given, **named)),
    select=_select_named,
    gather=_gather,
    insert=_insert,
    verify=_verify_named,
    # Not in a pass that is compiled.
    attend_at=lambda query, *given, **named: backend_for(query.device).attend_at(
        query, *given, **named
    ),
    vote=lambda query, *given, **named: backend_for(query.device).vote(query, *given, **named),
)
