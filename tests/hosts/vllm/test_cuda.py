"""The backend for GPUs, laid over stand-ins of vLLM's FlashAttention that attend in plain torch on a CPU.

What this cannot show is what FlashAttention and a GPU make of it. The interface is vLLM's (`test_surface`).
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm import refusals
from refreshkv.hosts.vllm.pages import PageShape
from refreshkv.hosts.vllm.serving import ServedMetadata
from refreshkv.kernels import reference
from refreshkv.kernels.operators import OPERATORS
from refreshkv.kernels.options import AttendOptions, Entries
from tests.helpers import Tokens, random_tokens
from tests.hosts.vllm.fakes import CPU, Common, Row, cache_of, describe
from tests.tape import Tape

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


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
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

    def common(self, *scheduled: tuple[int, int, bool]) -> tuple[Common, Tensor, Tensor, Tensor]:
        """Of `(request, tokens, of a prompt)`; the tokens are in the cache."""
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
        return describe(rows, PAGE), query, key, value

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


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return random_tokens(rows=3, kv_heads=HEADS, group=GROUP, length=200, dim=DIM)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 512},
        {"mode": "full"},
        {"mode": "refresh", "stride": 1, "threshold": None},
        {"mode": "refresh", "budget": 512, "stride": None},
    ],
    ids=str,
)
def test_steps_of_prompts_and_decode_rows(
    fake: Fake, tokens: Tokens, settings: dict[str, Any]
) -> None:
    """Only prompts go to the stock kernels, and what comes out is full attention of every token."""
    running = Running(fake.told(**settings), tokens)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(running.step((0, 70, True)), running.expected(0, 0, 70), **close)
    mixed = running.step((0, 1, False), (1, 130, True), (2, 3, True))
    torch.testing.assert_close(mixed[:1], running.expected(0, 70, 71), **close)
    torch.testing.assert_close(mixed[1:131], running.expected(1, 0, 130), **close)
    torch.testing.assert_close(mixed[131:], running.expected(2, 0, 3), **close)
    apart = running.step((1, 5, True), (0, 1, False), (2, 1, True))  # prompts on both sides
    torch.testing.assert_close(apart[:5], running.expected(1, 130, 135), **close)
    torch.testing.assert_close(apart[5:6], running.expected(0, 71, 72), **close)
    torch.testing.assert_close(apart[6:], running.expected(2, 3, 4), **close)
    only = running.step((0, 1, False), (1, 1, False))
    torch.testing.assert_close(only[1:], running.expected(1, 135, 136), **close)
    assert running.layer.attended == [[70], [130, 3], [5, 1]]
    assert running.builder.counter.collect().rows == 4


@pytest.mark.parametrize(
    "settings", [{"budget": 512}, {"mode": "full"}, {"mode": "refresh", "budget": 512}], ids=str
)
def test_a_graph_of_the_whole_model(fake: Fake, tokens: Tokens, settings: dict[str, Any]) -> None:
    """Captured as vLLM does it, over rows that are nobody's; prompts between its steps, and padding behind them."""
    running = Running(fake.told(**settings, log_interval=0), tokens)
    running.layer.decoding.backend = OPERATORS
    dummy = describe([Row(1, 1, request=row) for row in range(4)], PAGE)
    query, key = torch.zeros(4, HEADS * GROUP, DIM), torch.zeros(4, HEADS, DIM)
    output, ends = torch.zeros_like(query), torch.zeros(4, dtype=torch.int32)
    table = torch.zeros(4, 4, dtype=torch.int32)

    def in_place(common: Common) -> Common:
        ends.copy_(common.seq_lens)
        table[:, : common.block_table_tensor.shape[1]] = common.block_table_tensor
        common.seq_lens, common.block_table_tensor = ends, table
        return common

    metadata = running.builder.build_for_cudagraph_capture(in_place(dummy))
    given = None, query, key, key, running.cache, metadata, output
    running.layer.forward(*given)  # vLLM warms up before
    graph = Tape().record(lambda: running.layer.forward(*given))
    assert running.builder.counter.total().rows == 0

    running.step((0, 70, True), (1, 130, True))
    close = {"rtol": 1e-4, "atol": 1e-5}
    for step in range(1, 60):
        if step == 30:  # in between a prompt, which is attended as without graphs
            running.step((0, 1, False), (2, 20, True))
        requests = (1, 0) if step < 30 else (2, 1, 0)
        began = [running.ends[request] for request in requests]
        common, own, *_ = running.common(*((request, 1, False) for request in requests))
        query.fill_(torch.nan)[: len(requests)] = own
        running.builder.build(0, in_place(padded(common, 4)))
        graph()
        for row, (request, begin) in enumerate(zip(requests, began, strict=True)):
            expected = running.expected(request, begin, begin + 1)
            torch.testing.assert_close(output[row : row + 1], expected, **close)
    assert [len(rows) for rows in running.layer.attended] == [2, 1]
    counts = running.builder.counter.collect()
    assert counts.rows == 29 * 2 + 1 + 30 * 3
    assert 0 < counts.read <= counts.available


def padded(common: Common, rows: int) -> Common:
    """With rows that have no tokens behind its own, as far as vLLM tells of them."""
    more = rows - common.num_reqs
    begins, blocks = common.query_start_loc_cpu, common.block_table_tensor
    return replace(
        common,
        query_start_loc_cpu=torch.cat([begins, begins[-1:].expand(more)]),
        seq_lens=torch.cat([common.seq_lens, common.seq_lens.new_zeros(more)]),
        block_table_tensor=torch.cat([blocks, blocks.new_zeros(more, blocks.shape[1])]),
        num_reqs=rows,
    )


def test_the_log_says_what_lists_take(
    fake: Fake, tokens: Tokens, capsys: pytest.CaptureFixture[str]
) -> None:
    Running(fake.told(mode="refresh", budget=0.5), tokens)
    fake.config.model_config.max_model_len = 2**20
    fake.config = Config(**vars(fake.config))
    fake.builder()
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("; lists of up to 256 positions for 4 requests take 0 MiB")
    assert said[1].endswith("; lists of up to 524,288 positions for 4 requests take 16 MiB")


def test_a_small_budget_reads_little(fake: Fake, tokens: Tokens) -> None:
    running = Running(fake.told(budget=4, skip=0.0), tokens)
    running.step((0, 140, True))
    ours, expected = running.step((0, 1, False))[0], running.expected(0, 140, 141)[0]
    assert not torch.allclose(ours, expected, atol=1e-3)
    counts = running.builder.counter.collect()
    assert counts.read <= (141 - 128 + 4) * HEADS < counts.available == 141 * HEADS


def test_a_layer_that_shares_a_cache_selects_for_itself(fake: Fake, tokens: Tokens) -> None:
    """And makes no codes: those of the layer that writes the cache are there."""
    running = Running(fake.told(budget=512, mode="refresh", stride=None), tokens, shares="another")
    running.step((0, 70, True))
    torch.testing.assert_close(
        running.step((0, 1, False)), running.expected(0, 70, 71), rtol=1e-4, atol=1e-5
    )
    running = Running(fake.told(budget=512), tokens, shares="another")
    running.step((0, 70, True))
    codes = running.layer.pages(running.cache).codes
    assert not any(part.any() for part in codes.tensors)


@pytest.mark.parametrize("layer", [{"sliding_window": 8}, {"attn_type": "encoder_only"}], ids=str)
def test_layers_of_another_kind_stay_with_the_stock_backend(
    fake: Fake, tokens: Tokens, layer: Any
) -> None:
    """Their cache has no codes, and their group's metadata is that of the stock builder."""
    spec = SlidingWindowSpec(sliding_window=8)
    assert fake.cuda.RefreshKVBackend.customize_spec(spec) is spec
    running = Running(fake, tokens)
    running.layer = fake.cuda.RefreshKVImpl(**layer, alibi=[1.0])
    running.builder = fake.builder(spec)
    running.step((0, 30, True))
    output = running.step((0, 1, False), (1, 4, True))
    torch.testing.assert_close(output[:1], running.expected(0, 30, 31), rtol=1e-4, atol=1e-5)
    assert running.layer.attended == [[30], [1, 4]]


def test_a_cache_that_vllm_drops_is_gone(fake: Fake, tokens: Tokens) -> None:
    """It has one for a trial before it knows how much memory is left; the next one is found as well."""
    running = Running(fake.told(budget=512), tokens)
    running.step((0, 70, True))
    trial = StorageWeakRef(running.cache.untyped_storage())
    running.cache = running.cache.new_zeros(0)
    assert trial.expired()
    other = Running(fake, tokens)
    running.cache, running.ends[0] = other.cache, 0
    running.step((0, 70, True))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(running.step((0, 1, False)), running.expected(0, 70, 71), **close)


def test_a_profiling_run(fake: Fake, tokens: Tokens) -> None:
    layer = fake.cuda.RefreshKVImpl()
    query = torch.ones(5, HEADS * GROUP, DIM)
    assert not layer.forward(None, query, query, query, torch.empty(0), None, query.clone()).any()


def test_what_vllm_asks_of_the_backend(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, builder = fake.cuda.RefreshKVBackend, fake.cuda.RefreshKVBuilder
    assert backend.get_name() == "CUSTOM" and backend.get_impl_cls() is fake.cuda.RefreshKVImpl
    assert backend.get_builder_cls() is builder
    assert builder.get_cudagraph_support(fake.config, FullAttentionSpec()) == "decode"
    assert builder.get_cudagraph_support(fake.config, SlidingWindowSpec()) == "ALWAYS"
    assert not backend.supports_batch_invariance()
    assert not backend.supports_device_cpu_query_lens_mismatch()
    assert not builder.supports_update_block_table and builder.reorder_batch_threshold == 1
    assert fake.builder().use_cascade_attention(1, num_sms=2) is False
    assert backend.supported_kv_cache_layouts() == (Layout.LBNHC, Layout.LBHNC, Layout.BLHNC)
    for told in ((), (FullAttentionSpec(),)):  # 0.30 tells nothing
        monkeypatch.setattr(FlashAttentionBackend, "sizes", ["multiples of 16"])
        assert backend.get_supported_kernel_block_sizes(*told) == ["multiples of 64"]
        monkeypatch.setattr(FlashAttentionBackend, "sizes", [128])
        assert backend.get_supported_kernel_block_sizes(*told) == [128]


def test_pages_have_room_for_the_codes_of_the_mode(fake: Fake) -> None:
    backend, spec = fake.cuda.RefreshKVBackend, FullAttentionSpec()
    fake.told(mode="full").cuda.RefreshKVImpl()
    assert backend.customize_spec(spec) is spec
    fake.told(key_bits=4, budget=8).cuda.RefreshKVImpl()
    wide = PageShape(
        HEADS, PAGE, (DIM, DIM), torch.float32, RefreshConfig(mode="mixed", budget=8, key_bits=4)
    )
    assert backend.customize_spec(spec).page_size_padded == wide.bytes


def test_what_is_refused(fake: Fake, tokens: Tokens) -> None:
    cuda = fake.cuda
    for layer, says in (({"head_size": 512}, "heads of 512 dims"), ({"alibi": [1.0]}, "ALiBi")):
        with pytest.raises(refusals.Refused, match=says):
            cuda.RefreshKVImpl(**layer)
    with pytest.raises(refusals.Refused, match="--disable-hybrid-kv-cache-manager"):
        fake.builder(FullAttentionSpec(sliding_window=8))
    fake.config.cache_config.cache_dtype = "fp8"
    with pytest.raises(refusals.Refused, match="--kv-cache-dtype"):
        cuda.RefreshKVImpl()
    fake.config.cache_config.cache_dtype = "auto"
    running = Running(fake, tokens)
    common, query, key, value = running.common((0, 4, True))
    with pytest.raises(refusals.Refused, match="another builder"):
        running.layer.forward(None, query, key, value, running.cache, common, query.clone())
    common.causal = torch.ones(1)
    with pytest.raises(refusals.Refused, match="not causal"):
        running.builder.build(0, common)


def test_the_first_model_runner_cannot_refresh_on_a_gpu(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not say which request a row is of; the mixed mode needs no such thing."""
    serving = "refreshkv.hosts.vllm.serving"
    monkeypatch.setattr(f"{serving}.Counter", lambda **given: None)
    monkeypatch.setattr(
        f"{serving}.Sorter", lambda page, config, planner, **_: SimpleNamespace(planner=planner)
    )
    fake.config.use_v2_model_runner = False
    gpu, given = torch.device("cuda"), (FullAttentionSpec(), ["0"], fake.config)
    with pytest.raises(refusals.Refused, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        fake.told(mode="refresh").cuda.RefreshKVBuilder(*given, gpu)
    fake.told(mode="mixed").cuda.RefreshKVBuilder(*given, gpu)
    fake.config.use_v2_model_runner = True
    fake.told(mode="refresh").cuda.RefreshKVBuilder(*given, gpu)


def test_images_keep_their_ranges_where_prompts_are_cut_out(fake: Fake, tokens: Tokens) -> None:
    running = Running(fake, tokens)
    running.step((0, 9, True))
    common, *_ = running.common((0, 1, False), (1, 6, True), (2, 7, True))
    common.mm_req_doc_ranges = {2: [(1, 3)]}
    metadata = running.builder.build(0, common)
    assert isinstance(metadata, ServedMetadata)
    (prompts,) = metadata.prompts
    assert prompts.stock.mm_req_doc_ranges == {1: [(1, 3)]}
    assert prompts.stock.req_idx.tolist() == [1, 2] and prompts.stock.max_query_len == 7
    assert prompts.tokens == slice(1, 14) and prompts.stock.seq_lens.tolist() == [6, 7]
