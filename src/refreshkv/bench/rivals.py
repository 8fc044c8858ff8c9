"""Attention of one decode step by the libraries of others, where they can be imported (GPU only)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch with the GQA group packed as G queries of one head: `[B, Hq, D]` over `[B, Hkv, L, D]`."""
    packed = query.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(packed, keys, values).flatten(1, 2)


def plain_sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch as it is called by most, the arguments of `sdpa`."""
    attend = F.scaled_dot_product_attention
    return attend(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def flash_sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`sdpa` by torch's own FlashAttention and nothing else."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(query, keys, values)


def attention_rivals(device: torch.device, rows: int) -> dict[str, Attend]:
    """Name -> a call with the arguments of `sdpa`. Those of others read `[B, L, Hkv, D]`, which is a view here."""
    found: dict[str, Attend] = {"torch sdpa": sdpa, "torch sdpa, not packed": plain_sdpa}
    if device.type != "cuda":
        return found
    found["torch flash"] = flash_sdpa
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        def flash(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            return flash_attn_with_kvcache(query[:, None], keys, values)[:, 0]

        found["flash_attn"] = flash
    if find_spec("flashinfer") is not None and rows == 1:  # of more rows it wants pages
        from flashinfer import single_decode_with_kv_cache

        def infer(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return single_decode_with_kv_cache(query[0], keys[0], values[0], kv_layout="HND")[None]

        found["flashinfer"] = infer
    return found
