"""Chain of keys: follow each key's last word to the key that begins with it, many times over (RefreshKV, p. 6).

A key is W words joined by hyphens. All keys of a context lie on one cycle in which the last word of a key is the first
word of the next, so every key has exactly one successor. The prompt is the paper's in form: an instruction with a
worked example of ten keys, `Context:` with one `Name of key: ` line per key in random order, the instruction again,
and `Chain of ten keys:`. The first key of the answer is free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from refreshkv.tasks.task import Count, Example, Score, Seeded, answered, check_integers, fit
from refreshkv.tasks.words import draw_word

RULE = (
    "A key is made of words joined by hyphens."
    " In a chain, each key begins with the last word of the key before it.\n"
)
WRITE, KEYS_OF = "Write a chain of ", " keys, one a line, using only keys of the context.\n"
EXAMPLE = "Here is an example.\n"
CONTEXT = "Context:\n"
LINE = "Name of key: "
CHAIN, KEYS = "Chain of ", " keys:\n"
PHRASES = (RULE, WRITE, KEYS_OF, EXAMPLE, CONTEXT, LINE, CHAIN, KEYS)
_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
_EXAMPLE_KEYS = 10


@dataclass(frozen=True)
class ChainOfKey(Seeded):
    """Settings: `length` of the prompt in tokens, `words` of a key (W), `keys` asked for (T)."""

    name = "chain-of-key"
    metric = "valid prefix"
    recipe = (
        "Data: seeded keys of made-up words on one cycle, as many as fit the length, shuffled.\n"
        "Prompt: instruction with a worked example of ten keys, the context, the instruction again.\n"
        "Metric: length of the longest valid prefix of the chain / keys asked for; a key is valid if it stands in the"
        " context and begins with the last word of the key before it.\n"
        "Fed: the chain that begins at the first key of the context.\n"
        "Source: RefreshKV (Xu, Goyal, Choi, ACL 2025), p. 6; the words are ours."
    )
    length: int = 2048
    words: int = 2
    keys: int = 10

    def __post_init__(self) -> None:
        check_integers(self, length=1, words=2, keys=1)

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
        most = max(64, self.length)  # a key is more than one token
        cycle = Cycle.draw(rng, most, self.words)
        request = instruction(self.keys) + ask(self.keys)
        head = opening(self.keys, self.words)

        def build(size: int) -> str:
            return head + cycle.context(size) + request

        size = fit(build, count, self.length, most)
        if size <= self.keys:
            raise ValueError(
                f"{self.name}: {size} keys fit into length {self.length}, {self.keys} are asked for: raise the length"
            )
        context = [line.removeprefix(LINE) for line in cycle.context(size).splitlines()[1:]]
        ring = cycle.keys(size)
        start = ring.index(context[0])
        chain = [ring[(start + i) % size] for i in range(self.keys)]
        answer = "".join(f"{key}\n" for key in chain)
        return answered(id, build(size), answer, count, context=context)

    def score(self, example: Example, output: str) -> Score:
        """Value: valid prefix / T. Parts: whether each key follows from the one before it, right or not."""
        known = set(example.facts["context"])
        found = parse(output)[: self.keys]
        valid = [
            key in known and (i == 0 or key.split("-")[0] == found[i - 1].split("-")[-1])
            for i, key in enumerate(found)
        ]
        valid += [False] * (self.keys - len(valid))
        prefix = valid.index(False) if False in valid else self.keys
        return Score(prefix / self.keys, tuple(float(part) for part in valid))


@dataclass(frozen=True)
class Cycle:
    """Random numbers for any number of keys: a smaller context is made of the same words.

    `chains` [n] are the first words, `fillers` [n][W - 2] the words between, `places` [n] decide the order.
    """

    chains: Sequence[str]
    fillers: Sequence[Sequence[str]]
    places: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int, words: int) -> Cycle:
        """At most `size` keys of `words` words."""
        seen: set[str] = set()
        chains = [draw_word(rng, seen) for _ in range(size)]
        fillers = [[draw_word(rng) for _ in range(words - 2)] for _ in range(size)]
        return cls(chains, fillers, rng.random(size))

    def keys(self, size: int) -> list[str]:
        """The first `size` keys along the cycle."""
        ends = [*self.chains[1:size], *self.chains[:1]]
        return [
            "-".join((word, *fill, end))
            for word, fill, end in zip(self.chains[:size], self.fillers, ends, strict=False)
        ]

    def context(self, size: int) -> str:
        """The shuffled lines."""
        keys = self.keys(size)
        return CONTEXT + "".join(f"{LINE}{keys[i]}\n" for i in np.argsort(self.places[:size]))


def instruction(keys: int) -> str:
    """What to do."""
    return f"{RULE}{WRITE}{_number(keys)}{KEYS_OF}"


def ask(keys: int) -> str:
    """The last line of the prompt."""
    return f"{CHAIN}{_number(keys)}{KEYS}"


@lru_cache
def opening(keys: int, words: int) -> str:
    """The instruction with its worked example: the same in every prompt."""
    cycle = Cycle.draw(np.random.default_rng(0), _EXAMPLE_KEYS, words)
    chain = "".join(f"{key}\n" for key in cycle.keys(_EXAMPLE_KEYS))
    return instruction(keys) + EXAMPLE + cycle.context(_EXAMPLE_KEYS) + ask(_EXAMPLE_KEYS) + chain


def parse(output: str) -> list[str]:
    """The keys of an output: one a line or separated by commas, numbered or not, `Name of key:` or not."""
    items = re.split(r"[\n,]", output)
    keys = [re.sub(r"^\s*(?:\d+[.)]|[-*])?\s*(?:Name of key:)?\s*", "", item) for item in items]
    return [key.strip() for key in keys if key.strip()]


def _number(keys: int) -> str:
    return _NUMBERS[keys] if keys < len(_NUMBERS) else str(keys)
