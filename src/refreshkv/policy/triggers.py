"""When a layer refreshes: partial or full, decided per (row, KV head) and per step.

A trigger sees plain tensors only. It may decide *before* the partial step (a stride, a comparison of queries) or
*after* it, from the log-sum-exp that the partial step computed; a head that fires does its full step within the same
decode step. What a trigger wants to remember of the last full step is its own: `reference` makes it, the cache keeps it
beside the partial cache and hands it back.

Letters: B batch, Hq query heads, Hkv KV heads, D head dim, S stride. Source: RefreshKV, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Decide, Schedule

Kind = Literal["partial", "full", "decide"]


class Trigger:
    """Base of the triggers. By itself it remembers nothing and asks for nothing."""

    def reference(self, query: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
        """What to remember of a full step, `[B, Hkv, R]` with any R.

        Args:
            query: `[B, Hq, D]`, as attention uses it (after RoPE and QK-norm).
            lse: `[B, Hq]`, log-sum-exp of the full attention's logits.
            kv_heads: Hkv.
        """
        return query.new_empty((query.shape[0], kv_heads, 0))

    def due(self, step: Tensor) -> Tensor:
        """`[B, Hkv]` bool: may be full at once. `step` `[B, Hkv]` counts 1, 2, ... since the last full step."""
        return torch.zeros_like(step, dtype=torch.bool)

    def before(self, step: Tensor, query: Tensor, reference: Tensor) -> Tensor:
        """`[B, Hkv]` bool: full at once; nothing but `due` ones, and all of them unless the query decides."""
        return self.due(step)

    def after(self, step: Tensor, lse: Tensor, reference: Tensor) -> Tensor | None:
        """`[B, Hkv]` bool: this partial step was not enough; `lse` `[B, Hq]` is that of the partial attention.

        `None` (the default) means that the trigger never looks.
        """
        return None

    def kind(self, step: int) -> Kind | None:
        """What the `step`-th step (1, 2, ...) after a selection of every head is; `None`: that depends on the device.

        "partial" and "full" are so for every head, in "decide" the query of the step tells (`before`).
        """
        return None


class Never(Trigger):
    """No refresh: SnapKV with observation window 1."""

    def kind(self, step: int) -> Kind:
        return "partial"


@dataclass(frozen=True)
class FixedStride(Trigger):
    """Every S-th step is full."""

    stride: int

    def due(self, step: Tensor) -> Tensor:
        return step % self.stride == 0

    def kind(self, step: int) -> Kind:
        return "partial" if step % self.stride else "full"


@dataclass(frozen=True)
class QueryDrift(FixedStride):
    """The paper: every S-th step is full where the query has drifted, cos(query, reference) <= threshold."""

    threshold: float
    decide: Decide = "layer"

    def reference(self, query: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
        return self._summary(query, kv_heads)

    def before(self, step: Tensor, query: Tensor, reference: Tensor) -> Tensor:
        cosine = F.cosine_similarity(self._summary(query, step.shape[1]), reference, dim=-1)
        # Rounding can lift the cosine of a vector with itself above 1; threshold 1 must mean "always".
        return self.due(step) & (cosine.clamp(max=1.0) <= self.threshold)

    def kind(self, step: int) -> Kind:
        # A head that stays partial where it may be full has its next chance when the others do.
        return "partial" if step % self.stride else "decide"

    def _summary(self, query: Tensor, kv_heads: int) -> Tensor:
        """`[B, Hq, D]` -> `[B, Hkv, D]`: the mean query of the layer, the same for all heads, or of each GQA group."""
        query = query.float()
        if self.decide == "layer":
            return query.mean(1, keepdim=True).expand(-1, kv_heads, -1)
        return query.unflatten(1, (kv_heads, -1)).mean(2)


@dataclass(frozen=True)
class LseDrop(Trigger):
    """Ours: a KV head is full as soon as what one of its query heads looks for is no longer in its partial cache.

    The log-sum-exp over the partial cache falls more than `drop` nats below that of the head's last full step. It
    costs no read and no memory of queries, and positional heads, whose queries always drift, do not fire. A head that
    idles on a sink and should now find something new does not fire either. With `stride` the S-th step is full.
    """

    drop: float
    stride: int | None = None

    def reference(self, query: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
        return lse.unflatten(1, (kv_heads, -1)).float()

    def due(self, step: Tensor) -> Tensor:
        return super().due(step) if self.stride is None else step >= self.stride

    def after(self, step: Tensor, lse: Tensor, reference: Tensor) -> Tensor | None:
        fallen = reference - lse.float().unflatten(1, (reference.shape[1], -1))
        return (fallen > self.drop).any(-1)


def trigger_for(schedule: Schedule) -> Trigger:
    """The trigger that a schedule asks for."""
    if schedule.trigger == "lse-drop":
        return LseDrop(schedule.drop, schedule.stride)
    if schedule.stride is None:
        return Never()
    if schedule.threshold is None:
        return FixedStride(schedule.stride)
    return QueryDrift(schedule.stride, schedule.threshold, schedule.decide)
