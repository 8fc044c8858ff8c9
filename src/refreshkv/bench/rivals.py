"""Attention of one decode step by the libraries of others, where they can be imported, and whole steps by one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer

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


PACKED = "packed_flash"  # what transformers calls the attention of `InPlace`


class InPlace(DynamicLayer):
    """A layer of transformers' cache over a filled buffer: a new token goes behind its context, and is not kept.

    So nothing is copied or moved in a step, and one can be a CUDA graph: full attention at its best, by `flash_sdpa`.

    Args:
        keys, values: `[B, Hkv, C, D]`.
        length: tokens of the context.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The context and the new tokens."""
        begin = self.keys.shape[2]
        end = begin + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, begin:end] = new
        both = [buffer[:, :, :end] for buffer in self.buffers]
        return both[0], both[1]


def _packed(module: Any, query: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
    """One token a row, `[B, Hq, 1, D]`, that sees everything; as transformers calls attention."""
    return flash_sdpa(query[:, :, 0], keys, values)[:, None], None


AttentionInterface.register(PACKED, _packed)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)


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
