"""What a decode step reads from the host's attention mask: which tokens its query sees."""

from __future__ import annotations

import torch
from torch import Tensor


def padding(mask: Tensor | None) -> Tensor | None:
    """`[B, L]` bool of the mask of a prompt that `generate` holds, False for padding; `None` where nobody is padded."""
    return None if mask is None or bool(mask.all()) else mask.bool()


def newest_row(mask: Tensor | None, length: int) -> Tensor:
    """`[B or 1, L]` bool, what the newest query sees by the mask of a pass.

    Raises:
        RuntimeError: no mask of two or four dimensions, one for each head, one that does not cover `length` tokens, or
            one that adds something to what it does not hide (looked for on CPUs alone: it would wait for a GPU).
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise RuntimeError(
            "RefreshKV cannot read this attention mask; load the model with attn_implementation='sdpa'"
        )
    row = mask if mask.dim() == 2 else mask[:, 0, -1]  # flash: [B, L]; sdpa, eager: [B, 1, 1, L]
    if mask.dim() == 4 and mask.shape[1] != 1:
        raise RuntimeError("RefreshKV cannot serve a model whose attention mask differs by head")
    if row.shape[-1] != length:
        raise RuntimeError(
            f"the attention mask covers {row.shape[-1]} tokens, the cache holds {length}"
        )
    if row.dtype == torch.bool:
        return row
    # An additive mask hides with the smallest number, one of the flash kind with zero.
    if mask.dim() == 2:
        return row != 0
    shown = row > torch.finfo(row.dtype).min / 2
    if row.device.type == "cpu" and bool((shown & (row != 0)).any()):
        raise RuntimeError("RefreshKV cannot serve a model that adds a bias to its attention")
    return shown
