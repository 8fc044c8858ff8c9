"""Calls of `generate` that the lossless mode cannot serve: they run as full attention, for a reason that is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import GenerationMode

from refreshkv.integrations.transformers.cache import RefreshCache
from refreshkv.integrations.transformers.processors import unserved
from refreshkv.integrations.transformers.static import StaticRefreshCache
from refreshkv.integrations.transformers.support import exact_reason, rope_reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHES = (RefreshCache, StaticRefreshCache)
_SERVED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def full_reason(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    mode: GenerationMode,
    limit: int | None,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why this call cannot draft; `None` where it can."""
    if mode not in _SERVED:
        return f"{mode.value.replace('_', ' ')} does not draft"
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, CACHES):
        return "no RefreshCache"
    if isinstance(cache, StaticRefreshCache) and len(cache.exact_layers) < len(cache.layers):
        return "over a static cache its sliding-window layers cannot take a draft back"
    positions = model_kwargs.get("position_ids")
    if positions is None:
        return "the model takes no position_ids"
    first = int(positions.max()) + 1
    last = None if limit is None else first + limit - input_ids.shape[1] - 1
    return (
        unserved(processors, len(input_ids))
        or rope_reason(model.config, first, last)
        or exact_reason(model.config)
    )
