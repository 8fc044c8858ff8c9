"""RefreshKV on vLLM's CPU backend.

vLLM's CPU kernels want keys transposed (or in tiles) within a block, so that every entry is spread over as many cache
lines as it has dims: reading a few of them would touch all of the block. Here the cache lies as vLLM describes it, key
and value of a token side by side, and the decode rows read that. The stock kernels, which attend the prompts, get a
transient copy in their own order: one pass over the context of a chunk, where attention passes over it once per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from refreshkv.config import BLOCK
from refreshkv.hosts.vllm import refusals
from refreshkv.hosts.vllm.planner import Numbers
from refreshkv.hosts.vllm.serving import (
    Prompts,
    ServedBackend,
    ServedBuilder,
    ServedLayer,
    only,
    tokens_of,
)
from refreshkv.kernels.native.build import library
from refreshkv.kernels.options import Entries

logger = init_logger("vllm.refreshkv")

_TOGETHER = 32768  # tokens of context that are copied at once, but for a row that has more
_PAGES_A_TURN = 32
_CPU = torch.device("cpu")


class RefreshKVCPUBackend(ServedBackend, CPUAttentionBackend):
    """In the place of `CPU_ATTN`."""

    widest = refusals.WIDEST

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK)]

    @staticmethod
    def get_impl_cls() -> type[RefreshKVCPUImpl]:
        return RefreshKVCPUImpl

    @staticmethod
    def get_builder_cls() -> type[RefreshKVCPUBuilder]:
        return RefreshKVCPUBuilder


@dataclass
class Copied:
    """Pages of some rows in the order of the stock kernels, one layer after the other in the same memory.

    Attributes:
        pages: `[n]` int64, which pages of the cache they are; `None`: the rows have no tokens but those of the step.
        slots: where each token goes: those of the pages, or of the step.
        count: n.
    """

    pages: Tensor | None
    slots: Tensor
    count: int
    memory: Tensor | None = field(default=None, init=False)

    def room(self, cache: Tensor) -> Tensor:
        """`[n, Hkv, P, 2 D]`; zeros at first, for what lies behind the last token of a row."""
        shape = self.count, *cache.shape[1:]
        if self.memory is None or self.memory.shape != shape or self.memory.dtype != cache.dtype:
            self.memory = torch.zeros(shape, dtype=cache.dtype)
        return self.memory


class RefreshKVCPUImpl(ServedLayer, CPUAttentionBackendImpl):
    """One layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.served = self.sliding_window == -1 and self.attn_type == AttentionType.DECODER
        if not self.served:
            return
        if library() is None:
            refusals.refuse(
                "a CPU without its C++ kernels", "install a C++ compiler (g++ or clang++)"
            )
        self.serve(RefreshKVCPUBackend, get_current_vllm_config(), _CPU)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Keys and values `[T, Hkv, D]` go where the slots `[T]` say; a negative slot is none."""
        if not self.served:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        size = kv_cache.shape[2]
        slots = slot_mapping[: len(key)]
        blocks = torch.div(slots, size, rounding_mode="floor").int()[:, None]
        pages = self.pages(kv_cache)
        self.decoding.backend.write(
            Entries(pages.keys, pages.values, blocks),
            key[:, :, None],
            value[:, :, None],
            starts=slots % size,
        )

    def attend_prompts(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        prompts: Prompts,
        output: Tensor,
    ) -> None:
        copied: Copied = prompts.more
        own = copied.room(kv_cache)
        if copied.pages is None:
            at = prompts.tokens
            CPUAttentionBackendImpl.do_kv_cache_update(
                self, layer, key[at], value[at], own, copied.slots
            )
        else:
            dim, size = self.head_size, kv_cache.shape[2]
            for first in range(0, copied.count, _PAGES_A_TURN):
                some = kv_cache.index_select(0, copied.pages[first : first + _PAGES_A_TURN])
                entries = some.transpose(1, 2).flatten(0, 1)
                slots = copied.slots[first * size : first * size + len(entries)]
                CPUAttentionBackendImpl.do_kv_cache_update(
                    self, layer, entries[..., :dim], entries[..., dim:], own, slots
                )
        super().attend_prompts(layer, query, key, value, own, prompts, output)


class RefreshKVCPUBuilder(ServedBuilder, CPUAttentionMetadataBuilder):
    """What the layers of a group share in a step."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.serve(kv_cache_spec, layer_names, vllm_config, device, logger.info)

    def prompts(self, common: Any, rows: Numbers) -> list[Prompts]:
        size = self.block_size
        ends = common.seq_lens.numpy().astype(np.int64)
        queries = np.diff(common.query_start_loc_cpu.numpy().astype(np.int64))
        pages = -(-ends // size)
        turns = np.cumsum(pages[rows]) * size // _TOGETHER
        made = []
        for turn in np.unique(turns):
            some = rows[turns == turn]
            own = only(common, some)
            first = np.concatenate([[0], np.cumsum(pages[some])])
            table = first[:-1, None] + np.arange(pages[some].max())
            stock = self.stock(
                replace(
                    own,
                    max_seq_len=int(ends[some].max()),
                    block_table_tensor=torch.from_numpy(table.astype(np.int32)),
                )
            )
            if (queries[some] == ends[some]).all():
                held = None
                spans = [
                    np.arange(end) + at * size for at, end in zip(first, ends[some], strict=False)
                ]
                slots = torch.from_numpy(np.concatenate(spans))
            else:
                there = np.arange(table.shape[1]) < pages[some][:, None]
                held = own.block_table_tensor[:, : table.shape[1]][torch.from_numpy(there)].long()
                slots = torch.arange(len(held) * size)
            copied = Copied(held, slots, int(first[-1]))
            made.append(Prompts(tokens_of(common, some), stock, copied))
        return made
