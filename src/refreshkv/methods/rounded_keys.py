"""Top-K of every step by keys of a few bits: a second, small copy of the keys is read to find what to attend to."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.methods.kept import KeptEntries, mask_of
from refreshkv.methods.method import Method
from refreshkv.step import Attention, over_heads

_ENTRY = 32  # bits of a dimension of an entry: key and value of 16 each
_RANGE = 32  # bits that the least component and the step of a rounded key take


class RoundedKeys(KeptEntries):
    """The K tokens that the query weighs most by the rounded keys, the newest always; they are attended to exactly.

    Attributes:
        rounded: `[B, Hkv, L, D]`, what the copy gives back.
    """

    def __init__(self, config: RefreshConfig, layer: int, layers: int, *, bits: int) -> None:
        super().__init__(config, layer, layers)
        self.bits = bits
        self.rounded: Tensor | None = None

    def begin(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        self.reset()

    def crop(self, length: int) -> None:
        self.reset()

    def choose(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        keys = cache.store.keys
        if self.rounded is None:
            self.rounded = round_keys(keys, self.bits)
        else:
            self.rounded = torch.cat([self.rounded, round_keys(keys[:, :, -1:], self.bits)], 2)
        scores, _ = cache.backend.score(
            query,
            self.rounded,
            **attention.options(over_heads(visible)),
            reduction=self.config.group_reduction,
        )
        selection = cache.backend.select(
            scores, cache.budget, pool_kernel=1, visible=visible, recent=1
        )
        return mask_of(selection, cache.length)

    def overhead(self, cache: LayerCache) -> Tensor:
        """The copy of every visible token, as a share of an entry of 16 bits a number."""
        assert cache.hidden is not None
        dims = cache.store.keys.shape[-1]
        bits = (cache.length - cache.hidden) * (self.bits * dims + _RANGE)
        return (bits + _ENTRY * dims - 1) // (_ENTRY * dims)


def round_keys(keys: Tensor, bits: int) -> Tensor:
    """Each key `[..., D]` on a grid of `2**bits` values between its least and its greatest component."""
    exact = keys.float()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    unit = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return (low + ((exact - low) / unit).round() * unit).to(keys.dtype)


def _method(bits: int) -> Method:
    return Method(
        name=f"int{bits}-keys",
        label=f"top-K by {bits}-bit keys",
        source=(
            'ours; 4-bit keys for estimates are from Lin et al., "Twilight: Adaptive Attention Sparsity with'
            ' Hierarchical Top-p Pruning", arXiv 2502.02770'
        ),
        note=(
            f"Every step scores all tokens by a copy of the keys in {bits} bits a component (and a range a token), and"
            " attends to the K best. Counts K entries and the copy."
        ),
        uses=("budget", "group_reduction"),
        make=partial(RoundedKeys, bits=bits),
    )


INT4 = _method(4)
INT2 = _method(2)
