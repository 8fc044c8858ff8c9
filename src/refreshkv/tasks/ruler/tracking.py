"""Variable tracking: all the names that a value was passed on to, through four hops (RULER, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refreshkv.tasks.ruler.base import MATCH_ALL, SOURCE, Ruler
from refreshkv.tasks.ruler.haystack import draw_depths, hide
from refreshkv.tasks.ruler.vocabulary import NOISE
from refreshkv.tasks.task import Count, Example, fit

HOPS = 4  # after the first variable; one chain, as in RULER
INTRO = "Sentences of the text set variables: the first to a number, each later one to what an earlier one is.\n"
EXAMPLE, TEXT = "\nAn example:\n", "\nThe text that counts:\n"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_EXAMPLE_NOISE = 5


class VariableTracking(Ruler):
    """One chain of five variables in repeated noise."""

    name = "ruler-vt"
    new_tokens = 30
    recipe = (
        "Data: the same few sentences again and again; between them one chain of assignments, a number of 5 digits"
        " through 5 variables (4 hops) of 5 letters, in their order, depths uniform.\n"
        "Prompt: a short worked example, the text as long as fits, the value; wanted are the names of all variables"
        f" that hold it.\n{MATCH_ALL}"
        "Fed: the names in the order in which they are set, separated by commas.\n" + SOURCE
    )

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
        seen: set[str] = set()
        shown, shown_value = [draw_name(rng, seen, 3) for _ in range(HOPS + 1)], draw_number(rng)
        names, value = [draw_name(rng, seen, 5) for _ in range(HOPS + 1)], draw_number(rng)
        while value == shown_value:
            value = draw_number(rng)
        shown_depths, depths = draw_depths(rng, HOPS + 1), draw_depths(rng, HOPS + 1)

        def text(names: Sequence[str], value: str, depths: Sequence[float], size: int) -> str:
            lines = hide([NOISE] * size, chain(names, value), depths)
            return "".join(f"{line}\n" for line in lines) + question(value)

        example = text(shown, shown_value, shown_depths, _EXAMPLE_NOISE)
        head = f"{INTRO}{EXAMPLE}{example}{', '.join(shown)}\n{TEXT}"

        def build(size: int) -> str:
            return head + text(names, value, depths, size)

        prompt = build(fit(build, count, self.length))
        return self.wanted(id, prompt, names, count, depths=depths)


def chain(names: Sequence[str], value: str) -> list[str]:
    """The sentences that set the first name to the value, and each other one to the one before it."""
    sources = [value, *names[:-1]]
    return [f"Let {name} be {source}." for name, source in zip(names, sources, strict=True)]


def question(value: str) -> str:
    """What is asked."""
    return (
        f"Which variables are {value} in the end? Write their {HOPS + 1} names alone, in the order in which the text"
        " sets them, separated by commas.\nNames:\n"
    )


def draw_name(rng: np.random.Generator, seen: set[str], letters: int) -> str:
    """A new name of capital letters."""
    while True:
        name = "".join(_LETTERS[i] for i in rng.integers(0, len(_LETTERS), letters))
        if name not in seen:
            seen.add(name)
            return name


def draw_number(rng: np.random.Generator) -> str:
    """A number of five digits."""
    return str(int(rng.integers(10_000, 100_000)))
