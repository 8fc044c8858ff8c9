"""The text around what has to be found, generated or the user's own, and how to hide something in it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence

import numpy as np

from refreshkv.tasks.ruler.vocabulary import sentence
from refreshkv.tasks.texts import is_local, place, read_folder, shown
from refreshkv.tasks.words import Endless

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LONGEST = 300  # characters of a sentence of the user's text
_ENOUGH = 1 << 24  # characters of the user's text; no prompt needs more


def read_sentences(folder: str) -> list[str]:
    """The sentences of the text files of a folder; very long ones are cut between words.

    Raises:
        ValueError: no such folder, or no text in it.
    """
    path = place(folder)
    if not is_local(folder) or not path.is_dir():
        raise ValueError(f"haystack must be a folder of text files; {folder!r} is none")
    sentences: list[str] = []
    size = 0
    for record in read_folder(path):
        text = " ".join(record.text("text", blank=True).split())
        for part in _SENTENCE_END.split(text):
            sentences += [part] if 0 < len(part) <= _LONGEST else textwrap.wrap(part, _LONGEST)
        size += len(text)
        if size > _ENOUGH:
            break
    if not sentences:
        raise ValueError(f"the text files of the folder {shown(path)} are empty")
    return sentences


def draw_haystack(
    rng: np.random.Generator, sentences: Sequence[str] | None
) -> Callable[[int], list[str]]:
    """n -> n sentences: of the user's, from a random place on and round, or generated where there are none."""
    if sentences is None:
        return Endless(lambda: sentence(rng)).first
    start = int(rng.integers(len(sentences)))
    return lambda n: [sentences[(start + i) % len(sentences)] for i in range(n)]


def draw_depths(rng: np.random.Generator, number: int) -> list[float]:
    """Where in a haystack needles lie, uniform in [0, 1), ascending."""
    return sorted(rng.random(number).tolist())


def hide(hay: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Haystack and needles, needle i at `depths[i]` (ascending); needles keep their order."""
    found: list[str] = []
    last = 0
    for needle, depth in zip(needles, depths, strict=True):
        place = int(depth * (len(hay) + 1))
        found += [*hay[last:place], needle]
        last = place
    return [*found, *hay[last:]]
