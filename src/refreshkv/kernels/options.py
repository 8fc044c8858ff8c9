"""What the operations take and give: where entries lie, how a step attends to them, what comes out.

Letters: B batch (rows of a step), R rows of what is kept from step to step, Hq query heads, Hkv KV heads, L positions
of a row, n entries that a step looks at, K slots of a ring, D head dim, N pages of P positions, M pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from refreshkv.config import Reduction


@dataclass(frozen=True, eq=False)
class Entries:
    """Keys and values, after RoPE, and where the n entries of each row lie among them.

    Attributes:
        keys: `[R, Hkv, L, D]`; or, with `blocks`, pages `[N, Hkv, P, D]`.
        values: as the keys, with a head dim of their own; `None` where only keys are read.
        blocks: `[B, M]` int32, position p of row b lies in page `blocks[b, p // P]` at p % P. `None`: no pages.
        positions: `[R, Hkv, n]` int32, the entries are those at these positions, `FREE` ones left out. `None`: those at
            positions 0 .. n-1, where n is L, or M * P.
        rows: `[B]` int32, where what is kept for row b lies: the row of `positions`, of a ring, and of keys and values
            without pages. `None`: b itself.
    """

    keys: Tensor
    values: Tensor | None = None
    blocks: Tensor | None = None
    positions: Tensor | None = None
    rows: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.keys.shape[1]

    @property
    def width(self) -> int:
        """Positions that a row can have: L, or M * P."""
        pages = 1 if self.blocks is None else self.blocks.shape[1]
        return self.keys.shape[2] * pages

    @property
    def count(self) -> int:
        """n."""
        return self.width if self.positions is None else self.positions.shape[2]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttendOptions:
    """How a step attends: what the model adds to plain attention, and what of the entries counts.

    Attributes:
        scale: factor on the logits.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        sinks: `[Hq]`, one extra logit a head that receives attention and gives no value (gpt-oss).
        reduction: how the query heads of a GQA group agree on one score.
        visible: `[B or 1, Hkv or 1, n]` bool; `None` when everything is. A row that sees nothing gives 0.
        lengths: `[B or 1, Hkv or 1]` int64, only the first so many entries count; `None`: all.
        heads: `[B, Hkv]` bool, the KV heads whose result the caller uses; the others may give anything. `None`: all.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    reduction: Reduction = "max"
    visible: Tensor | None = None
    lengths: Tensor | None = None
    heads: Tensor | None = None

    def over(
        self,
        visible: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        heads: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> AttendOptions:
        """The same attention of the model, over other entries."""
        return AttendOptions(
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            reduction=reduction or self.reduction,
            visible=visible,
            lengths=lengths,
            heads=heads,
        )


class Attended(NamedTuple):
    """output `[B, Hq, D]` in the dtype of the values; lse `[B, Hq]` float32, log-sum-exp over the tokens (no sink)."""

    output: Tensor
    lse: Tensor


class Scored(NamedTuple):
    """scores `[B, Hkv, n]` float32, the attention each entry received (group-reduced); lse `[B, Hq]` float32."""

    scores: Tensor
    lse: Tensor


def over_heads(visible: Tensor | None) -> Tensor | None:
    """`[B, L]` as `AttendOptions` wants it: one mask for all heads."""
    return None if visible is None else visible[:, None]


def verify_queries(group: int, most: int) -> int:
    """How many queries a row `verify` should be given, of at most `most`, so that a GPU multiplies little padding.

    A GPU pads their number and that of the heads in a group to powers of two, together at least 16 rows of a product: 9
    queries of 4 heads cost what 16 do. This is the largest power of two that fills those rows, or `most` where there is
    none.
    """
    heads = 1 << max(group - 1, 0).bit_length()
    queries = 1 << max(most, 1).bit_length() - 1
    return queries if heads * queries >= 16 else most


def window_within(window: int | None, positions: int) -> int | None:
    """`window`, no wider than the `positions` there are."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1; got {window} (None: all earlier positions)")
    return None if window is None else min(window, positions)
