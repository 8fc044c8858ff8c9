"""Stand-ins of vLLM's FlashAttention, which attend in plain torch on a CPU, and a layer that is laid over them."""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from refreshkv.hosts.vllm.pages import PageShape
from refreshkv.kernels import reference
from refreshkv.kernels.options import AttendOptions, Entries
from tests.helpers import Tokens
from tests.hosts.vllm.fakes import CPU, Common, Row, cache_of, describe

HEADS, GROUP, DIM, PAGE = 2, 2, 16, 64


class Layout(enum.Enum):
    """As `KVCacheLayout`."""

    LBHNC = (0, 1, 2, 3, 4)
    LBNHC = (0, 1, 3, 2, 4)
    LHBNC = (0, 2, 1, 3, 4)
    BLHNC = (1, 0, 2, 3, 4)

    @property
    def is_block_compact(self) -> bool:
        return set(self.value[:2]) == {0, 1}


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec:
    """As vLLM's."""

    block_size: int = PAGE
    num_kv_heads: int = HEADS
    head_size: int = DIM
    head_size_v: int = DIM
    dtype: torch.dtype = torch.float32
    page_size_padded: int | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None


class SlidingWindowSpec(FullAttentionSpec):
    """Of another kind."""


class FlashAttentionBackend:
    """Insists on no block size, but where a test says so."""

    sizes: ClassVar[list[Any]] = []

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    supports_device_cpu_query_lens_mismatch = supports_batch_invariance

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return cls.sizes


class FlashAttentionImpl:
    """Full attention over pages, for rows of any number of queries."""

    def __init__(
        self, *, sliding_window: int | None = None, alibi: Any = None, shares: str | None = None,
        head_size: int = DIM, attn_type: str = "decoder",
    ) -> None:  # fmt: skip
        self.num_heads, self.num_kv_heads, self.head_size = HEADS * GROUP, HEADS, head_size
        self.scale, self.logits_soft_cap, self.sinks = DIM**-0.5, 0, None
        self.sliding_window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.alibi_slopes, self.kv_sharing_target_layer_name = alibi, shares
        self.attn_type = attn_type
        self.attended: list[list[int]] = []  # queries of the rows of each call

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, common: Any, output: Tensor,
        output_scale: Any = None, output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        if common is None:
            return output.fill_(0)
        assert (
            len(query)
            == len(key)
            == len(output)
            >= common.num_actual_tokens
            == len(common.slot_mapping)
        )
        keys, values = kv_cache.split(DIM, -1)
        starts = common.query_start_loc.tolist()
        self.attended.append([end - start for start, end in pairwise(starts)])
        options = AttendOptions(scale=self.scale)
        for row, (start, end) in enumerate(pairwise(starts)):
            for token in range(start, end):
                length = int(common.seq_lens[row]) - (end - 1 - token)
                entries = Entries(keys, values, common.block_table_tensor[row : row + 1])
                seen = options.over(lengths=torch.tensor([[length]]))
                output[token] = reference.attend(query[token : token + 1], entries, seen).output[0]
        return output


class FlashAttentionMetadataBuilder:
    """Its metadata is the description of the step."""

    supports_update_block_table = True

    def __init__(self, spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        self.block_size = spec.block_size

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        assert common_prefix_len == 0
        return common

    def build_for_cudagraph_capture(self, common: Any) -> Any:
        return self.build(0, common)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, spec: Any) -> str:
        return "ALWAYS"


class Config(SimpleNamespace):
    """`VllmConfig`; unlike its base it can be referred to weakly."""


@dataclass
class Fake:
    """What the tests reach into."""

    cuda: Any
    config: Config

    def told(self, **settings: Any) -> Fake:
        self.config.additional_config = {"refreshkv": settings}
        return self

    def builder(self, spec: Any = None) -> Any:
        return self.cuda.RefreshKVBuilder(spec or FullAttentionSpec(), ["0"], self.config, CPU)


@contextmanager
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The module `cuda` over these, while it lasts."""
    config = Config(
        additional_config={},
        parallel_config=SimpleNamespace(rank=0),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(max_model_len=512),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        device_config=SimpleNamespace(device="cpu"),
        speculative_config=None,
        kv_transfer_config=None,
        use_v2_model_runner=True,
    )
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"VllmConfig": object, "get_current_vllm_config": lambda: config},
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(info=print, warning=print)},
        "vllm.v1": {},
        "vllm.v1.kv_cache_layout": {"KVCacheLayout": Layout},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionCGSupport": SimpleNamespace(UNIFORM_SINGLE_TOKEN_DECODE="decode"),
            "AttentionType": SimpleNamespace(DECODER="decoder"),
            "MultipleOf": lambda base: f"multiples of {base}",
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.flash_attn": {
            "FlashAttentionBackend": FlashAttentionBackend,
            "FlashAttentionImpl": FlashAttentionImpl,
            "FlashAttentionMetadataBuilder": FlashAttentionMetadataBuilder,
        },
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("refreshkv.hosts.vllm.counters.export", lambda counts: None)
    name = "refreshkv.hosts.vllm.cuda"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield Fake(importlib.import_module(name), config)
    sys.modules.pop(name, None)


class Running:
    """One layer of the backend and its builder; requests as in `fakes.Server`."""

    def __init__(self, fake: Fake, tokens: Tokens, **layer: Any) -> None:
        self.tokens, self.layer = tokens, fake.cuda.RefreshKVImpl(**layer)
        spec = fake.cuda.RefreshKVBackend.customize_spec(FullAttentionSpec())
        self.builder = fake.builder(spec)
        rounding = fake.cuda.RefreshKVBackend.rounding
        shape = PageShape(HEADS, PAGE, (DIM, DIM), torch.float32, rounding)
        assert spec.page_size_padded == (shape.bytes if rounding else None)
        self.cache, _ = cache_of(shape, 16, "LBNHC")
        self.ends = [0] * len(tokens.keys)

    def blocks(self, request: int) -> list[int]:
        return [1 + request * 4 + n for n in (2, 0, 3, 1)]

    def common(
        self, *scheduled: tuple[int, int, bool], padding: int = 0
    ) -> tuple[Common, Tensor, Tensor, Tensor]:
        """Of `(request, tokens, of a prompt)` and rows that have no tokens; the tokens are in the cache."""
        rows, parts = [], []
        for request, count, prompt in scheduled:
            begin, self.ends[request] = self.ends[request], self.ends[request] + count
            end = self.ends[request]
            rows.append(Row(count, end, self.blocks(request)[: -(-end // PAGE)], prompt, request))
            held = self.tokens.queries, self.tokens.keys, self.tokens.values
            parts.append([x[request, :, begin:end].transpose(0, 1) for x in held])
            for position in range(begin, end):
                at = self.blocks(request)[position // PAGE], slice(None), position % PAGE
                self.cache[at] = torch.cat([x[request, :, position] for x in held[1:]], -1)
        query, key, value = (torch.cat(part) for part in zip(*parts, strict=True))
        return describe(rows, PAGE, padding=padding), query, key, value

    def step(self, *scheduled: tuple[int, int, bool], padding: int = 3) -> Tensor:
        """The outputs `[T, Hq, D]`; as under a graph there are more tokens than the step has."""
        common, *given = self.common(*scheduled)
        query, key, value = (
            torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)]) for x in given
        )
        output = torch.full_like(query, torch.nan)
        metadata = self.builder.build(0, common)
        self.layer.forward(None, query, key, value, self.cache, metadata, output)
        assert output[-padding:].isnan().all()
        return output[:-padding]

    def expected(self, request: int, begin: int, end: int) -> Tensor:
        """Full attention of some tokens of a request."""
        found = []
        for token in range(begin, end):
            entries = Entries(
                *(
                    x[request : request + 1, :, : token + 1]
                    for x in (self.tokens.keys, self.tokens.values)
                )
            )
            query = self.tokens.queries[request : request + 1, :, token]
            found.append(reference.attend(query, entries, AttendOptions(scale=DIM**-0.5)).output[0])
        return torch.stack(found)
