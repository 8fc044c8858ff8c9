"""`refreshkv generate --explain`: which mode is the fastest for a model and a prompt, by the bytes that a token moves.

Decoding is bound by memory: a step reads every weight and the KV entries that it attends to. The lossless mode reads
the weights a little more often than once a token and the full cache once in several tokens; the lossy mode reads the
weights once and a share of the cache. How often and how much is measured on the bundled model (docs/fidelity.md), so
this is an estimate for any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refreshkv.bench.common import weight_bytes
from refreshkv.config import RefreshConfig, make_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The means over the three tasks of docs/fidelity.md, 2,048 tokens.
EXACT_PASSES = 1.06  # forward passes a token
EXACT_TOKENS = 10.0  # tokens a full pass
FAST_FULL = 0.08  # share of the full cache that full steps of the preset "fast" read, beside the partial cache


@dataclass(frozen=True)
class Estimate:
    """Bytes that one token moves in one mode."""

    mode: str
    weights: float
    cache: float

    @property
    def total(self) -> float:
        """Bytes a token."""
        return self.weights + self.cache


def estimates(model: PreTrainedModel, prompt_tokens: int) -> list[Estimate]:
    """Full attention, the lossless mode and the preset "fast", for one row."""
    weights, cache = float(weight_bytes(model)), float(cache_bytes(model, prompt_tokens))

    def partial(config: RefreshConfig) -> float:
        return min(1.0, config.resolve_budget(prompt_tokens) / prompt_tokens)

    exact = EXACT_PASSES * partial(make_config()) + 1 / EXACT_TOKENS
    fast = partial(make_config("fast")) + FAST_FULL
    return [
        Estimate("full", weights, cache),
        Estimate("exact", EXACT_PASSES * weights, min(1.0, exact) * cache),
        Estimate("fast", weights, min(1.0, fast) * cache),
    ]


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the KV entries of the layers that RefreshKV serves, for `tokens` tokens of one row."""
    from refreshkv.integrations.transformers import RefreshCache
    from refreshkv.integrations.transformers.cache import RefreshLayer

    config = model.config.get_text_config(decoder=True)
    cache = RefreshCache(model.config, make_config("paper-llama"))
    served = sum(isinstance(layer, RefreshLayer) for layer in cache.layers)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return served * heads * 2 * dim * model.dtype.itemsize * tokens


def lines(model: PreTrainedModel, prompt_tokens: int) -> list[str]:
    """What `--explain` prints."""
    found = estimates(model, prompt_tokens)
    full = found[0]
    rows = [
        f"  {one.mode:6} {_size(one.weights):>9} of weights + {_size(one.cache):>9} of KV cache"
        f" a token: {full.total / one.total:.2f}x full attention"
        for one in found
    ]
    best = min(found, key=lambda one: one.total)
    exact = found[1]
    # exact <= full where the KV bytes it saves outweigh the weights it reads again.
    saved = 1 - exact.cache / full.cache
    even = (EXACT_PASSES - 1) * full.weights / (saved * full.cache / prompt_tokens)
    return [
        f"By bytes, for a prompt of {prompt_tokens} tokens, one row (an estimate, docs/fidelity.md):",
        *rows,
        f"  fastest: {best.mode}; exact is ahead of full from {even:,.0f} tokens of all rows together",
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
