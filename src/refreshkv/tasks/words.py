"""Made-up words and cell texts for generated tasks (ours): no list to download, never the same text twice.

A word is a run of consonant-vowel syllables, so it is several tokens in any tokenizer and has to be copied, not found
in one jump.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
SYLLABLES = tuple(c + v for c in CONSONANTS for v in VOWELS)
# What a free cell may hold: nothing that HTML, TSV or Markdown would read as markup.
_FREE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.,:;+*/()#%$!?'äöüéß€"


def draw_word(
    rng: np.random.Generator, seen: set[str] | None = None, syllables: tuple[int, int] = (2, 4)
) -> str:
    """A word of `syllables[0]` to `syllables[1]` syllables that is not in `seen`, to which it is added."""
    while True:
        count = int(rng.integers(syllables[0], syllables[1] + 1))
        word = "".join(SYLLABLES[i] for i in rng.integers(0, len(SYLLABLES), count))
        if seen is None:
            return word
        if word not in seen:
            seen.add(word)
            return word


class Endless(Generic[T]):
    """As many draws as are asked for; a longer list begins with the shorter one."""

    def __init__(self, draw: Callable[[], T]):
        self._draw = draw
        self._drawn: list[T] = []

    def first(self, number: int) -> list[T]:
        """The first `number` draws."""
        while len(self._drawn) < number:
            self._drawn.append(self._draw())
        return self._drawn[:number]


def _name(rng: np.random.Generator) -> str:
    return " ".join(
        draw_word(rng, syllables=(1, 3)).capitalize() for _ in range(int(rng.integers(1, 3)))
    )


def _price(rng: np.random.Generator) -> str:
    whole, cents = rng.integers(0, 100, 2)
    return f"{whole:02d}.{cents:02d}"


def _date(rng: np.random.Generator) -> str:
    year, month, day = rng.integers((1950, 1, 1), (2050, 13, 29))
    return f"{year}-{month:02d}-{day:02d}"


def _number(rng: np.random.Generator) -> str:
    return str(int(rng.integers(10 ** int(rng.integers(2, 7)))))


def _code(rng: np.random.Generator) -> str:
    letters = "".join(chr(65 + i) for i in rng.integers(0, 26, int(rng.integers(1, 4))))
    return f"{letters}-{int(rng.integers(100, 10000))}"


def _free(rng: np.random.Generator) -> str:
    return "".join(_FREE[i] for i in rng.integers(0, len(_FREE), int(rng.integers(2, 9))))


CELLS = {
    "word": draw_word,
    "name": _name,
    "price": _price,
    "date": _date,
    "number": _number,
    "code": _code,
    "free": _free,
}
