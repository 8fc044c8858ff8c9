"""Model shapes to time, with random weights: speed depends on the shape alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from refreshkv.config import unknown

_LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_LLAMA_1B = {
    **_LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_QWEN3_8B = {
    **_LLAMA_8B,
    "model_type": "qwen3",  # normalises queries and keys
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
}
_QWEN2_7B = {
    **_LLAMA_8B,
    "model_type": "qwen2",  # biases on queries, keys and values
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_MISTRAL_7B = {
    **_LLAMA_8B,
    "model_type": "mistral",
    "vocab_size": 32768,
    "sliding_window": None,  # since version 0.2
}
_DEMO = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.2-1b": _LLAMA_1B,
    "qwen3-8b": _QWEN3_8B,
    "qwen2-7b": _QWEN2_7B,
    "mistral-7b": _MISTRAL_7B,
    "demo": _DEMO,
}


def config_of(shape: str) -> PreTrainedConfig:
    """The config of a shape.

    Raises:
        ValueError: an unknown shape, named with its nearest neighbour.
    """
    if shape not in SHAPES:
        raise ValueError(unknown("shape", shape, SHAPES))
    return AutoConfig.for_model(
        **SHAPES[shape],
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def outline(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights: sizes can be counted, nothing can be run."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def build(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the given shape with small random weights, in eval mode.

    Raises:
        ValueError: an unknown shape.
    """
    # transformers' own initialisation takes minutes for a billion weights.
    config = config_of(shape)
    model = outline(config, dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.uniform_(parameter, -0.03, 0.03, generator=generator)
    rotary = model.model.rotary_emb  # a buffer that no checkpoint holds
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model.eval()
