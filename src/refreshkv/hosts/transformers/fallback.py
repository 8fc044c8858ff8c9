"""Calls of `generate` that the lossless mode cannot serve: they run as full attention, for a reason that is given."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from refreshkv.hosts.transformers.cache import RefreshCache
from refreshkv.hosts.transformers.processors import unserved
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.support import exact_reason, rope_reason
from refreshkv.hosts.transformers.versions import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES = (RefreshCache, StaticRefreshCache)
_SERVED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What our loop gives a pass itself, what `generate` gives the prompt's pass alone, and what no pass reads.
_CARRIED = {
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "inputs_embeds",
    "tokenizer",
    CACHE,
    *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL,
}
# How a model turns the arguments of `generate` into those of a pass, and carries them on. Ours come from neither.
_PREPARING = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
# Models whose own version gives a pass over new tokens nothing else.
_HARMLESS = {
    f"transformers.models.{name}.modeling_{name}" for name in ("gemma3", "gemma4", "phi3", "phimoe")
}


def say_full(mode: str, reason: str) -> None:
    """One warning for one call of `generate`."""
    warnings.warn(f"mode={mode!r} runs as full attention: {reason}", stacklevel=3)


def full_reason(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    limit: int | None,
    model_kwargs: dict[str, Any],
    synced_gpus: bool = False,
) -> str | None:
    """Why this call cannot draft; `None` where it can."""
    mode = config.get_generation_mode()
    if mode not in _SERVED:
        return f"{mode.value.replace('_', ' ')} does not draft"
    if synced_gpus:
        return "processes that keep in step (ZeRO-3, FSDP) cannot draft each its own"
    if getattr(model, "_is_stateful", False):
        return "a recurrent state cannot take a draft back"
    reason = exact_reason(model.config) or _inputs_reason(model, model_kwargs)
    if reason is not None:
        return reason
    cache = model_kwargs[CACHE]
    if isinstance(cache, StaticRefreshCache) and len(cache.served) < len(cache.layers):
        return "over a static cache its sliding-window layers cannot take a draft back"
    positions = model_kwargs.get("position_ids")
    if positions is None:
        return "the model takes no position_ids"
    first = int(positions.max()) + 1
    last = None if limit is None else first + limit - input_ids.shape[1] - 1
    return unserved(processors, len(input_ids)) or rope_reason(model.config, first, last)


def _inputs_reason(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> str | None:
    """Why passes over drafts would not get what `generate` gives each of its own."""
    for name in _PREPARING:
        method = getattr(model, name)
        function = getattr(method, "__func__", method)
        if function is not getattr(GenerationMixin, name) and function.__module__ not in _HARMLESS:
            return f"{type(model).__name__} has a {name} of its own"
    for name, value in model_kwargs.items():
        if name not in _CARRIED and value is not None and value is not False:
            return f"drafts do not carry the argument {name!r}"
    return None
