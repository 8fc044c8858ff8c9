"""A breadth of prompts, to see where decoding over a partial cache works and where it fails (ours): `breadth-FAMILY`.

The yardstick is full attention on the same prompt: a family is of use even where the model does not solve it. Most
families are tasks with other settings; the rest are made of the tasks' own phrases, which the bundled model reads as
single tokens. Families of one task and one seed are made of the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import numpy as np

from refreshkv.tasks import html_to_tsv as html
from refreshkv.tasks import key_value as pairs
from refreshkv.tasks.chain_of_key import ChainOfKey
from refreshkv.tasks.ruler import TASKS as RULER
from refreshkv.tasks.ruler.haystack import draw_depths, hide
from refreshkv.tasks.ruler.needles import draw_key, draw_value, intro, question
from refreshkv.tasks.ruler.vocabulary import sentence
from refreshkv.tasks.task import (
    Count,
    Example,
    Score,
    Task,
    answered,
    check_integers,
    fit,
    generator,
)
from refreshkv.tasks.words import CELLS, Endless, draw_word

PREFIX = "breadth-"
Build = Callable[[int], tuple[str, str]]  # n -> prompt and answer; the prompt grows with n

LEAST_USED = 0.8  # share of the length; examples that use less are left out
TRIES = 16  # examples made at most for each one wanted
LINES_ASKED = 6  # as many as the bundled model was taught at once
SKIP_ROWS = 8  # of the table whose middle column is left out
SENTENCE_WORDS = (4, 8)
SENTENCE_SHARE = 0.5  # of the lines that follow a sentence
NEEDLES = 4  # of the new wording, one of them asked for


@dataclass(frozen=True)
class Breadth(Task):
    """Settings: `length` of the prompt in tokens, of which at least `LEAST_USED` are used.

    Class attributes:
        of: the task that scores an output; a family that has no prompts of its own takes its examples.
        draw: (random numbers) -> what makes prompts of any size; `None` for the prompts of `of`.
    """

    of: ClassVar[Task]
    draw: ClassVar[Callable[[np.random.Generator], Build] | None]
    metric = "its task's"
    length: int = 2048

    def __post_init__(self) -> None:
        check_integers(self, length=1)

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`. 50 examples where no limit is given.

        Examples that leave much of the length empty, as a last table may, are left out.
        """
        limit, family = 50 if limit is None else limit, self.name.removeprefix(PREFIX)
        if self.draw is None:
            tried = replace(self.of, length=self.length).examples(count, seed, TRIES * limit)
        else:
            tried = (self._drawn(family, seed, i, count) for i in range(TRIES * limit))
        used = (one for one in tried if count(one.prompt) >= LEAST_USED * self.length)
        found = 0
        for example in islice(used, limit):
            found += 1
            yield example
        if found < limit:
            raise ValueError(
                f"{family}: of {TRIES * limit} prompts {found} use {LEAST_USED:.0%} of length {self.length}, {limit}"
                " are asked for: raise the length"
            )

    def _drawn(self, family: str, seed: int, index: int, count: Count) -> Example:
        """The longest prompt that fits."""
        assert self.draw is not None
        build = self.draw(generator(family, seed, index))
        prompt, answer = build(fit(lambda size: build(size)[0], count, self.length))
        return answered(f"{index:04d}", prompt, answer, count)

    def score(self, example: Example, output: str) -> Score:
        """As the task that the family is made of."""
        return self.of.score(example, output)


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


def _family(
    name: str, says: str, of: Task, draw: Callable[[np.random.Generator], Build] | None = None
) -> type[Breadth]:
    recipe = (
        f"Asks for {says}.\n"
        "Data and prompt: seeded, made of the tasks' own phrases, for the bundled model.\n"
        "Of use as a comparison with full attention on the same prompts, solved or not.\n"
        "Source: ours (`tasks.breadth`)."
    )
    body = {"name": f"{PREFIX}{name}", "of": of, "recipe": recipe, "__doc__": f"Asks for {says}."}
    body["draw"] = None if draw is None else staticmethod(draw)
    return type("Breadth", (Breadth,), {**body, "__module__": __name__})


_LINES = {1: "the line of one key", 5: "the lines of five keys", 20: "the lines of twenty keys"}
_PAIRS, _PAGE = pairs.KeyValue(), html.HtmlToTsv()
FAMILIES = (
    *(
        _family(f"chain-{n}", f"a chain of ten keys of {n} words", ChainOfKey(words=n))
        for n in (2, 3, 4)
    ),
    *(
        _family(f"table-{n}", f"a table of ten rows and {n} columns", html.HtmlToTsv(columns=n))
        for n in (2, 3, 4, 6)
    ),
    _family("table-skip", "a table without its middle column", _PAGE, _table_skip),
    *(_family(f"key-value-{n}", says, pairs.KeyValue(keys=n)) for n, says in _LINES.items()),
    _family("reversed", "the last six lines of a list, backwards", _PAIRS, _reversed),
    _family("interleaved", "lines of a list, rows of a table in turn", _PAIRS, _interleaved),
    _family("free-text", "the lines of six keys among sentences", _PAIRS, _free_text),
    _family("needle", "one uuid hidden in text", RULER["ruler-niah-single-3"]()),
    _family("needle-new", "one of four uuids, in a new wording", _PAIRS, _needle_new),
)
TASKS: dict[str, type[Task]] = {family.name: family for family in FAMILIES}
