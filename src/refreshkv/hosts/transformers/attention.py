"""The attention and mask functions that transformers calls while a model is attached.

One pair is registered for each implementation that was active before (`refreshkv_sdpa`, `refreshkv_eager`, ...):
prefill, sliding layers and everything else that is not a decode step of ours goes to that implementation unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreshkv.hosts.transformers.regions import apart
from refreshkv.hosts.transformers.served import (
    IMPLEMENTATION_PREFIX,
    as_autocast,
    layer_of,
    masks_are_wanted,
    without_autocast,
)
from refreshkv.kernels.options import AttendOptions


def register(inner: str) -> str:
    """Make sure our functions around the implementation `inner` are registered; returns their name."""
    name = IMPLEMENTATION_PREFIX + inner.replace("/", "_").replace("|", "_")
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(refresh_attention, inner=inner))
        if (
            inner in ALL_MASK_ATTENTION_FUNCTIONS
        ):  # without a mask function, left padding would silently be ignored
            mask = partial(refresh_mask, inner=ALL_MASK_ATTENTION_FUNCTIONS[inner])
            AttentionMaskInterface.register(name, mask)
    return name


def refresh_mask(*args: Any, inner: Callable[..., Any], **kwargs: Any) -> Any:
    """The mask that the implementation below makes for itself, or none in a pass that needs none.

    Over positions that are not filled yet it is always made where layers share keys: Gemma 4 cuts the queries of such
    layers off, and sees that none may be left out by the name of the implementation, which is ours.
    """
    if not masks_are_wanted():
        return None
    config = kwargs.get("config")
    if getattr(config, "num_kv_shared_layers", None) and kwargs["kv_length"] > kwargs["q_length"]:
        kwargs["allow_is_causal_skip"] = False
    return inner(*args, **kwargs)


@apart
def refresh_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    inner: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers asks for it: a decode step of the layer's algorithm, or `inner`.

    Args:
        module: the attention layer.
        query: `[B, Hq, T, D]`, after RoPE and QK-norm.
        key, value: `[B, Hkv, L, D]`, what the cache's `update` returned.
        attention_mask: the mask of `inner`'s own mask function, or `None`.
        inner: the implementation that was active before `attach`.

    Returns:
        `[B, T, Hq, D]` and the attention weights (`None` in such a step).
    """
    layer = layer_of(key)
    if layer is not None:
        if layer_of(value) is not layer:
            raise RuntimeError(
                f"the values of layer {layer.index} are changed between the cache and attention: this architecture is"
                " not supported"
            )
        # The first to attend after an update owns the keys. Others may be handed them too (KV sharing, Gemma 3n): they
        # attend to them in full.
        if layer.current.awaiting is layer:
            layer.current.awaiting = None
            options = AttendOptions(
                scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
                # sdpa knows no softcap: older transformers drop it silently (and newer ones choose eager), and a decode
                # step must not disagree with the prefill of the same model.
                softcap=None if inner == "sdpa" else kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
            ours = as_autocast(query)
            with without_autocast(query.device):
                output = layer.attend(ours, options, attention_mask)
            if output is not None:
                # Contiguous, as every implementation of transformers leaves it: a model may call `view`.
                return output.transpose(1, 2).contiguous(), None
        else:
            layer.lend()
    run = implementation(inner, module)
    return run(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def implementation(inner: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function called `inner`; "eager" is each modeling file's own."""
    if inner in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[inner]
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise RuntimeError(
        f"{type(module).__name__} has no attention function {inner!r}; choose attn_implementation='sdpa'"
    )
