"""Which models RefreshKV can serve, and the reason when it cannot."""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from refreshkv.hosts.transformers.versions import CACHE

# Each is proven by the equalities in tests/hosts on a tiny random configuration.
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


# What neither a class nor a configuration shows: these are left as they are. An unknown one raises in a forward pass.
_BESIDE_CACHE = {
    "diffllama": "changes the values between the cache and attention",
    "doge": "adds a bias of its own to attention",
    "jetmoe": "changes the keys between the cache and attention",
}


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

    What only a forward pass shows raises there: keys or values that are changed between the cache and attention, a bias
    added to attention, and remote code that bypasses transformers' attention interface.
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    model_class = type(model) if isinstance(model, PreTrainedModel) else _class_of(config)
    name = getattr(config, "model_type", None) or type(config).__name__
    reason = _refusal(config, model_class, name)
    if reason is not None:
        return Support(False, reason)
    beside = _BESIDE_CACHE.get(name)
    if beside is not None:
        return Support(True, f"{name} {beside}: RefreshKV leaves it as it is")
    layers = cache_layers(config)
    if any(type(layer) is DynamicLayer for layer in layers):
        return Support(True, "")
    if any(isinstance(layer, DynamicLayer) for layer in layers):
        plain = all(type(layer) is DynamicSlidingWindowLayer for layer in layers)
        has = (
            "no full-attention layer" if plain else "no full-attention layer without further state"
        )
        return Support(True, f"{name} has {has}: RefreshKV leaves it as it is")
    return Support(False, f"{name} has no attention layer with a KV cache")


def _refusal(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None, name: str
) -> str | None:
    """Why a model cannot be served at all; `None` where it depends on its layers."""
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; RefreshKV serves decoder-only models"
    # Not by `getattr`: a field that each layer has its own of raises.
    if config.get_text_config(decoder=True).__dict__.get("kv_lora_rank"):
        return f"{name} uses multi-head latent attention (MLA), which has no KV cache per head to select from"
    if model_class is None:
        return f"transformers has no causal language model for {name}"
    if not model_class.can_generate():
        return f"{model_class.__name__} cannot generate; load the model with a language-model head"
    if not _uses_attention_interface(model_class):
        return f"{name} does not use transformers' attention interface"
    if not model_class._supports_default_dynamic_cache():
        return f"{name} makes a cache of its own"
    try:
        layers = cache_layers(config)
    except (ValueError, AttributeError):  # of a draft model, whose keys are those of another
        return f"{name} cannot run without the model that it assists"
    for layer in layers:
        if type(layer).__module__.startswith("transformers.models."):
            return f"{name} has cache layers of its own ({type(layer).__name__})"
    return None


def cache_layers(config: PreTrainedConfig) -> list[Any]:
    """What transformers' growing cache for this model holds, an object a layer."""
    return DynamicCache(config=config.get_text_config(decoder=True)).layers


def may_serve(decoder: PreTrainedConfig, index: int) -> bool:
    """Whether a full-attention layer may be ours; one that attends to an image instead of the text (Mllama) may not."""
    images = getattr(decoder, "cross_attention_layers", None) or ()
    return decoder.model_type not in _BESIDE_CACHE and index not in images


def exact_reason(config: PreTrainedConfig) -> str | None:
    """Why the lossless mode cannot serve a supported model; `None` where it can."""
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "num_kv_shared_layers", None):
        return "layers that attend to another layer's keys do not draft"
    if "chunked_attention" in (getattr(decoder, "layer_types", None) or ()) or getattr(
        decoder, "attention_chunk_size", None
    ):
        return "chunked attention cannot take a draft back"
    if decoder.model_type in _BESIDE_CACHE:
        return f"{decoder.model_type} {_BESIDE_CACHE[decoder.model_type]}"
    # RecurrentGemma keeps it outside of the cache before 5.22.
    if "recurrent" in (getattr(decoder, "block_types", None) or ()):
        return "a recurrent state cannot take a draft back"
    if getattr(decoder, "cross_attention_layers", None):
        return "layers that attend to an image do not draft"
    for layer in cache_layers(config):
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
            border = getattr(decoder, "max_position_embeddings", None)
            crosses = "dynamic" in kind and (last is None or last > border)
        if crosses:
            return f"{kind} RoPE changes at {border} tokens"
    return None


def _uses_attention_interface(model_class: type[PreTrainedModel]) -> bool:
    """As the class says; where none says anything, every attention layer of its file that updates a cache does."""
    for cls in model_class.__mro__:
        if cls is not PreTrainedModel and "_supports_attention_backend" in vars(cls):
            return bool(vars(cls)["_supports_attention_backend"])
    here = model_class.__module__
    layers = [
        set(code.co_names)
        for cls in vars(sys.modules[here]).values()
        if isinstance(cls, type) and cls.__module__ == here and "forward" in vars(cls)
        if (code := inspect.unwrap(cls.forward).__code__) and CACHE in code.co_varnames
        if {"update", "layer_idx"} <= set(code.co_names)
    ]
    return bool(layers) and all("ALL_ATTENTION_FUNCTIONS" in names for names in layers)


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    return None


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model that a PEFT model wraps; any other wrapper is refused, with what to attach instead."""
    if isinstance(model, PreTrainedModel):
        return model
    base = getattr(model, "get_base_model", None)
    base = base() if callable(base) else None
    if isinstance(base, PreTrainedModel):
        return base
    inside = (name for name in ("module", "_orig_mod", "model") if _holds_model(model, name))
    remedy = "".join(f"; attach its .{name}" for name in inside)
    raise UnsupportedModelError(
        f"attach needs a transformers PreTrainedModel, got {type(model).__name__}{remedy}"
    )


def _holds_model(wrapper: Any, name: str) -> bool:
    return isinstance(getattr(wrapper, name, None), PreTrainedModel)
