"""The equalities on a GPU, in float32. Skipped where there is none; `make test-gpu` runs them alone."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.methods import METHODS

from ..conftest import build
from .prompts import greedy, left_padded, refreshed, tokens
from .test_graphs import CONFIGS as CAPTURED
from .test_graphs import LOSSLESS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize(
    "config",
    [
        RefreshConfig(budget=1000, stride=5, threshold=None),
        RefreshConfig(budget=4, stride=1, threshold=1.0),
        RefreshConfig(mode="full"),
    ],
    ids=["large budget", "S=1", "mode full"],
)
def test_full_attention_tokens(architecture: str, config: RefreshConfig) -> None:
    model = build(architecture).cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded([50, 37, 21]).items()}
    assert torch.equal(refreshed(model, inputs, config), greedy(model, inputs))


@pytest.mark.parametrize("decide", ["layer", "head"])
def test_a_batch_equals_its_rows_alone(decide: str) -> None:
    model, lengths = build("llama").cuda(), [50, 37, 21]
    inputs = {name: tensor.cuda() for name, tensor in left_padded(lengths).items()}
    config = RefreshConfig(budget=0.25, stride=2, threshold=0.5, decide=decide)  # type: ignore[arg-type]
    batch = refreshed(model, inputs, config)
    for row, length in enumerate(lengths):
        alone = refreshed(model, inputs["input_ids"][row : row + 1, -length:], config)
        assert torch.equal(batch[row], alone[0])


@pytest.mark.parametrize("name", METHODS)
def test_the_methods(name: str) -> None:
    """As on the CPU, with enough budget and with little."""
    inputs = left_padded([50, 37, 21])
    found = []
    for device in ("cpu", "cuda"):
        model = build("llama").to(device)
        there = {key: tensor.to(device) for key, tensor in inputs.items()}
        vanilla = greedy(model, there, new=12)
        for budget in (1000, 0.25):
            with refreshkv.attach(model, method=name, budget=budget) as session:
                given = greedy(model, there, new=12)
            assert budget == 0.25 or torch.equal(given, vanilla)
        found.append((given.cpu(), session.stats.as_dict()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


STATIC = {
    "published": RefreshConfig(budget=8, stride=3, threshold=0.5),
    "lse-drop": refreshkv.make_config("lse-drop"),
    "mixed": refreshkv.make_config("fast"),
    "lossless": refreshkv.make_config("default"),
}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("name", STATIC)
def test_the_static_form_in_cuda_graphs(architecture: str, name: str) -> None:
    """transformers compiles the forward pass with `reduce-overhead`; the tokens are those of the growing cache."""
    model = build(architecture).cuda()
    inputs = {key: tensor.cuda() for key, tensor in left_padded([90, 70, 21]).items()}
    config = replace(STATIC[name], budget=8)
    if name == "lossless" and architecture != "llama":
        pytest.skip("windows: it runs as full attention")
    grown = refreshed(model, inputs, config)
    assert torch.equal(refreshed(model, inputs, config, cache_implementation="static"), grown)


def test_decoding_in_the_static_form_allocates_nothing_that_stays() -> None:
    model = build("llama").cuda()
    ids = tokens(2, 64).cuda()
    with refreshkv.attach(model, STATIC["published"]) as session, torch.no_grad():
        cache = session.new_static_cache(128)
        out = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.begin_decoding()
        held = []
        for _ in range(20):
            out = model(input_ids=out, past_key_values=cache).logits[:, -1:].argmax(-1)
            held.append(torch.cuda.memory_allocated())
    assert len(set(held[3:])) == 1


def test_a_step_in_the_static_form_never_waits() -> None:
    model = build("llama").cuda()
    ids = tokens(2, 64).cuda()
    with refreshkv.attach(model, STATIC["published"]) as session, torch.no_grad():
        cache = session.new_static_cache(128)
        out = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.begin_decoding()
        for step in range(8):
            if step == 4:  # kernels are compiled by now
                torch.cuda.set_sync_debug_mode("error")
            try:
                out = model(input_ids=out, past_key_values=cache).logits[:, -1:].argmax(-1)
            except RuntimeError:
                torch.cuda.set_sync_debug_mode("default")
                raise
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*CAPTURED, *LOSSLESS])
def test_generate_by_graphs(name: str, padded: bool) -> None:
    """What the tapes of `test_graphs.py` stand for; a warning that it decodes without graphs is an error."""
    model = build("llama").cuda()
    inputs = left_padded([90, 70, 21]) if padded else {"input_ids": tokens(2, 90)}
    inputs = {key: tensor.cuda() for key, tensor in inputs.items()}
    config = {**CAPTURED, **LOSSLESS}[name]
    with refreshkv.attach(model, config, graphs=False):
        expected = greedy(model, inputs, new=40)
    with warnings.catch_warnings(), refreshkv.attach(model, config) as session:
        warnings.filterwarnings("error", message="decoding without CUDA graphs")
        for _ in range(2):
            assert torch.equal(greedy(model, inputs, new=40), expected)
    assert session.stats.layers


@pytest.mark.parametrize("config", [CAPTURED["published"], LOSSLESS["default"]])
def test_generate_by_graphs_of_compiled_layers(config: RefreshConfig) -> None:
    model = build("llama").cuda()
    ids = tokens(2, 90).cuda()
    with refreshkv.attach(model, config, graphs=False):
        expected = greedy(model, ids)
    with refreshkv.attach(model, config, compiled=True):
        assert torch.equal(greedy(model, ids), expected)
