"""The full step: attention over the whole cache and the score of every token, from one pass over keys and values.

The scores need the log-sum-exp of the whole row, so the pass keeps its logits (4 bytes a query head and token, where
keys and values have 512 a KV head at head dim 128) and a second kernel turns them into scores.

Same signatures as `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.config import Reduction
from refreshkv.kernels.options import Attended, Scored
from refreshkv.kernels.triton.common import (
    Config,
    for_every_head,
    group_weights,
    merge,
    on_its_device,
    own_length,
    strides,
)
from refreshkv.kernels.triton.split import attend_in_splits

SCORES = Config(block=1024, warps=4, stages=1)


@on_its_device
def attend_and_score(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    lengths: Tensor | None = None,
    heads: Tensor | None = None,
    reduction: Reduction = "max",
) -> tuple[Attended, Scored]:
    """See `reference.attend_and_score`."""
    parts = attend_in_splits(
        query, keys, values, scale, softcap, visible, lengths, heads, keep_logits=True
    )
    attended = merge(parts.output, parts.lse, dtype=values.dtype, sinks=sinks, heads=heads)
    return attended, _scored(parts.logits, attended.lse, sinks, lengths, heads, reduction, keys)


@on_its_device
def score(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    visible: Tensor | None = None,
    lengths: Tensor | None = None,
    heads: Tensor | None = None,
    reduction: Reduction = "max",
) -> Scored:
    """See `reference.score`."""
    parts = attend_in_splits(
        query, keys, None, scale, softcap, visible, lengths, heads, keep_logits=True
    )
    lse = merge(None, parts.lse, dtype=torch.float32, sinks=sinks, heads=heads).lse
    return _scored(parts.logits, lse, sinks, lengths, heads, reduction, keys)


@triton.jit
def score_kernel(
    logits_ptr,  # [B, Hq, L] float32
    lse_ptr,  # [B, Hq] float32
    sinks_ptr,  # [Hq], or None
    lengths_ptr,  # [B, Hkv] int64, or None
    heads_ptr,  # [B, Hkv] bool, or None
    scores_ptr,  # [B, Hkv, L] float32
    entries,
    length_row,
    length_head,
    GROUP: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of entries, Hkv, B)."""
    head, kv_heads = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2)
    place = row.to(tl.int64) * kv_heads + head
    if heads_ptr is not None:
        if not tl.load(heads_ptr + place):
            return
    length = own_length(lengths_ptr, row * length_row + head * length_head, entries)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scores = group_weights(
        logits_ptr + place * GROUP * entries,
        lse_ptr + place * GROUP,
        sinks_ptr,
        head * GROUP,
        places,
        places < length,
        entries,
        GROUP,
        MEAN,
    )
    tl.store(scores_ptr + place * entries + places, scores, mask=places < entries)


def _scored(
    logits: Tensor | None,
    lse: Tensor,
    sinks: Tensor | None,
    lengths: Tensor | None,
    heads: Tensor | None,
    reduction: Reduction,
    keys: Tensor,
) -> Scored:
    """The scores `[B, Hkv, L]` from the logits `[B, Hq, L]` and the log-sum-exp of their rows."""
    rows, kv_heads, entries, _ = keys.shape
    lengths = for_every_head(lengths, rows, kv_heads)
    scores = lse.new_empty(rows, kv_heads, entries)
    score_kernel[(triton.cdiv(entries, SCORES.block), kv_heads, rows)](
        logits,
        lse,
        sinks,
        lengths,
        None if heads is None else heads.contiguous(),
        scores,
        entries,
        *strides(lengths, 2),
        GROUP=lse.shape[1] // kv_heads,
        MEAN=reduction == "mean",
        BLOCK=SCORES.block,
        num_warps=SCORES.warps,
        num_stages=SCORES.stages,
    )
    return Scored(scores, lse)
