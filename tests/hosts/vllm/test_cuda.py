"""The backend for GPUs, laid over stand-ins of vLLM's FlashAttention.

What this cannot show is what FlashAttention and a GPU make of it. The interface is vLLM's (`test_surface`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm import refusals
from refreshkv.hosts.vllm.pages import PageShape
from refreshkv.hosts.vllm.serving import ServedMetadata
from refreshkv.kernels.operators import OPERATORS
from tests.helpers import Tokens, random_tokens
from tests.hosts.vllm.fakes import Row, describe, into_place
from tests.hosts.vllm.flash import (
    DIM,
    GROUP,
    HEADS,
    PAGE,
    Config,
    Fake,
    FlashAttentionBackend,
    FullAttentionSpec,
    Layout,
    Running,
    SlidingWindowSpec,
    faked,
)
from tests.tape import Tape


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with faked(monkeypatch) as made:
        yield made


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
    metadata = running.builder.build_for_cudagraph_capture(into_place(dummy, ends, table))
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
        scheduled = [(request, 1, False) for request in requests]
        common, own, *_ = running.common(*scheduled, padding=4 - len(requests))
        query.fill_(torch.nan)[: len(requests)] = own
        running.builder.build(0, into_place(common, ends, table))
        graph()
        for row, (request, begin) in enumerate(zip(requests, began, strict=True)):
            expected = running.expected(request, begin, begin + 1)
            torch.testing.assert_close(output[row : row + 1], expected, **close)
    assert [len(rows) for rows in running.layer.attended] == [2, 1]
    counts = running.builder.counter.collect()
    assert counts.rows == 29 * 2 + 1 + 30 * 3
    assert 0 < counts.read <= counts.available


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
