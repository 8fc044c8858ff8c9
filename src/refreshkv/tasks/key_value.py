"""Key-value retrieval: the lines of several keys, in the order asked for (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refreshkv.tasks.task import Count, Example, Score, Seeded, answered, check_integers, fit
from refreshkv.tasks.words import SYLLABLES, draw_word

INTRO = "Each line of this list is a key and its value.\n"
ASK = "Copy the lines of these keys, in this order: "
PHRASES = (INTRO, ASK)
_PARTS = (*SYLLABLES, *(f"{n:02d}" for n in range(100)))
_VALUE_PARTS = (2, 4)


@dataclass(frozen=True)
class KeyValue(Seeded):
    """Settings: `length` of the prompt in tokens, `keys` asked for."""

    name = "key-value"
    metric = "lines right"
    recipe = (
        "Data: seeded lines `key:value`, as many as fit the length.\n"
        "Prompt: the lines, then the keys asked for; the answer is their lines in that order.\n"
        "Metric: share of the lines that are right and in their place.\n"
        "Source: ours."
    )
    length: int = 2048
    keys: int = 5

    def __post_init__(self) -> None:
        check_integers(self, length=1, keys=1)

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
        seen: set[str] = set()
        lines = [draw_line(rng, seen) for _ in range(max(64, self.length))]
        places = rng.random(len(lines))

        def asked(size: int) -> list[str]:
            return [lines[i] for i in np.argsort(places[:size])[: self.keys]]

        def build(size: int) -> str:
            return INTRO + "".join(lines[:size]) + (request(asked(size)) if size else "")

        size = fit(build, count, self.length, len(lines))
        if size < self.keys:
            raise ValueError(
                f"{self.name}: {size} lines fit into length {self.length}, {self.keys} are asked for: raise the length"
            )
        return answered(id, build(size), "".join(asked(size)), count)

    def score(self, example: Example, output: str) -> Score:
        """Value: share of lines right in their place. Parts: the lines."""
        assert example.answer is not None
        gold, found = example.answer.splitlines(), output.splitlines()
        found += [""] * (len(gold) - len(found))
        parts = tuple(float(a == b.strip()) for a, b in zip(gold, found, strict=False))
        return Score(sum(parts) / len(parts), parts)


def draw_line(rng: np.random.Generator, seen: set[str]) -> str:
    """A line `key:value`; the value is a run of syllables and two-digit numbers."""
    key = draw_word(rng, seen, (2, 3))
    size = int(rng.integers(_VALUE_PARTS[0], _VALUE_PARTS[1] + 1))
    return f"{key}:{''.join(_PARTS[i] for i in rng.integers(0, len(_PARTS), size))}\n"


def request(lines: Sequence[str]) -> str:
    """The end of the prompt: the keys of these lines."""
    return ASK + ",".join(line.split(":")[0] for line in lines) + "\n"
