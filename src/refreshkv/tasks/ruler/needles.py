"""The eight needle-in-a-haystack kinds: codes of lockers, hidden in a text (RULER, section 3).

A needle says which code opens whose locker. The kinds differ in the haystack, in what keys and codes are made of, and
in how many keys there are, codes a key has, and keys are asked for.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from refreshkv.tasks.ruler.base import MATCH_ALL, SOURCE, Ruler
from refreshkv.tasks.ruler.haystack import draw_depths, draw_haystack, hide, read_sentences
from refreshkv.tasks.ruler.vocabulary import ADJECTIVES, NOISE, NOUNS
from refreshkv.tasks.task import Count, Example, fit
from refreshkv.tasks.words import Endless

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

    @property
    def sentences(self) -> Sequence[str] | None:
        """Of the user's text; `None` where they are generated."""
        return None

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
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
            hay = draw_haystack(rng, self.sentences)
        else:
            hay = Endless(lambda: NOISE).first
        joint = " " if self.hay == "text" else "\n"
        several = self.queries * self.values > 1
        many = several or self.keys > 1 or self.hay == "needles"
        tail = question(asked, self.values)

        def build(size: int) -> str:
            return f"{intro(many, several)}\n\n{joint.join(hide(hay(size), needles, depths))}\n\n{tail}"

        prompt = build(fit(build, count, self.length))
        expected = [value for key in asked for other, value in hidden if other == key]
        places = [
            depth
            for key in asked
            for (other, _), depth in zip(hidden, depths, strict=True)
            if other == key
        ]
        return self.wanted(id, prompt, expected, count, depths=places)


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


@dataclass(frozen=True)
class TextNeedles(Needles):
    """The kinds whose haystack is text: `haystack` is a folder of text files (`None`: generated sentences)."""

    hay = "text"
    haystack: str | None = None

    @cached_property
    def sentences(self) -> Sequence[str] | None:
        """See `Needles.sentences`; read once."""
        return None if self.haystack is None else read_sentences(self.haystack)


def _kind(
    name: str, says: str, data: str, asked: str, hay: str = "text", **body: Any
) -> type[Needles]:
    """A kind: its class is documented by `says`, its recipe made of `data` and of what is `asked`."""
    if hay == "text":
        data = f"{_TEXT_DATA}, {data}"
    recipe = (
        f"Data: {data}; depths uniform.\n"
        f"Prompt: what is hidden, the haystack as long as fits, {asked}\n{MATCH_ALL}"
        "Fed: the codes, separated by commas.\n" + SOURCE
    )
    body |= {"name": f"ruler-niah-{name}", "hay": hay, "recipe": recipe}
    base = TextNeedles if hay == "text" else Needles
    return type(base.__name__, (base,), {**body, "__doc__": says, "__module__": __name__})


_WORDS = "adjective-noun, number"
_NOISE = "the same few sentences again and again, one needle: adjective-noun, number of 7 digits"
_UUID, _UUIDS = "one needle: adjective-noun, uuid", "nothing but needles: uuid, uuid"
_CROWD, _SAME_KEY = f"nothing but needles: {_WORDS}", f"four needles of the same key: {_WORDS}"
_ONE, _OF_SEVERAL, _ALL = "the one key.", "one of the keys.", "all four keys."
_ALL_CODES = "the key; all its codes are wanted."
_KINDS = {"key_kind": "uuids", "value_kind": "uuids"}
NEEDLES: tuple[type[Needles], ...] = (
    _kind("single-1", "One number in repeated noise.", _NOISE, _ONE, hay="noise"),
    _kind("single-2", "One number in text.", f"one needle: {_WORDS}", _ONE),
    _kind("single-3", "One uuid in text.", _UUID, _ONE, value_kind="uuids"),
    _kind(
        "multikey-1", "One of four keys in text.", f"four needles: {_WORDS}", _OF_SEVERAL, keys=4
    ),
    _kind(
        "multikey-2", "One of many keys: nothing but needles.", _CROWD, _OF_SEVERAL, hay="needles"
    ),
    _kind(
        "multikey-3", "One of many keys, all uuids.", _UUIDS, _OF_SEVERAL, hay="needles", **_KINDS
    ),
    _kind("multivalue", "Four numbers of one key.", _SAME_KEY, _ALL_CODES, values=4),
    _kind(
        "multiquery",
        "Four keys, all asked for.",
        f"four needles: {_WORDS}",
        _ALL,
        keys=4,
        queries=4,
    ),
)
