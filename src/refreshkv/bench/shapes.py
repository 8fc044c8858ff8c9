"""Model shapes to time, with random weights: speed depends on the shape alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refreshkv.config import unknown

_LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_DEMO = {
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
    "llama-3.2-1b": _LLAMA_1B,
    "llama-3.1-8b": _LLAMA_8B,
    "demo": _DEMO,
}


def build(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of the given shape with small random weights, in eval mode.

    Raises:
        ValueError: an unknown shape, named with its nearest neighbour.
    """
    if shape not in SHAPES:
        raise ValueError(unknown("shape", shape, SHAPES))
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    # transformers' own initialisation takes minutes for a billion weights.
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
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
