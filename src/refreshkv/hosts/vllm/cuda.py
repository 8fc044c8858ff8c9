"""RefreshKV on vLLM's FlashAttention backend, for NVIDIA GPUs. Not run on a GPU yet.

Keys and values are written and prompts attended by FlashAttention in vLLM's own cache; decode rows go to the Triton
kernels, over the same pages. A step in which each row has one token is one CUDA graph, attention and all: what its rows
do is told on the device (`steps`). In the others graphs hold what lies between the layers' attention.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from refreshkv.config import BLOCK
from refreshkv.hosts.vllm import refusals
from refreshkv.hosts.vllm.serving import ServedBackend, ServedBuilder, ServedLayer, is_full

logger = init_logger("vllm.refreshkv")

_NO_WINDOW = (-1, -1)


class RefreshKVBackend(ServedBackend, FlashAttentionBackend):
    """The backend `CUSTOM`."""

    widest, most_queries = 256, 16  # what the Triton kernels take
    supports_kv_cache_update_bypass = False  # from 0.33 on: prompts are cut out of keys and values

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def get_supported_kernel_block_sizes(cls, *spec: Any) -> list[int | MultipleOf]:
        """Multiples of 64 tokens, or those sizes that FlashAttention insists on. Up to 0.30 vLLM tells no `spec`."""
        sizes = super().get_supported_kernel_block_sizes(*spec)
        return [s for s in sizes if isinstance(s, int) and s % BLOCK == 0] or [MultipleOf(BLOCK)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which a page is one piece, behind which its codes lie; vLLM's usual one first."""
        pieces = [layout for layout in KVCacheLayout if layout.is_block_compact]
        return tuple(sorted(pieces, key=lambda layout: layout is not KVCacheLayout.LBNHC))

    @staticmethod
    def get_impl_cls() -> type[RefreshKVImpl]:
        return RefreshKVImpl

    @staticmethod
    def get_builder_cls() -> type[RefreshKVBuilder]:
        return RefreshKVBuilder


class RefreshKVImpl(ServedLayer, FlashAttentionImpl):
    """One layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        full = self.sliding_window == _NO_WINDOW
        self.served = full and self.attn_type == AttentionType.DECODER
        if self.served:
            vllm_config = get_current_vllm_config()
            device = torch.device(vllm_config.device_config.device)
            self.serve(RefreshKVBackend, vllm_config, device)


class RefreshKVBuilder(ServedBuilder, FlashAttentionMetadataBuilder):
    """What the layers of a group share in a step."""

    supports_update_block_table = False  # what a step completes is known where it is built

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False
        self.serve(kv_cache_spec, layer_names, vllm_config, device, logger.info)
        if not self.served or self.sorter.planner is None or device.type != "cuda":
            return
        if not vllm_config.use_v2_model_runner:
            refusals.refuse(
                "mode 'refresh' with vLLM's first model runner, which does not number its requests",
                "set VLLM_USE_V2_MODEL_RUNNER=1, or use mode 'mixed'",
            )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: Any
    ) -> AttentionCGSupport:
        """Steps of decode rows, by any mode; FlashAttention's own for layers that stay with it."""
        if is_full(kv_cache_spec):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Up to 0.31 vLLM may attend to a common prefix once for all rows; not here."""
        return False
