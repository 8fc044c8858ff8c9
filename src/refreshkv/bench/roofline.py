"""The byte model: what a token of each mode reads, and how many times faster than full attention that can make it.

Decoding is bound by memory: a pass reads every weight once, and the keys and values that it attends to. What a mode
reads for a token is therefore a number of passes and a number of cache entries; everything else here is their sum.
Letters: L context, K budget, S stride, s drafts of a cycle. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refreshkv.config import BLOCK, GRID_BITS, RefreshConfig, make_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Means over the three tasks of docs/fidelity.md at 2,048 tokens: what the modes did on the bundled model.
DRAFT = 10  # tokens that the default preset drafts in a cycle
ACCEPTANCE = 0.93  # share of them that stands


def mean(partial: float, full: float, stride: int | None) -> float:
    """The mean of a mix, one full step in `stride` and the others partial; `None`: no full step."""
    share = 0.0 if stride is None else 1 / stride
    return (1 - share) * partial + share * full


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: `weights` that a pass reads, `entry` for K and V of one token of one row, `stored` weights.

    `itemsize` is that of a number of the cache.
    """

    weights: int
    entry: int
    stored: int
    itemsize: int = 2

    @property
    def codes(self) -> float:
        """Bytes of one token of one row in the rounded copy of the preset "fast", its share of the grids included."""
        config = make_config("fast")
        bits = config.key_bits + config.value_bits + 2 * GRID_BITS / BLOCK
        return self.entry * bits / (2 * 8 * self.itemsize)


@dataclass(frozen=True)
class Reads:
    """What one token of each row reads: the weights `passes` times (shared by the rows), `entries` of its own cache.

    `codes` are tokens that it reads in the rounded copy.
    """

    passes: float
    entries: float
    codes: float = 0

    def cache_bytes(self, sizes: Sizes) -> float:
        """Bytes of the cache of one row."""
        return self.entries * sizes.entry + self.codes * sizes.codes

    def bytes(self, sizes: Sizes, rows: int) -> float:
        """Bytes that a token of every row moves."""
        return self.passes * sizes.weights + rows * self.cache_bytes(sizes)

    def ms(self, sizes: Sizes, rows: int, bandwidth: float, fixed_ms: float) -> float:
        """Milliseconds of it: its bytes at `bandwidth` (a second), and what a pass costs beside them."""
        return self.passes * fixed_ms + self.bytes(sizes, rows) / bandwidth * 1e3


@dataclass(frozen=True)
class Load:
    """What the bytes of a token depend on, beside the model.

    Attributes:
        context: L, tokens in each of `batch` rows.
        budget: K; given as in `RefreshConfig`, in tokens afterwards.
        stride: S of the mix; `None` is partial steps only.
        draft, acceptance: drafts of a cycle of the lossless mode, and the mean share of them that stands, as
            `Stats.acceptance` counts it.

    Raises:
        ValueError: a number out of range.
    """

    context: int = 8192
    batch: int = 1
    budget: int | float = 0.125
    stride: int | None = 10
    draft: int = 8
    acceptance: float = 0.85

    def __post_init__(self) -> None:
        config = RefreshConfig(budget=self.budget, stride=self.stride)
        object.__setattr__(self, "budget", config.resolve_budget(self.context))
        if not 0 <= self.acceptance <= 1:
            share = "acceptance is a share of the drafts in [0, 1]"
            raise ValueError(f"{share}; got {self.acceptance!r}")

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens that a full pass of the lossless mode yields: the drafts that stand, and one of its own."""
        return 1 + self.draft * self.acceptance

    def modes(self) -> dict[str, Reads]:
        """What a token of each mode reads.

        "full" is full attention, ours or anybody's, and a full step (its scores are not in memory yet); "snapkv" an
        eviction method that keeps K entries, and a partial step; "mix" one full step in S, the others partial; "mixed"
        the mode: the rounded copy, K entries, and the newest block, which is half complete in the mean; "exact" the
        lossless mode: s partial steps and one full pass yield `tokens_per_pass` tokens.
        """
        context, kept = self.context, min(self.budget, self.context)
        tokens = self.tokens_per_pass
        return {
            "full": Reads(1, context),
            "snapkv": Reads(1, kept),
            "mix": Reads(1, mean(kept, context, self.stride)),
            "mixed": Reads(1, kept + BLOCK / 2, context),
            "exact": Reads((self.draft + 1) / tokens, (self.draft * kept + context) / tokens),
        }

    def bytes(self, sizes: Sizes) -> dict[str, float]:
        """Bytes that a token of every row moves, by mode."""
        return {mode: reads.bytes(sizes, self.batch) for mode, reads in self.modes().items()}


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes of a model in its own dtype, the cache's those of the layers that RefreshKV serves.

    The model may lie on the meta device.
    """
    from refreshkv.hosts.transformers import RefreshCache
    from refreshkv.hosts.transformers.cache import RefreshLayer

    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    # Of an input embedding of its own a pass reads a row a token, not all.
    own = head is None or head.weight is not table
    weights = stored - table.numel() * table.element_size() if own else stored
    layers = RefreshCache(model.config, RefreshConfig()).layers
    served = sum(isinstance(layer, RefreshLayer) for layer in layers)
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = model.dtype.itemsize
    return Sizes(weights, served * heads * 2 * dim * itemsize, stored, itemsize)
