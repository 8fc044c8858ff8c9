"""Several queries of a row at once on CPU: the verification of a draft, and the votes of an observation window.

Same signatures as `reference.py`.
"""

from __future__ import annotations

from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.cpu_heads import attend_heads
from refreshkv.kernels.reference import Attended, Scored, window_within


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
        starts=starts.clamp(-query.shape[2], keys.shape[2]).tolist(),
        counts=_voting(query, counts),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
        reduction=reduction,
        window=window_within(window, query.shape[2] + keys.shape[2]),
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
        starts=starts.clamp(-query.shape[2], keys.shape[2]).tolist(),
        counts=_voting(query, counts),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        visible=visible,
        reduction=reduction,
    )
    return Scored(scores, lse)


def _voting(query: Tensor, counts: Tensor | None) -> list[int]:
    queries = query.shape[2]
    return [queries] * len(query) if counts is None else counts.clamp(0, queries).tolist()
