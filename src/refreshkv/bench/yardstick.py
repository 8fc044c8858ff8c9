"""How far rounding alone takes a correct result: the unit in which errors of ours are counted.

A constant tolerance for each dtype cannot be right: roundings of 16-bit numbers add up from layer to layer, so two
correct computations of a deep model differ by more than a wrong one of a shallow model. So the truth is computed, of
the same weights, tokens, keys and values in a wider dtype throughout; and what transformers' own layers and attention
lose against it by rounding, at the very size and depth that are timed, is the unit. Ours may lose no more than
`checks.FACTOR` units, of the logits and, because an error of attention can drown in what the other parts of a model
round, also of what attention gives in each layer when all get the same input. Source: ours.

Memory: a copy of one decoder layer in the wider dtype, of one row's keys and values in it, and of the output head.
Letters: B batch, T tokens, H width of the model, V vocabulary, L context, Hkv KV heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from refreshkv.bench.checks import relative_rms
from refreshkv.hosts.transformers.versions import CACHE

# Keys and values of each layer, `[B, Hkv, L, D]`.
Held = Sequence[tuple[Tensor, Tensor]]
PACKED = "packed_sdpa"  # the attention of the truth
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Passed:
    """What a pass over `[B, T]` tokens gives.

    Attributes:
        logits: `[B, T, V]`.
        attended: of each layer, what its attention gives for the input that it was pinned to, `[B, T, H]`.
    """

    logits: Tensor
    attended: list[Tensor]

    def errors(self, truth: Passed) -> dict[str, float]:
        """Relative RMS of the logits, and of what attention gives in all layers."""
        return {
            "logits": relative_rms(self.logits, truth.logits),
            "attention": relative_rms(torch.stack(self.attended), torch.stack(truth.attended)),
        }


class Yardstick:
    """The truth of a pass over some tokens after the context, and what rounding costs.

    Args:
        model: one of `bench.shapes`; it may be attached.
        implementation: of attention that is not ours, as `Session.implementation_below` names it.
        held: the context, in the dtype of the model.
        tokens: `[B, T]`.

    Attributes:
        truth: in the wider dtype.
        inputs: of each layer `[B, T, H]`, what it gets in the truth, rounded to the dtype of the model.
        unit: what transformers loses in that dtype: relative RMS of `logits` and of `attention`.
    """

    def __init__(
        self, model: PreTrainedModel, implementation: str, held: Held, tokens: Tensor
    ) -> None:
        self.model, self.held, self.tokens = model, held, tokens
        self.inputs: list[Tensor] = []
        with self._attention(
            PACKED
        ):  # in the wider dtype keys that are repeated would take minutes
            self.truth = self._pass(WIDER[model.dtype])
        with self._attention(implementation):
            self.unit = self._pass(model.dtype).errors(self.truth)

    @contextmanager
    def pinned(self) -> Iterator[list[Tensor]]:
        """Inside, each layer of the model gets the input it has in the truth; what attention gives is listed."""
        given: list[Tensor] = []
        hooks = []
        for layer, pinned in zip(self.model.model.layers, self.inputs, strict=True):
            hooks += [
                layer.register_forward_pre_hook(lambda _, rest, one=pinned: (one, *rest[1:])),
                layer.self_attn.register_forward_hook(lambda *call: given.append(call[-1][0])),
            ]
        try:
            yield given
        finally:
            for hook in hooks:
                hook.remove()

    def _pass(self, dtype: torch.dtype) -> Passed:
        """The pass in another dtype. The first one decides on `inputs`."""
        decoder, length, count = self.model.model, self.held[0][0].shape[2], self.tokens.shape[1]
        places = torch.arange(length + count, device=self.tokens.device)
        # Of a single token all is visible, and needs no mask.
        mask = None if count == 1 else (places <= places[length:, None])[None, None]
        hidden = decoder.embed_tokens(self.tokens).to(dtype)
        about = {
            "attention_mask": mask,
            "position_embeddings": decoder.rotary_emb(hidden, position_ids=places[None, length:]),
        }
        attended: list[Tensor] = []
        for index, layer in enumerate(decoder.layers):
            if index == len(self.inputs):
                self.inputs.append(hidden.to(self.model.dtype))
            wide = _as(layer, dtype)
            pinned = wide.input_layernorm(self.inputs[index].to(dtype))
            rows, given = [], []
            # A row at a time: its keys and values are larger in the wider dtype.
            for row in range(len(hidden)):
                keys, values = (part[row : row + 1].to(dtype) for part in self.held[index])
                cache = {CACHE: _Row(keys, values)}
                rows.append(wide(hidden[row : row + 1], **about, **cache))
                given.append(wide.self_attn(pinned[row : row + 1], **about, **cache)[0])
            hidden = torch.cat(rows)
            attended.append(torch.cat(given))
        norm, head = (_as(part, dtype) for part in (decoder.norm, self.model.lm_head))
        return Passed(head(norm(hidden)), attended)

    @contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        """Inside, the model attends by one of transformers' implementations."""
        config = self.model.config
        attached = config._attn_implementation_internal
        config._attn_implementation_internal = implementation
        try:
            yield
        finally:
            config._attn_implementation_internal = attached


def _as(part: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The part itself, or a copy in another dtype, with the config it has now."""
    same = all(parameter.dtype == dtype for parameter in part.parameters())
    return part if same else copy.deepcopy(part).to(dtype)


def _packed(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """As transformers calls attention, `[B, Hq, T, D]` -> `[B, T, Hq, D]`; no key is repeated for a group of heads."""
    kv_heads, count = keys.shape[1], query.shape[2]
    packed = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    seen = None if mask is None else mask.repeat(1, 1, packed.shape[2] // count, 1)
    output = F.scaled_dot_product_attention(packed, keys, values, attn_mask=seen)
    return output.unflatten(2, (-1, count)).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(PACKED, _packed)


class _Row:
    """What attention needs of a cache: the keys and values of a row `[1, Hkv, L, D]`, and new ones behind them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.held = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Both; the next call gets the same without these."""
        old_keys, old_values = self.held
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
