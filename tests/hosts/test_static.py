"""`generate(cache_implementation="static")`: the same tokens from buffers of fixed size, eagerly and compiled."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.generation import CompileConfig

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.hosts.transformers.static import StaticRefreshCache

from .prompts import NEW, greedy, left_padded, refreshed, tokens
from .test_equalities import EVERY_OPTION, OURS

RAGGED = [50, 37, 21]
STATIC = {"cache_implementation": "static"}
OURS_WITHOUT_TRIGGER = {name: OURS[name] for name in ("recent", "successor", "window", "anchor")}
CONFIGS = {
    "published": RefreshConfig(budget=8, stride=3, threshold=0.5),
    "fixed stride": RefreshConfig(budget=0.25, stride=3, threshold=None),
    "every option": EVERY_OPTION,
    "full": RefreshConfig(mode="full"),
}


def compiled(backend: str = "eager") -> dict[str, Any]:
    """What makes `generate` compile on a CPU as it does on a GPU, and fail where there is more than one graph."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_tokens_are_those_of_the_growing_cache(
    model: PreTrainedModel, config: RefreshConfig
) -> None:
    inputs = left_padded(RAGGED)
    grown, counts = counted(model, inputs, config)
    static, static_counts = counted(model, inputs, config, **STATIC)
    assert torch.equal(static, grown)
    assert static_counts == counts


@pytest.mark.parametrize("name", ["published", "every option"])
def test_compiled_there_is_one_graph_for_all_steps_and_calls(
    llama: PreTrainedModel, name: str
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with refreshkv.attach(llama, CONFIGS[name]):
        for seed in (0, 1):
            inputs = left_padded(RAGGED, seed)
            assert torch.equal(greedy(llama, inputs, **compiled()), greedy(llama, inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["published", "every option"])
def test_compiled_by_inductor(llama: PreTrainedModel, name: str) -> None:
    torch._dynamo.reset()
    inputs = left_padded(RAGGED)
    with refreshkv.attach(llama, CONFIGS[name]):
        assert torch.equal(greedy(llama, inputs, **compiled("inductor")), greedy(llama, inputs))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 3}])
def test_beams(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    inputs = left_padded(RAGGED[1:])
    config = CONFIGS["every option"]
    static = refreshed(llama, inputs, config, **options, **STATIC)
    assert torch.equal(static, refreshed(llama, inputs, config, **options))


def test_a_prompt_in_chunks(llama: PreTrainedModel) -> None:
    """The last chunk holds one token, which is no decode step."""
    ids, chunks = tokens(2, 49), {"prefill_chunk_size": 16}
    config = CONFIGS["every option"]
    grown = refreshed(llama, ids, config, **chunks)
    assert torch.equal(refreshed(llama, ids, config, **chunks, **STATIC), grown)


def test_a_loop_of_ones_own(llama: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    with refreshkv.attach(llama, CONFIGS["published"]) as session:
        expected = greedy(llama, ids, new=6)
        cache = session.new_static_cache(64)
        out, found = ids, []
        with torch.no_grad():
            for step in range(6):
                out = llama(input_ids=out, past_key_values=cache).logits[:, -1:].argmax(-1)
                found.append(out)
                if step == 0:
                    cache.begin_decoding()
    assert torch.equal(torch.cat(found, 1), expected)


def test_the_end_of_the_prompt_must_be_announced(llama: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    with refreshkv.attach(llama, CONFIGS["published"]) as session, torch.no_grad():
        cache = session.new_static_cache(64)
        llama(input_ids=ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="begin_decoding"):
            llama(input_ids=ids[:, :1], past_key_values=cache)


def test_what_has_no_static_form_says_so(llama: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    with (
        refreshkv.attach(llama, method="h2o") as session,
        pytest.raises(ValueError, match="'h2o' has no static cache"),
    ):
        session.new_static_cache(64)
    detached = StaticRefreshCache(llama.config, CONFIGS["published"], max_cache_len=64)
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs an attached model"):
        llama(input_ids=ids, past_key_values=detached)


def test_transformers_static_cache_is_refused(llama: PreTrainedModel) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with (
        refreshkv.attach(llama, CONFIGS["published"]),
        pytest.raises(ValueError, match="is a StaticCache"),
    ):
        greedy(llama, tokens(1, 40), past_key_values=cache)


EXACT = [
    RefreshConfig(mode="exact", budget=8, draft=5, confidence=0.0, **OURS_WITHOUT_TRIGGER),
    RefreshConfig(mode="exact", budget=0.5, draft=3, confidence=0.0),
]


@pytest.mark.parametrize("config", EXACT, ids=["every option", "plain"])
def test_lossless(model: PreTrainedModel, config: RefreshConfig) -> None:
    """Rows that keep different numbers of drafts; with windows it is full attention, and says so."""
    inputs = left_padded(RAGGED)
    grown, counts = counted(model, inputs, config)
    windows = getattr(model.config, "sliding_window", None)
    with pytest.warns(UserWarning, match="sliding-window") if windows else nullcontext():
        static, static_counts = counted(model, inputs, config, **STATIC)
    assert torch.equal(static, greedy(model, inputs)) and torch.equal(static, grown)
    assert windows or static_counts == counts


def test_lossless_there_are_two_graphs(llama: PreTrainedModel) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with refreshkv.attach(llama, EXACT[0]) as session:
        for seed in (0, 1):
            inputs = left_padded(RAGGED, seed)
            assert torch.equal(greedy(llama, inputs, **compiled()), greedy(llama, inputs))
    assert session.stats.drafts.drafted > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_lossless_sampling_draws_what_the_growing_cache_draws(llama: PreTrainedModel) -> None:
    inputs, drawn = left_padded(RAGGED), []
    with refreshkv.attach(llama, EXACT[1]):
        for options in ({}, STATIC):
            torch.manual_seed(3)
            drawn.append(llama.generate(**inputs, max_new_tokens=NEW, do_sample=True, **options))
    assert torch.equal(*drawn)


def test_lossless_beams_are_full_attention(llama: PreTrainedModel) -> None:
    inputs = left_padded(RAGGED[1:])
    with refreshkv.attach(llama, EXACT[0]), pytest.warns(UserWarning, match="beam search"):
        static = greedy(llama, inputs, num_beams=3, **STATIC)
    assert torch.equal(static, greedy(llama, inputs, num_beams=3))


def test_lossless_a_second_turn_on_the_cache(llama: PreTrainedModel) -> None:
    first, more = tokens(2, 40), tokens(2, 7, seed=9)
    turns = []
    for attached in (True, False):
        with refreshkv.attach(llama, EXACT[0]) if attached else nullcontext() as session:
            cache = session.new_static_cache(120) if attached else None
            options = {"past_key_values": cache} if attached else {}
            out = llama.generate(first, max_new_tokens=12, do_sample=False, **options)
            ids = torch.cat([out, more], 1)
            turns.append(llama.generate(ids, max_new_tokens=12, do_sample=False, **options))
    assert torch.equal(*turns)


def counted(
    model: PreTrainedModel, inputs: dict[str, Tensor], config: RefreshConfig, **options: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The new tokens and the statistics."""
    with refreshkv.attach(model, replace(config)) as session:
        return greedy(model, inputs, NEW, **options), session.stats.as_dict()
