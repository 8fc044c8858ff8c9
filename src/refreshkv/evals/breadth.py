"""A breadth of prompts, to see where decoding over a partial cache works and where it fails (ours).

The yardstick is full attention on the same prompt: a family is of use even where the model does not solve it. Most
families are tasks with other settings; the rest are made of the tasks' own phrases, which the bundled model reads as
single tokens. Families of one task and one seed are made of the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np

from refreshkv.config import unknown
from refreshkv.evals.task import Count, Example, Score, fit, generator
from refreshkv.evals.tasks import html_to_tsv as html
from refreshkv.evals.tasks import key_value as pairs
from refreshkv.evals.tasks import make_task
from refreshkv.evals.tasks.ruler.haystack import Endless, draw_depths, hide
from refreshkv.evals.tasks.ruler.needles import draw_key, draw_value, intro, question
from refreshkv.evals.tasks.ruler.vocabulary import sentence
from refreshkv.evals.words import CELLS, draw_word

Examples = Callable[[Count, int, int, int], Iterator[Example]]
Build = Callable[[int], tuple[str, str]]  # n -> prompt and answer; the prompt grows with n

LEAST_USED = 0.8  # share of the length; examples that use less are left out
TRIES = 16  # examples made at most for each one wanted
LINES_ASKED = 6  # as many as the bundled model was taught at once
SKIP_ROWS = 8  # of the table whose middle column is left out
SENTENCE_WORDS = (4, 8)
SENTENCE_SHARE = 0.5  # of the lines that follow a sentence
NEEDLES = 4  # of the new wording, one of them asked for


@dataclass(frozen=True)
class Family:
    """Prompts of one kind.

    Attributes:
        name: as given to `family`.
        says: what it asks for, in one line for a table.
        examples: (count, seed, limit, length) -> `limit` examples whose prompts have at most `length` tokens and at
            least `LEAST_USED` of it. The same arguments give the same ones. Raises `ValueError` for a length that is
            too short.
        score: the quality of an output.
    """

    name: str
    says: str
    examples: Examples
    score: Callable[[Example, str], Score]


def family(name: str) -> Family:
    """A family by name. Raises `ValueError` for an unknown one, with its nearest neighbour."""
    if name not in FAMILIES:
        raise ValueError(unknown("family", name, FAMILIES))
    return FAMILIES[name]


def _of_task(name: str, says: str, task: str, **options: Any) -> Family:
    """A task with some settings replaced."""

    def examples(count: Count, seed: int, limit: int, length: int) -> Iterator[Example]:
        return make_task(task, length=length, **options).examples(count, seed, limit)

    return Family(name, says, _full(name, examples), make_task(task, **options).score)


def _own(name: str, says: str, draw: Callable[[np.random.Generator], Build], task: str) -> Family:
    """A family of our own, scored as `task` is."""

    def examples(count: Count, seed: int, limit: int, length: int) -> Iterator[Example]:
        for index in range(limit):
            yield _fitted(f"{index:04d}", draw(generator(name, seed, index)), count, length)

    return Family(name, says, _full(name, examples), make_task(task).score)


def _fitted(id: str, build: Build, count: Count, length: int) -> Example:
    """The longest prompt of `build` that fits; room for the answer as in the tasks."""
    prompt, answer = build(fit(lambda size: build(size)[0], count, length))
    tokens = count(answer)
    return Example(id, prompt, tokens + tokens // 4 + 4, answer)


def _full(name: str, source: Examples) -> Examples:
    """Of the examples of `source` those that use the length: the last table may leave much of it empty."""

    def examples(count: Count, seed: int, limit: int, length: int) -> Iterator[Example]:
        tried = source(count, seed, TRIES * limit, length)
        used = (one for one in tried if count(one.prompt) >= LEAST_USED * length)
        found = 0
        for example in islice(used, limit):
            found += 1
            yield example
        if found < limit:
            raise ValueError(
                f"{name}: of {TRIES * limit} prompts {found} use {LEAST_USED:.0%} of length {length}, {limit} are"
                " asked for: raise the length"
            )

    return examples


def _reversed(rng: np.random.Generator) -> Build:
    """The lines of the last keys of a list, the last one first."""
    seen: set[str] = set()
    drawn = Endless(lambda: pairs.draw_line(rng, seen)).first

    def build(more: int) -> tuple[str, str]:
        lines = drawn(LINES_ASKED + more)  # from the end of the list to its beginning
        asked = lines[:LINES_ASKED]
        return pairs.INTRO + "".join(reversed(lines)) + pairs.request(asked), "".join(asked)

    return build


def _interleaved(rng: np.random.Generator) -> Build:
    """Lines of a list within the rows of a table; asked for are a line, a row, a line, ..."""
    seen: set[str] = set()
    empty = html.Table.draw(rng, seen, 0, 2)
    kind = list(CELLS.values())[rng.integers(len(CELLS))]
    drawn = Endless(
        lambda: (rng.random(), pairs.draw_line(rng, seen), draw_word(rng, seen), kind(rng))
    ).first

    def build(more: int) -> tuple[str, str]:
        items = drawn(LINES_ASKED + more)
        rows = tuple((line + word, cell) for _, line, word, cell in items)
        table = html.Table(empty.caption, empty.header, rows)
        names, answer = [], ""
        for i, (_, line, word, cell) in enumerate(sorted(items)[:LINES_ASKED]):
            names.append(word if i % 2 else line.split(":")[0])
            answer += f"{word}\t{cell}\n" if i % 2 else line
        return pairs.INTRO + html.page([table]) + pairs.request(names), answer

    return build


def _free_text(rng: np.random.Generator) -> Build:
    """Lines of a list with sentences of made-up words between them."""
    seen: set[str] = set()
    drawn = Endless(lambda: (rng.random(), _chaff(rng), pairs.draw_line(rng, seen))).first

    def build(more: int) -> tuple[str, str]:
        items = drawn(LINES_ASKED + more)
        asked = [line for _, _, line in sorted(items)[:LINES_ASKED]]
        text = "".join(chaff + line for _, chaff, line in items)
        return pairs.INTRO + text + pairs.request(asked), "".join(asked)

    return build


def _chaff(rng: np.random.Generator) -> str:
    """A sentence with its newline, or nothing."""
    if rng.random() >= SENTENCE_SHARE:
        return ""
    low, high = SENTENCE_WORDS
    words = [draw_word(rng) for _ in range(int(rng.integers(low, high + 1)))]
    return " ".join(words).capitalize() + ".\n"


def _table_skip(rng: np.random.Generator) -> Build:
    """A table of three columns; the request names its caption and the header without the middle column."""
    seen: set[str] = set()
    wanted = html.Table.draw(rng, seen, SKIP_ROWS, 3)
    short = html.Table(wanted.caption, wanted.header[::2], tuple(row[::2] for row in wanted.rows))
    low, high = html.OTHER_ROWS
    others = Endless(lambda: html.Table.draw(rng, seen, int(rng.integers(low, high + 1)), 3)).first
    place = rng.random()
    named = f"{short.caption}{html.CAPTION_END}{html.HEAD_CELL.join(short.header)}"

    def build(size: int) -> tuple[str, str]:
        tables = [*others(size)]
        tables.insert(int(place * (size + 1)), wanted)
        return f"{html.page(tables)}{html.ASK}{named}\n", short.tsv()

    return build


def _needle_new(rng: np.random.Generator) -> Build:
    """Needles in text that are worded as lines of a list; one is asked for as needles are."""
    seen: set[str] = set()
    keys = [draw_key(rng, seen, "words") for _ in range(NEEDLES)]
    codes = [draw_value(rng, seen, "uuids") for _ in keys]
    needles = [f"{key}:{code}\n" for key, code in zip(keys, codes, strict=True)]
    depths, asked = draw_depths(rng, NEEDLES), int(rng.integers(NEEDLES))
    hay = Endless(lambda: sentence(rng)).first

    def build(size: int) -> tuple[str, str]:
        text = " ".join(hide(hay(size), needles, depths))
        return f"{intro(True, False)}\n\n{text}\n\n{question([keys[asked]], 1)}", codes[asked]

    return build


_KEYS = {words: f"a chain of ten keys of {words} words" for words in (2, 3, 4)}
_TABLE = {columns: f"a table of ten rows and {columns} columns" for columns in (2, 3, 4, 6)}
_LINES = {
    1: "the line of one key",
    5: "the lines of five keys",
    20: "the lines of twenty keys",
}
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        one.name: one
        for one in (
            *(_of_task(f"chain-{n}", says, "chain-of-key", words=n) for n, says in _KEYS.items()),
            *(_of_task(f"table-{n}", says, "html-to-tsv", columns=n) for n, says in _TABLE.items()),
            _own("table-skip", "a table without its middle column", _table_skip, "html-to-tsv"),
            *(_of_task(f"key-value-{n}", says, "key-value", keys=n) for n, says in _LINES.items()),
            _own("reversed", "the last six lines of a list, backwards", _reversed, "key-value"),
            _own(
                "interleaved", "lines of a list, rows of a table in turn", _interleaved, "key-value"
            ),
            _own("free-text", "the lines of six keys among sentences", _free_text, "key-value"),
            _of_task("needle", "one uuid hidden in text", "ruler-niah-single-3"),
            _own("needle-new", "one of four uuids, in a new wording", _needle_new, "key-value"),
        )
    }
)
