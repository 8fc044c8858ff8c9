"""Which models RefreshKV can serve, and the reason when it cannot."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Each is proven by the equalities in tests/integrations on a tiny random configuration.
PROVEN_ARCHITECTURES = (
    "Llama",
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Phi-3",
    "Gemma 2",
    "Gemma 3",
    "gpt-oss",
    "OLMo 2",
    "Mixtral",
)


class UnsupportedModelError(ValueError):
    """The architecture cannot run under RefreshKV; the message says why."""


class Support(NamedTuple):
    """Whether a model is supported; `reason` explains a no, or what to know about a yes (else empty)."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def supported(model: PreTrainedModel | PreTrainedConfig) -> Support:
    """Whether RefreshKV can serve a model. A configuration is enough: no weights are needed.

    Two things only a forward pass shows, and the cache then raises: keys that are changed between the cache and
    attention, and remote code that bypasses transformers' attention interface.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    model_class = type(model) if isinstance(model, PreTrainedModel) else _class_of(config)
    name = getattr(config, "model_type", None) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        return Support(False, f"{name} is an encoder-decoder; RefreshKV serves decoder-only models")
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "kv_lora_rank", None):
        reason = "multi-head latent attention (MLA), which has no KV cache per head to select from"
        return Support(False, f"{name} uses {reason}")
    if model_class is None:
        return Support(False, f"transformers has no causal language model for {name}")
    if not model_class.can_generate():
        return Support(
            False,
            f"{model_class.__name__} cannot generate; load the model with a language-model head",
        )
    if not _uses_attention_interface(model_class):
        return Support(False, f"{name} does not use transformers' attention interface")
    layers = DynamicCache(config=decoder).layers
    if any(type(layer) is DynamicLayer for layer in layers):
        return Support(True, "")
    if any(isinstance(layer, DynamicLayer) for layer in layers):
        return Support(True, f"{name} has no full-attention layer: RefreshKV leaves it as it is")
    return Support(False, f"{name} has no attention layer with a KV cache")


def exact_reason(config: PreTrainedConfig) -> str | None:
    """Why the lossless mode cannot serve a supported model; `None` where it can."""
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "num_kv_shared_layers", None):
        return "layers that attend to another layer's keys do not draft"
    if "chunked_attention" in (getattr(decoder, "layer_types", None) or ()) or getattr(
        decoder, "attention_chunk_size", None
    ):
        return "chunked attention cannot take a draft back"
    for layer in DynamicCache(config=decoder).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"a {type(layer).__name__} cannot take a draft back"
    return None


def rope_reason(config: PreTrainedConfig, first: int, last: int | None) -> str | None:
    """Why a text that grows from `first` tokens to `last` (`None`: no limit) cannot be drafted; `None` where it can.

    Where the RoPE of a pass depends on its last position, a pass over several tokens differs from one token a pass.
    """
    decoder = config.get_text_config(decoder=True)
    rope = getattr(decoder, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            border = parameters["original_max_position_embeddings"]
            crosses = first <= border and (last is None or last > border)
        else:
            border = decoder.max_position_embeddings
            crosses = "dynamic" in kind and (last is None or last > border)
        if crosses:
            return f"{kind} RoPE changes at {border} tokens"
    return None


def _uses_attention_interface(model_class: type[PreTrainedModel]) -> bool:
    return bool(getattr(model_class, "_supports_attention_backend", False))


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    mapping = AutoModelForCausalLM._model_mapping
    return mapping[type(config)] if type(config) in mapping else None
