"""Model shapes to time, with random weights: speed depends on the shape alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from refreshkv.config import check_names

if TYPE_CHECKING:
    from refreshkv.bench.job import Job

_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)
# Qwen3 normalises queries and keys; Qwen2 has biases on queries, keys and values.
SHAPES: dict[str, tuple[Any, ...]] = {
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "llama-3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "qwen3-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "qwen2-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "mistral-7b": ("mistral", 32768, 4096, 14336, 32, 32, 8, 128, False),
    "demo": ("llama", 512, 256, 512, 4, 4, 2, 64, True),
}


def config_of(shape: str) -> PreTrainedConfig:
    """The config of a shape.

    Raises:
        ValueError: an unknown shape, named with its nearest neighbour.
    """
    check_names("shape", [shape], SHAPES)
    return AutoConfig.for_model(
        **dict(zip(_FIELDS, SHAPES[shape], strict=True)),
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        sliding_window=None,  # Mistral has none since its version 0.2
    )


def random_states(job: Job, generator: torch.Generator, heads: int, tokens: int) -> Tensor:
    """Queries, keys or values of one layer, `[B, heads, tokens, D]`."""
    size = (job.batch, heads, tokens, config_of(job.shape).head_dim)
    return torch.randn(*size, generator=generator, device=job.device, dtype=job.dtype)


def outline(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights: sizes can be counted, nothing can be run."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@functools.lru_cache(maxsize=1)  # runs of several sizes share a model
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
