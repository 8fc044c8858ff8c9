"""What several test files share: random tokens and a driver of decode steps."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.ring import Ring
from refreshkv.config import RefreshConfig
from refreshkv.kernels import reference
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy.triggers import Trigger
from refreshkv.step import decode_step

# The same examples every time: a test that fails only sometimes gets switched off.
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)

Held = list[list[list[int]]]  # [row][KV head] -> positions, ascending


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected values."""
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt())


def left_padding(pads: Sequence[int], length: int) -> Tensor:
    """`[B, L]` bool: row i begins with `pads[i]` tokens that do not count."""
    return torch.arange(length) >= torch.tensor(pads)[:, None]


def held(ring: Ring) -> Held:
    """The positions in every ring."""
    return [[sorted(p for p in head if p >= 0) for head in row] for row in ring.positions.tolist()]


@dataclass
class Tokens:
    """One layer's view of a whole text: queries `[B, Hq, L, D]`, keys and values `[B, Hkv, L, D]`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor | None

    @property
    def group(self) -> int:
        return self.queries.shape[1] // self.keys.shape[1]

    def seen(self, length: int) -> Tensor | None:
        return None if self.visible is None else self.visible[:, :length]

    def rows(self, rows: Tensor) -> Tokens:
        visible = None if self.visible is None else self.visible[rows]
        return Tokens(self.queries[rows], self.keys[rows], self.values[rows], visible)

    def alone(self, row: int) -> Tokens:
        """One row without its padding."""
        kept = slice(None) if self.visible is None else self.visible[row]
        one = (tensor[row : row + 1, :, kept] for tensor in (self.queries, self.keys, self.values))
        return Tokens(*one, None)


def random_tokens(
    *,
    rows: int = 1,
    kv_heads: int = 2,
    group: int = 2,
    length: int = 40,
    dim: int = 16,
    pads: Sequence[int] | None = None,
    seed: int = 0,
) -> Tokens:
    """Gaussian tokens; `pads` gives each row its left padding."""
    gen = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, kv_heads * group, length, dim, generator=gen)
    keys = torch.randn(rows, kv_heads, length, dim, generator=gen)
    values = torch.randn(rows, kv_heads, length, dim, generator=gen)
    return Tokens(queries, keys, values, None if pads is None else left_padding(pads, length))


def layer_below(tokens: Tokens) -> Tokens:
    """A layer whose last KV head looks for about what the first of `tokens` looks for, and so on backwards."""
    queries = tokens.queries.flip(1) + tokens.queries.roll(1, -1).flip(1) / 2
    return Tokens(queries, tokens.keys.flip(1), tokens.values, tokens.visible)


@dataclass
class Step:
    """One decode step: what came out, what full attention gives, and what every ring holds after it."""

    output: Tensor
    full: Tensor
    held: Held


class Decoder:
    """Feeds `tokens` to one `LayerCache`: a prompt, then one token a step."""

    def __init__(
        self,
        tokens: Tokens,
        config: RefreshConfig,
        prompt: int,
        *,
        trigger: Trigger | None = None,
        options: AttendOptions | None = None,
    ) -> None:
        self.tokens = tokens
        self.options = options or AttendOptions(scale=tokens.keys.shape[-1] ** -0.5)
        self.cache = LayerCache(config)
        if trigger is not None:
            self.cache.trigger = trigger
        self.cache.append(tokens.keys[:, :, :prompt], tokens.values[:, :, :prompt])
        self.cache.await_selection(tokens.queries[:, :, :prompt])

    def step(self) -> Step:
        now, tokens = self.cache.length, self.tokens
        self.cache.append(tokens.keys[:, :, now : now + 1], tokens.values[:, :, now : now + 1])
        seen, query = tokens.seen(now + 1), tokens.queries[:, :, now]
        output = decode_step(self.cache, query, self.options, seen)
        full = reference.attend(
            query,
            Entries(tokens.keys[:, :, : now + 1], tokens.values[:, :, : now + 1]),
            self.options.over(None if seen is None else seen[:, None]),
        ).output
        ring = self.cache.ring
        return Step(output, full, [] if ring is None else held(ring))

    def run(self, steps: int) -> list[Step]:
        return [self.step() for _ in range(steps)]


class Scripted(Trigger):
    """Fires where it is told to: the n-th mask `[B, Hkv]` is for the n-th decode step."""

    def __init__(self, before: Iterable[Tensor] = (), after: Iterable[Tensor] = ()) -> None:
        self._before, self._after = iter(before), iter(after)

    def due(self, step: Tensor) -> Tensor:
        return torch.ones_like(step, dtype=torch.bool)

    def before(self, step: Tensor, query: Tensor, reference: Tensor) -> Tensor:
        return next(self._before, torch.zeros_like(step, dtype=torch.bool))

    def after(self, step: Tensor, lse: Tensor, reference: Tensor) -> Tensor | None:
        return next(self._after, None)
