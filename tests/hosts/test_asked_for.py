"""What `generate` was asked for is given, or refused with a remedy that works: weights, no cache, static caches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

from ..conftest import build
from .prompts import greedy, left_padded, tokens

LOSSY = RefreshConfig(budget=8, stride=3, threshold=None)
PROMPT = left_padded([30, 17])
WEIGHTS = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 4}
STATIC = {"cache_implementation": "static"}


def weights(model: PreTrainedModel, **options: Any) -> list[list[torch.Tensor]]:
    """The attention weights of every step and layer."""
    return [list(step) for step in model.generate(**PROMPT, **WEIGHTS, **options).attentions]


@pytest.mark.parametrize("form", [{}, STATIC], ids=["growing", "static"])
@pytest.mark.parametrize("mode", ["refresh", "exact", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_attention_weights_of_every_layer(
    architecture: str, mode: str, form: dict[str, Any]
) -> None:
    model = build(architecture)
    model.set_attn_implementation("eager")
    vanilla = weights(model, **form)
    with warnings.catch_warnings(record=True) as said, refreshkv.attach(model, mode=mode):
        ours = weights(model, **form)
    assert [len(step) for step in ours] == [len(step) for step in vanilla]
    for step, expected in zip(ours, vanilla, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(step, expected, strict=True))
    messages = [str(w.message) for w in said if "runs as full attention" in str(w.message)]
    assert len(messages) == (mode != "full")


def test_weights_where_they_would_not_be_the_methods_own(llama: PreTrainedModel) -> None:
    """A cache of ours has none, and a method that is measured must not be another in silence."""
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    message = "output_attentions=True needs full attention"
    with refreshkv.attach(llama, LOSSY) as session, pytest.raises(ValueError, match=message):
        greedy(llama, tokens(1, 20), past_key_values=session.new_cache(), **asked)
    message += ": leave it out, or attach mode='full'"
    with refreshkv.attach(llama, method="snapkv"), pytest.raises(ValueError, match=message):
        greedy(llama, tokens(1, 20), **asked)


@pytest.mark.parametrize("where", ["argument", "configuration"])
def test_no_cache_where_the_output_is_that_of_full_attention(
    llama: PreTrainedModel, where: str
) -> None:
    ids = tokens(1, 20)
    options = {"use_cache": False} if where == "argument" else {}
    llama.generation_config.use_cache = where == "argument"
    try:
        vanilla = greedy(llama, ids, **options)
        with refreshkv.attach(llama), pytest.warns(UserWarning, match="use_cache=False was asked"):
            assert torch.equal(greedy(llama, ids, **options), vanilla)
        with refreshkv.attach(llama, mode="full"):
            assert torch.equal(greedy(llama, ids, **options), vanilla)
        with refreshkv.attach(llama, LOSSY), pytest.raises(ValueError, match="mode='full'"):
            greedy(llama, ids, **options)
    finally:
        llama.generation_config.use_cache = True


@pytest.fixture(params=["argument", "configuration", "both"])
def static(llama: PreTrainedModel, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The ways to ask for a static cache: the options of a call."""
    if request.param != "argument":
        llama.generation_config.cache_implementation = "static"
    yield {} if request.param == "configuration" else STATIC
    llama.generation_config.cache_implementation = None


@pytest.mark.parametrize("mode", ["refresh", "exact", "full"])
def test_a_static_cache_however_it_is_asked_for(
    llama: PreTrainedModel, static: dict[str, Any], mode: str
) -> None:
    options = {"return_dict_in_generate": True, "max_new_tokens": 6, **static}
    assert type(llama.generate(tokens(1, 20), **options).past_key_values).__name__ == "StaticCache"
    with refreshkv.attach(llama, mode=mode):
        cache = llama.generate(tokens(1, 20), **options).past_key_values
    assert type(cache).__name__ == "StaticRefreshCache"


def test_a_cache_that_is_given_counts_more_than_a_configured_one(llama: PreTrainedModel) -> None:
    llama.generation_config.cache_implementation = "static"
    try:
        with refreshkv.attach(llama, LOSSY) as session:
            cache = session.new_cache()
            greedy(llama, tokens(1, 20), past_key_values=cache)
        assert cache.get_seq_length() > 20
    finally:
        llama.generation_config.cache_implementation = None


def test_a_static_cache_of_the_lossless_mode_has_room_for_drafts(llama: PreTrainedModel) -> None:
    with refreshkv.attach(llama) as session:
        assert session.new_static_cache(64).layers[0].max_cache_len == 64 + session.config.draft + 1
        assert "draft + 1` positions longer" in type(session).new_static_cache.__doc__


LFM2 = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.mark.filterwarnings("ignore:mode='exact' runs as full attention")
@pytest.mark.parametrize("mode", ["refresh", "exact", "full"])
@pytest.mark.parametrize("form", [{}, STATIC], ids=["growing", "static"])
def test_layers_without_keys_beside_ours(mode: str, form: dict[str, Any]) -> None:
    """Convolutions keep a state of their own, which has no length."""
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**LFM2)).eval()
    ids = tokens(2, 30)
    vanilla = greedy(model, ids, **form)
    with refreshkv.attach(model, mode=mode, budget=1000) as session:
        assert torch.equal(greedy(model, ids, **form), vanilla)
    assert sorted(session.stats.layers) == [1, 3]
