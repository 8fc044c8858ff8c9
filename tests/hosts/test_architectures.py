"""Every architecture that transformers generates text with: refused for a reason, or the text of vanilla."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

from . import architectures
from .prompts import left_padded, tokens

NEW = 24
LENGTH = 70
PROMPTS = {"plain": [LENGTH, LENGTH], "padded": [LENGTH - 11, LENGTH]}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}
# Nothing is left out in any of them.
MODES = {
    "full": RefreshConfig(mode="full"),
    "refresh": RefreshConfig(budget=1000, stride=3, threshold=0.9),
    "mixed": RefreshConfig(mode="mixed", budget=1000),
    "exact": RefreshConfig(mode="exact", budget=24, window=4, recent=2, draft=6, confidence=0.0),
}
# Each stands for a kind that went wrong once; all others are slow tests.
KINDS = {
    "afmoe",  # calls `view` on what attention returns
    "bamba",  # says nothing of the attention interface, which it uses
    "diffllama",  # changes its values after the cache
    "doge",  # adds a bias to attention
    "gemma4_text",  # asks for the name of the attention implementation
    "hrm_text",  # runs a layer several times a pass
    "jetmoe",  # changes its keys after the cache
    "lfm2",  # cache layers without a length
    "minimax",  # a cache of its own
    "mllama",  # layers that attend to an image
    "paligemma",  # positions of its own making
    "recurrent_gemma",  # a recurrent state
}
EVERY = [
    name if name in KINDS else pytest.param(name, marks=pytest.mark.slow)
    for name in architectures.TYPES
]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """A static cache would have the model compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_types_of_a_newer_transformers_are_none_of_an_older() -> None:
    assert {"llama", "qwen3", "gemma3_text"} <= set(architectures.TYPES)


@pytest.mark.parametrize("model_type", EVERY)
def test_a_configuration_is_enough(model_type: str) -> None:
    try:
        config = architectures.CONFIG_MAPPING[model_type]()
    except Exception as error:
        pytest.skip(f"transformers has no default configuration: {error}")
    support = refreshkv.supported(config)
    assert support.ok or support.reason


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model_type", EVERY)
def test_refused_or_the_same_text(model_type: str, cache: str, mode: str) -> None:
    model = _model(model_type)
    support = refreshkv.supported(model)
    if not support.ok:
        assert support.reason
        return
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that the lossless mode runs as full attention is no failure
        for prompt in PROMPTS:
            expected = _vanilla(model_type, prompt, cache)
            with refreshkv.attach(model, MODES[mode]) as session:
                ours = _text(model, prompt, cache)
            assert session.stats.layers or support.reason, "no layer is served, for no reason"
            assert torch.equal(ours[0], expected[0]), f"{prompt}: other tokens"
            # A tiny model may repeat one token whatever it attends to; its logits do not.
            torch.testing.assert_close(ours[1], expected[1], rtol=0, atol=2e-3)


def _text(model: PreTrainedModel, prompt: str, cache: str) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and their logits in standard deviations."""
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    lengths = PROMPTS[prompt]
    if prompt == "plain":
        ids = tokens(len(lengths), LENGTH)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        inputs = left_padded(lengths)
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options, **CACHES[cache])
    logits = torch.stack(out.logits).float()
    return out.sequences, logits / logits.std()


@lru_cache(maxsize=1)
def _model(model_type: str) -> PreTrainedModel:
    try:
        return architectures.build(model_type)
    except Exception as error:
        pytest.skip(f"no tiny model in transformers {transformers.__version__}: {error}")


@lru_cache(maxsize=len(PROMPTS))
def _vanilla(model_type: str, prompt: str, cache: str) -> tuple[Tensor, Tensor]:
    try:
        text = _text(_model(model_type), prompt, cache)
    except Exception as error:
        pytest.skip(f"vanilla fails, {prompt}, over a {cache} cache: {error}")
    if not bool(text[1].isfinite().all()):
        pytest.skip("vanilla has no finite logits")
    return text
