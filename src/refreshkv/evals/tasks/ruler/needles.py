"""The eight needle-in-a-haystack kinds: codes of lockers, hidden in a text (RULER, section 3).

A needle says which code opens whose locker. The kinds differ in the haystack, in what keys and codes are made of, and
in how many keys there are, codes a key has, and keys are asked for.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from refreshkv.evals.task import Count, Example
from refreshkv.evals.tasks.ruler.base import MATCH_ALL, SOURCE, Ruler
from refreshkv.evals.tasks.ruler.haystack import (
    Endless,
    draw_depths,
    draw_haystack,
    hide,
    read_sentences,
)
from refreshkv.evals.tasks.ruler.vocabulary import ADJECTIVES, NOISE, NOUNS

_TEXT_DATA = "sentences (generated, or of the text files in --task-option NAME.haystack=DIR, from a random one on)"


@dataclass(frozen=True)
class Needles(Ruler):
    """The kinds without a haystack of their own.

    Class attributes:
        hay: "noise", the same sentences again and again; "text"; "needles" about other lockers.
        keys, values, queries: keys in the text, codes of each key, keys asked for.
        key_kind, value_kind: what they are made of.
    """

    new_tokens = 128
    hay: ClassVar[Literal["noise", "text", "needles"]]
    keys: ClassVar[int] = 1
    values: ClassVar[int] = 1
    queries: ClassVar[int] = 1
    key_kind: ClassVar[Literal["words", "uuids"]] = "words"
    value_kind: ClassVar[Literal["numbers", "uuids"]] = "numbers"

    def _sentences(self) -> Sequence[str] | None:
        return None

    def _maker(self, count: Count) -> Callable[[str, np.random.Generator], Example]:
        sentences = self._sentences()
        return lambda id, rng: self._one(id, rng, count, sentences)

    def _one(
        self, id: str, rng: np.random.Generator, count: Count, sentences: Sequence[str] | None
    ) -> Example:
        seen: set[str] = set()
        keys = [draw_key(rng, seen, self.key_kind) for _ in range(self.keys)]
        hidden = [
            (key, draw_value(rng, seen, self.value_kind))
            for key in keys
            for _ in range(self.values)
        ]
        hidden = [hidden[i] for i in rng.permutation(len(hidden))]
        asked = [keys[i] for i in rng.permutation(self.keys)[: self.queries]]
        depths = draw_depths(rng, len(hidden))
        needles = [needle(*pair) for pair in hidden]
        if self.hay == "needles":
            hay = Endless(
                lambda: needle(
                    draw_key(rng, seen, self.key_kind), draw_value(rng, seen, self.value_kind)
                )
            ).first
        elif self.hay == "text":
            hay = draw_haystack(rng, sentences)
        else:
            hay = Endless(lambda: NOISE).first
        joint = " " if self.hay == "text" else "\n"
        several = self.queries * self.values > 1
        many = several or self.keys > 1 or self.hay == "needles"
        tail = question(asked, self.values)

        def build(size: int) -> str:
            return f"{intro(many, several)}\n\n{joint.join(hide(hay(size), needles, depths))}\n\n{tail}"

        prompt = build(self._fill(build, count))
        expected = [value for key in asked for other, value in hidden if other == key]
        places = [
            depth
            for key in asked
            for (other, _), depth in zip(hidden, depths, strict=True)
            if other == key
        ]
        return self._example(id, prompt, ", ".join(expected), expected, count, depths=places)


def needle(key: str, value: str) -> str:
    """What is hidden."""
    return f"The locker of {key} opens with {value}."


def intro(many: bool, several: bool) -> str:
    """The first line: whether there are many needles, and whether several codes are asked for."""
    hidden = "Notes about lockers are" if many else "A note about a locker is"
    asked = "codes are" if several else "a code is"
    return f"{hidden} hidden in the text below. Keep in mind which code opens which; {asked} asked for at the end."


def question(keys: Sequence[str], values: int) -> str:
    """The last lines: the codes of these keys, of which each has `values`."""
    if len(keys) > 1:
        listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
        return (
            f"Which codes open the lockers of {listed}? "
            "Write the codes alone, in this order, separated by commas.\nCodes:\n"
        )
    if values > 1:
        return (
            f"Which {values} codes open the locker of {keys[0]}? "
            "Write the codes alone, in the order in which they stand in the text, separated by commas.\nCodes:\n"
        )
    return f"Which code opens the locker of {keys[0]}? Write the code alone.\nCode:\n"


def draw_key(rng: np.random.Generator, seen: set[str], kind: str) -> str:
    """A new key: adjective-noun (with more adjectives once a pair is taken), or a uuid."""
    if kind == "uuids":
        return draw_value(rng, seen, kind)
    key = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
    while key in seen:
        key = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{key}"
    seen.add(key)
    return key


def draw_value(rng: np.random.Generator, seen: set[str], kind: str) -> str:
    """A new code: a number of seven digits, or a uuid."""
    while True:
        if kind == "uuids":
            value = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        else:
            value = str(int(rng.integers(1_000_000, 10_000_000)))
        if value not in seen:
            seen.add(value)
            return value


def _recipe(data: str, asked: str) -> str:
    return (
        f"Data: {data}; depths uniform.\n"
        f"Prompt: what is hidden, the haystack as long as fits, {asked}\n{MATCH_ALL}"
        "Fed: the codes, separated by commas.\n" + SOURCE
    )


@dataclass(frozen=True)
class TextNeedles(Needles):
    """The kinds whose haystack is text: `haystack` is a folder of text files (`None`: generated sentences)."""

    hay = "text"
    haystack: str | None = None

    def _sentences(self) -> Sequence[str] | None:
        return None if self.haystack is None else read_sentences(self.haystack)


class Single1(Needles):
    """One number in repeated noise."""

    name = "ruler-niah-single-1"
    hay = "noise"
    recipe = _recipe(
        "the same few sentences again and again, one needle: adjective-noun, number of 7 digits",
        "the one key.",
    )


class Single2(TextNeedles):
    """One number in text."""

    name = "ruler-niah-single-2"
    recipe = _recipe(f"{_TEXT_DATA}, one needle: adjective-noun, number", "the one key.")


class Single3(TextNeedles):
    """One uuid in text."""

    name = "ruler-niah-single-3"
    value_kind = "uuids"
    recipe = _recipe(f"{_TEXT_DATA}, one needle: adjective-noun, uuid", "the one key.")


class MultiKey1(TextNeedles):
    """One of four keys in text."""

    name = "ruler-niah-multikey-1"
    keys = 4
    recipe = _recipe(f"{_TEXT_DATA}, four needles: adjective-noun, number", "one of the keys.")


class MultiKey2(Needles):
    """One of many keys: nothing but needles."""

    name = "ruler-niah-multikey-2"
    hay = "needles"
    recipe = _recipe("nothing but needles: adjective-noun, number", "one of the keys.")


class MultiKey3(Needles):
    """One of many keys, all uuids."""

    name = "ruler-niah-multikey-3"
    hay = "needles"
    key_kind = "uuids"
    value_kind = "uuids"
    recipe = _recipe("nothing but needles: uuid, uuid", "one of the keys.")


class MultiValue(TextNeedles):
    """Four numbers of one key."""

    name = "ruler-niah-multivalue"
    values = 4
    recipe = _recipe(
        f"{_TEXT_DATA}, four needles of the same key: adjective-noun, number",
        "the key; all its codes are wanted.",
    )


class MultiQuery(TextNeedles):
    """Four keys, all asked for."""

    name = "ruler-niah-multiquery"
    keys = 4
    queries = 4
    recipe = _recipe(f"{_TEXT_DATA}, four needles: adjective-noun, number", "all four keys.")


NEEDLES: tuple[type[Needles], ...] = (
    Single1,
    Single2,
    Single3,
    MultiKey1,
    MultiKey2,
    MultiKey3,
    MultiValue,
    MultiQuery,
)
