"""A forward pass of a transformers model in which the last tokens attend as decode steps; the loss of its two parts.

Seams, all documented by transformers: `AttentionInterface.register` and `AttentionMaskInterface.register`. The first
part of a sequence, layers with a sliding window and others that decoding leaves alone go to the implementation that
was active before. No state depends on the pass, so gradient checkpointing may run a layer twice.

Source: RefreshKV, section 6. Letters: B batch, T tokens, S in the tail, L = T - S, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from refreshkv.hosts.transformers.attention import implementation
from refreshkv.hosts.transformers.masks import newest_row
from refreshkv.hosts.transformers.served import (
    IMPLEMENTATION_PREFIX,
    as_autocast,
    without_autocast,
)
from refreshkv.hosts.transformers.support import (
    UnsupportedModelError,
    cache_layers,
    may_serve,
    supported,
    unwrapped,
)
from refreshkv.hosts.transformers.versions import check_version
from refreshkv.kernels.options import AttendOptions
from refreshkv.training.tail import Tail

_TAIL = "_refreshkv_tail"  # the attribute of an attention module that holds its `Tail`
_IMPLEMENTATION = "_attn_implementation_internal"


class Losses(NamedTuple):
    """Next-token losses in nats: the sum over the tokens each part predicts, and how many they are.

    first: predicted by the L tokens that attend causally; tail: by the others.
    """

    first: Tensor
    tail: Tensor
    first_tokens: int
    tail_tokens: int

    @property
    def mean(self) -> Tensor:
        """Over all tokens: what is trained."""
        return (self.first + self.tail) / (self.first_tokens + self.tail_tokens)


class PartialTail:
    """A context manager: while it holds, the model's passes over whole sequences have a tail.

        with PartialTail(model, Tail(50, RefreshConfig(budget=2048, stride=None))) as objective:
            losses = objective.losses(model(input_ids, use_cache=False).logits, input_ids)
            losses.mean.backward()

    Sequences are whole: no padding, no KV cache. The model may be wrapped (DDP, FSDP, PEFT, `torch.compile`) before or
    after. Backward passes belong inside too where gradients are checkpointed.

    Raises:
        UnsupportedModelError: a model that cannot be trained so, with the reason.
        RuntimeError: a transformers outside the tested range, or a model that is attached.
    """

    def __init__(self, model: nn.Module, tail: Tail) -> None:
        check_version()
        self.model, self.tail = unwrapped(model), tail
        support = supported(self.model)
        if not support.ok or support.reason:
            raise UnsupportedModelError(support.reason)
        self._decoder = self.model.config.get_text_config(decoder=True)
        self._before: str | None = None
        self._modules = _served_modules(self.model)
        if not self._modules:
            raise UnsupportedModelError(
                f"{self._decoder.model_type} does not number its attention layers: it cannot be trained with a tail"
            )

    def __enter__(self) -> PartialTail:
        before = getattr(self._decoder, _IMPLEMENTATION) or "eager"
        if before.startswith(IMPLEMENTATION_PREFIX):
            raise RuntimeError("this model is attached, or has a tail already; end that first")
        if before == "flex_attention":
            raise UnsupportedModelError(
                "a mask of flex_attention cannot be cut; load the model with attn_implementation='sdpa'"
            )
        self._before = before
        for module in self._modules:
            setattr(module, _TAIL, self.tail)
        setattr(self._decoder, _IMPLEMENTATION, _register(before))
        return self

    def __exit__(self, *exception: object) -> None:
        setattr(self._decoder, _IMPLEMENTATION, self._before)
        for module in self._modules:
            delattr(module, _TAIL)

    def losses(self, logits: Tensor, tokens: Tensor) -> Losses:
        """The loss of logits `[B, T, V]` on the tokens `[B, T]`."""
        return tail_losses(logits, tokens, self.tail.length)


def tail_losses(logits: Tensor, tokens: Tensor, tail: int) -> Losses:
    """As `PartialTail.losses`, for a tail of so many tokens. Raises `ValueError` where nothing would come before it."""
    rows, length = tokens.shape
    if length <= tail:
        raise ValueError(
            f"a sequence of {length} tokens has no tail of {tail}: give longer ones, or a shorter tail"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(wide), tokens[:, 1:].flatten(), reduction="none"
    ).unflatten(0, (rows, length - 1))
    first = length - tail
    parts = each[:, :first].sum(), each[:, first:].sum()
    return Losses(*parts, rows * first, rows * (length - 1 - first))


def _served_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of the layers whose decode steps are RefreshKV's; only their attention is ever asked."""
    decoder = model.config.get_text_config(decoder=True)
    served = {
        index
        for index, layer in enumerate(cache_layers(model.config))
        if type(layer) is DynamicLayer and may_serve(decoder, index)
    }
    return [
        module
        for module in model.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int) and index in served
    ]


def _register(inner: str) -> str:
    """Make sure our functions around the implementation `inner` are registered; returns their name."""
    name = f"{IMPLEMENTATION_PREFIX}train_{inner.replace('/', '_').replace('|', '_')}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention, inner=inner))
        if inner in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


def _attention(
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
    """Attention as transformers asks for it, `[B, Hq, T, D]` -> `[B, T, Hq, D]`: `inner`, and the tail after it."""
    run = implementation(inner, module)
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    tail: Tail | None = getattr(module, _TAIL, None)
    if tail is None:
        return run(module, query, key, value, attention_mask, **options)
    first = query.shape[2] - tail.length
    if query.shape[2] != key.shape[2]:
        raise RuntimeError("a pass with a tail has no KV cache: pass use_cache=False")
    if first < 1:
        raise ValueError(
            f"a sequence of {query.shape[2]} tokens has no tail of {tail.length}: give longer ones, or a shorter tail"
        )
    mask, positions = attention_mask, kwargs.get("position_ids")
    if mask is not None:
        # A bias, or another mask a head, is refused as in decoding; a compiled pass cannot look.
        if not torch.compiler.is_compiling() and not bool(newest_row(mask, key.shape[2]).all()):
            raise ValueError("a pass with a tail takes whole sequences: leave out the padding")
        mask = mask[:, :first] if mask.dim() == 2 else mask[..., :first, :first]
    if positions is not None:
        options["position_ids"] = positions[..., :first]
    output, _ = run(module, *(part[:, :, :first] for part in (query, key, value)), mask, **options)
    ours = AttendOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=None if inner == "sdpa" else kwargs.get("softcap"),  # as in decoding
        sinks=kwargs.get("s_aux"),
    )
    with without_autocast(query.device):
        states = (as_autocast(part) for part in (query, key, value))
        last = tail.attend(*states, ours, dropout)
    return torch.cat([output, last.transpose(1, 2).to(output.dtype)], 1), None
