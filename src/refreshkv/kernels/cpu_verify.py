"""Several queries of a row at once on CPU: the verification of a draft, and the votes of an observation window.

Same signatures as `reference.py`.
"""

from __future__ import annotations

from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.cpu_heads import attend_heads
from refreshkv.kernels.reference import Attended, Scored


def verify(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    reduction: Reduction = "max",
    window: int | None = None,
) -> tuple[Attended, Scored]:
    """See `reference.verify`."""
    output, scores, lse = attend_heads(
        query,
        keys,
        values,
        starts=starts.tolist(),
        counts=_voting(query, counts),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
        reduction=reduction,
        window=window,
    )
    return Attended(output, lse), Scored(scores, lse)


def vote(
    query: Tensor,
    keys: Tensor,
    *,
    starts: Tensor,
    counts: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    reduction: Reduction = "max",
) -> Scored:
    """See `reference.vote`."""
    _, scores, lse = attend_heads(
        query,
        keys,
        None,
        starts=starts.tolist(),
        counts=_voting(query, counts),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
        reduction=reduction,
    )
    return Scored(scores, lse)


def _voting(query: Tensor, counts: Tensor | None) -> list[int]:
    return [query.shape[2]] * query.shape[0] if counts is None else counts.tolist()
