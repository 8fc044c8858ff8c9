"""Counting words: the ten common ones of a list, the three most frequent ones of a coded text (RULER, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from refreshkv.tasks.ruler.base import MATCH_ALL, SOURCE, Ruler
from refreshkv.tasks.task import Count, Example, fit
from refreshkv.tasks.words import Endless, draw_word

COMMON = 10
# How often a common and another word stand in the list; the same in the worked example, and how many others it has.
# RULER's numbers for prompts from 4,096 tokens on, and for shorter ones.
LONG_FROM = 4096
LONG, LONG_EXAMPLE = (30, 3), (10, 3, 30)
SHORT, SHORT_EXAMPLE = (6, 1), (3, 1, 10)
LIST = "This numbered list repeats words, ten of them far more often than the others.\n"
LIST_QUESTION = (
    "\nWhich ten words stand in the list most often? Write the words alone, in the order in which they first appear,"
    " separated by commas.\nWords:\n"
)

FREQUENT = 3
EXPONENT = 2.0
DOTS = "..."  # the most frequent word, which is to be left out
TEXT = "This text is in code. Some of its words come far more often than others. The dots mean nothing.\n"
TEXT_QUESTION = (
    "\nWhich three words come most often in the text? Leave out the dots. Write the three words alone, the most"
    " frequent one first, separated by commas.\nWords:\n"
)
_LEAST = 60  # words of a coded text, for which the three most frequent ones differ from each other and from the rest


class CommonWords(Ruler):
    """Ten words of a shuffled list that come far more often than the others."""

    name = "ruler-cwe"
    new_tokens = 120
    recipe = (
        "Data: a shuffled numbered list of made-up words of 6 letters: ten of them 30 times each, the others 3 times,"
        " as many as fit; below 4,096 tokens, or where that does not fit, 6 times and once.\n"
        "Prompt: a short worked example, the list; wanted are the ten.\n"
        f"{MATCH_ALL}"
        "Fed: the ten words in the order in which they first appear, separated by commas.\n"
        + SOURCE
    )

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
        seen: set[str] = set()
        common = [draw_coded(rng, seen) for _ in range(COMMON)]
        # No word of the example stands in the list.
        shown = [draw_coded(rng, seen) for _ in range(COMMON)]
        shown_others = [draw_coded(rng, seen) for _ in range(LONG_EXAMPLE[2])]
        shown_order, order = rng.integers(0, 1 << 60, 2).tolist()
        others = Endless(lambda: draw_coded(rng, seen))

        def example(often: int, seldom: int, size: int) -> str:
            listed = shuffled(shown * often + shown_others[:size] * seldom, shown_order)
            return f"{ask(listed)}{', '.join(first_seen(listed, shown))}\n\n"

        def entries(size: int, often: int, seldom: int) -> list[str]:
            return shuffled(common * often + others.first(size) * seldom, order)

        times, head = SHORT, example(*SHORT_EXAMPLE)
        if self.length >= LONG_FROM:
            long_head = example(*LONG_EXAMPLE)
            if count(long_head + ask(entries(COMMON, *LONG))) <= self.length:
                times, head = LONG, long_head

        def build(size: int) -> str:
            return head + ask(entries(size, *times))

        size = fit(build, count, self.length)
        return self.wanted(id, build(size), first_seen(entries(size, *times), common), count)


class FrequentWords(Ruler):
    """The three most frequent words of a text whose frequencies fall with the square of the rank."""

    name = "ruler-fwe"
    new_tokens = 50
    recipe = (
        "Data: made-up words of 6 letters, length / 50 of them; the word of rank k comes n k^-2 / zeta(2) times among"
        " n, rounded down, shuffled; the first rank is `...`, as noise.\n"
        "Prompt: the text as long as fits; wanted are ranks 2 to 4.\n"
        f"{MATCH_ALL}"
        "Fed: the three words, the most frequent one first, separated by commas.\n" + SOURCE
    )

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
        seen: set[str] = set()
        number = max(self.length // 50, 2 * FREQUENT)
        words = [DOTS, *(draw_coded(rng, seen) for _ in range(number))]
        order = int(rng.integers(0, 1 << 60))

        def build(size: int) -> str:
            times = frequencies(_LEAST + size, len(words))
            text = [word for word, n in zip(words, times, strict=True) for _ in range(n)]
            return f"{TEXT}\n{' '.join(shuffled(text, order))}\n{TEXT_QUESTION}"

        prompt = build(fit(build, count, self.length))
        return self.wanted(id, prompt, words[1 : FREQUENT + 1], count)


def draw_coded(rng: np.random.Generator, seen: set[str]) -> str:
    """A new made-up word; all have 6 letters, so that none is a part of another."""
    return draw_word(rng, seen, (3, 3))


def ask(listed: Sequence[str]) -> str:
    """A numbered list with its question."""
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return f"{LIST}\n{numbered}\n{LIST_QUESTION}"


def first_seen(listed: Sequence[str], words: Sequence[str]) -> list[str]:
    """`words` in the order in which they first stand in the list."""
    return sorted(words, key=listed.index)


def shuffled(words: Sequence[str], order: int) -> list[str]:
    """The words in the random order of this number."""
    return [words[i] for i in np.random.default_rng(order).permutation(len(words))]


def frequencies(total: int, ranks: int) -> list[int]:
    """How often each rank comes among `total` words whose frequencies follow rank^-2 without end."""
    zeta = math.pi**2 / 6
    return [int(total * rank**-EXPONENT / zeta) for rank in range(1, ranks + 1)]
