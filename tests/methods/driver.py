"""Feeds a text to one layer under a method, and sees what it attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.methods import METHODS
from refreshkv.methods.kept import KeptEntries
from refreshkv.stats import RowStats
from refreshkv.step import Algorithm
from tests.helpers import Held, Tokens, layer_below

KIVI = ("kivi-4", "kivi-2")
WEIGHING = ("subgen",)  # tokens count more than once, or not at all
DENSE = ("no-reselection", *KIVI, "critiprefill")  # no step leaves anything out
KEPT = [n for n, m in METHODS.items() if m.make and n not in (*DENSE, *WEIGHING)]
VARYING = ("twilight", "squeezed")  # how many entries a step reads, whatever K is
# Anew in every step.
CHOOSING = (
    *("quest", "token-select", "kascade", "squeezed", "hip", "int4-keys", "int2-keys"),
    *("twilight", "oracle-topk"),
)
EVICTING = [name for name in (*KEPT, *WEIGHING) if name not in CHOOSING]


class Driver:
    """A prompt of `prompt` tokens, in chunks of `chunk`; then one token a step.

    `chosen` holds, after each step, the mask `[B, Hkv, L]` of what a `KeptEntries` chose. Kascade is driven as
    the second layer, which follows the first, `below`.
    """

    below: Driver | None = None

    def __init__(
        self,
        tokens: Tokens,
        method: str,
        prompt: int,
        *,
        chunk: int | None = None,
        options: AttendOptions | None = None,
        layer: int | None = None,
        layers: int = 1,
        **settings: Any,
    ) -> None:
        if method == "kascade" and layer is None:
            first: Any = {"chunk": chunk, "options": options, "layer": 0, "layers": 4, **settings}
            self.below = Driver(layer_below(tokens), method, prompt, **first)
            layer, layers = 1, 4
        layer = layer or 0
        self.tokens = tokens
        self.prompt = prompt
        self.options = options or AttendOptions(scale=tokens.keys.shape[-1] ** -0.5)
        self.config = METHODS[method].config(**settings)
        self.stats = RowStats()
        self.cache = LayerCache(self.config.for_cache(), index=layer, stats=self.stats)
        make = METHODS[method].make
        self.algorithm = Algorithm() if make is None else make(self.config, layer, layers)
        self.algorithm.below = self.below and self.below.algorithm
        self.chosen: Tensor | None = None
        if isinstance(self.algorithm, KeptEntries):
            self._watch(self.algorithm)
        for start in range(0, prompt, chunk or prompt):
            self._observe(start, min(prompt, start + (chunk or prompt)))

    def _watch(self, algorithm: KeptEntries) -> None:
        choose = algorithm.choose

        def watched(*args: Any) -> Tensor:
            self.chosen = choose(*args)
            return self.chosen

        algorithm.choose = watched  # type: ignore[method-assign]

    def observe(self, start: int, end: int) -> None:
        """Tokens `start` to `end` are a prompt, or a chunk of it."""
        if self.below:
            self.below.observe(start, end)
        self._observe(start, end)

    def _observe(self, start: int, end: int) -> None:
        tokens = self.tokens
        self.cache.append(tokens.keys[:, :, start:end], tokens.values[:, :, start:end])
        queries = tokens.queries[:, :, start:end]
        seen = tokens.seen(end)
        self.observed = self.algorithm.observe(self.cache, queries, self.options, seen)

    def step(self) -> Tensor:
        """`[B, Hq, D]`."""
        if self.below:
            self.below.step()
        now, tokens = self.cache.length, self.tokens
        self.cache.append(tokens.keys[:, :, now : now + 1], tokens.values[:, :, now : now + 1])
        query, seen = tokens.queries[:, :, now], tokens.seen(now + 1)
        return self.algorithm.step(self.cache, query, self.options, seen)

    def run(self, steps: int) -> list[tuple[Tensor, Held]]:
        """Output and positions attended to, of each step."""
        return [(self.step(), self.held()) for _ in range(steps)]

    def held(self) -> Held:
        if self.chosen is None:
            return []
        return [[head.nonzero()[:, 0].tolist() for head in row] for row in self.chosen]

    def crop(self, length: int) -> None:
        if self.below:
            self.below.crop(length)
        self.algorithm.crop(length)
        self.cache.crop(length)

    def take_rows(self, rows: Tensor) -> None:
        if self.below:
            self.below.take_rows(rows)
            self.below.stats.reset()
        self.cache.take_rows(rows)
        self.algorithm.take_rows(rows)
        self.tokens = self.tokens.rows(rows)


def full_attention(tokens: Tokens, now: int, options: AttendOptions) -> Tensor:
    """What token `now` gets from all tokens up to it, `[B, Hq, D]`."""
    from refreshkv.kernels import reference

    seen = tokens.seen(now + 1)
    return reference.attend(
        tokens.queries[:, :, now],
        Entries(tokens.keys[:, :, : now + 1], tokens.values[:, :, : now + 1]),
        options.over(None if seen is None else seen[:, None]),
    ).output


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-4, atol=2e-6)
