"""Top-K of every step by keys of a few bits: a second, small copy of the keys is read to find what to attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refreshkv.config import Grouped, setting
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method

_ENTRY = 32  # bits of a dimension of an entry: key and value of 16 each
_RANGE = 32  # bits that the least component and the step of a rounded key take


@dataclass(frozen=True, kw_only=True)
class RoundedKeysSettings(Grouped):
    """Settings of the selection by rounded keys.

    Attributes:
        bits: of a component of a key in the copy.
    """

    bits: int = setting(4, "is a number of bits from 1 to 8", lambda bits: 1 <= bits <= 8)


class ByRoundedKeys(KeptEntries):
    """Chooses by a copy of the keys, each on a grid of its own between its least and its greatest number.

    Attributes:
        rounded: `[B, Hkv, L, D]`, what the copy gives back.
    """

    settings: RoundedKeysSettings
    rounded: Tensor | None = None

    def copy(self, now: Look) -> Tensor:
        """`rounded`, up to the newest token."""
        keys = now.keys if self.rounded is None else now.keys[:, :, -1:]
        new = round_keys(keys, self.settings.bits)
        self.rounded = new if self.rounded is None else torch.cat([self.rounded, new], 2)
        return self.rounded

    def overhead(self, now: Look) -> Tensor:
        """The copy of every visible token, as a share of an entry of 16 bits a number."""
        dims = now.keys.shape[-1]
        bits = now.tokens * (self.settings.bits * dims + _RANGE)
        return (bits + _ENTRY * dims - 1) // (_ENTRY * dims)


class RoundedKeys(ByRoundedKeys):
    """The K tokens that the query weighs most by the rounded keys, the newest always; they are attended to exactly."""

    def choose(self, now: Look) -> Tensor:
        scores = now.scores(self.settings.group_reduction, keys=self.copy(now))
        return now.best(scores, recent=1)


@dataclass(frozen=True, kw_only=True)
class TopPSettings(RoundedKeysSettings):
    """Settings of the top-p selection; `budget` is accepted, so that a comparison can name one for all.

    Attributes:
        share: of a query head's weight, by the rounded keys, that its tokens have together.
    """

    share: float = setting(0.95, "is a share of the weight in (0, 1]", lambda p: 0.0 < p <= 1.0)


class TopP(ByRoundedKeys):
    """As few tokens as hold the share of a query head's weight; a KV head attends to those of all its query heads."""

    settings: TopPSettings

    def choose(self, now: Look) -> Tensor:
        # In float64 a row adds up to the same whatever padding stands before it.
        weights = now.weights(self.copy(now)).double()
        best, order = weights.sort(dim=-1, descending=True, stable=True)
        # A token is needed where those before it do not have the share yet.
        needed = best.cumsum(-1) - best < self.settings.share * best.sum(-1, keepdim=True)
        kept = torch.zeros_like(needed).scatter(-1, order, needed)
        kept = kept.unflatten(1, (now.cache.kv_heads, -1)).any(2) & now.seen[:, None]
        kept[..., -1] = True
        return kept


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
        settings=RoundedKeysSettings,
        fixed={"bits": bits},
        make=RoundedKeys,
    )


INT4 = _method(4)
INT2 = _method(2)
TWILIGHT = Method(
    name="twilight",
    label="top-p by 4-bit keys",
    source=(
        'Lin et al., "Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning", arXiv 2502.02770'
    ),
    note=(
        "Every step estimates all weights by a copy of the keys in 4 bits, and attends to as few tokens as hold 95 % of"
        " them, whatever K is. The paper estimates among tokens that another method has chosen before; here among all."
        " Counts those tokens and the copy."
    ),
    settings=TopPSettings,
    fixed={"bits": 4},
    make=TopP,
)
