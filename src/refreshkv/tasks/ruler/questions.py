"""Questions about one or two of many passages: the user's own, or made-up people and towns (RULER, section 3).

RULER takes SQuAD for the first kind and HotpotQA for the second. Offline, each made-up person has a passage that names
the town of birth, and each town one that names its river, its founding year and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from refreshkv.tasks.ruler.base import SOURCE, Ruler
from refreshkv.tasks.ruler.vocabulary import DAYS, GOODS, PROFESSIONS
from refreshkv.tasks.task import Count, Example, Score, fit, generator
from refreshkv.tasks.texts import Record, check_text, place, read_jsonl
from refreshkv.tasks.words import Endless, draw_word

INTRO = "One or two of these passages answer the question at the end.\n\n"
ASK = "Answer the question from the passages. Write the answer alone, in a few words.\nQuestion: "


@dataclass(frozen=True)
class Question:
    """A question, the answers any of which will do, the passages that are needed for one; `where` it was read."""

    text: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    where: str = ""


@dataclass(frozen=True)
class Passages(Ruler):
    """Settings: `data` is a JSONL file of questions (`None`: made-up ones); its lines are asked in their order.

    Each line is {"question": text, "answers": [text, ...], "context": text or [text, ...]}: the context is all that is
    needed for the answer. The other lines' contexts fill the length, as far as they go.
    """

    metric = "answer found"
    new_tokens = 32
    hops: ClassVar[int]
    data: str | None = None

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`. Without a limit, all of a file."""
        if self.data is None:
            yield from super().examples(count, seed, limit)
            return
        questions = read_questions(self.data)
        passages = list(dict.fromkeys(p for question in questions for p in question.passages))
        for index, question in enumerate(questions[:limit]):
            rng = generator(self.name, seed, index)
            others = [p for p in passages if p not in question.passages]
            others = [others[i] for i in rng.permutation(len(others))]
            yield self._one(
                f"{index:04d}", rng, count, question, lambda n, o=others: o[:n], len(others)
            )

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
        places, people = rng.spawn(2)
        seen: set[str] = set()
        question = Person.draw(people, seen).ask(people, self.hops)
        crowd = Endless(lambda: Person.draw(people, seen))

        def others(number: int) -> list[str]:
            passages = [p for person in crowd.first(-(-number // 2)) for p in person.passages()]
            return passages[:number]

        return self._one(id, places, count, question, others, self.length)

    def _one(
        self,
        id: str,
        rng: np.random.Generator,
        count: Count,
        question: Question,
        others: Callable[[int], list[str]],
        most: int,
    ) -> Example:
        places = Endless(rng.random)

        def build(size: int) -> str:
            passages = [*question.passages, *others(size)]
            order = np.argsort(places.first(len(passages)), kind="stable")
            numbered = (f"Passage {n}\n{passages[i]}\n\n" for n, i in enumerate(order, 1))
            return f"{INTRO}{''.join(numbered)}{ASK}{question.text}\nAnswer:\n"

        if question.where and count(build(0)) > self.length:
            raise ValueError(
                f"{self.name}: {question.where}: question and context alone have more than {self.length} tokens: "
                "raise the length, or drop the line"
            )
        prompt = build(fit(build, count, self.length, most))
        return self.wanted(id, prompt, question.answers, count, answer=question.answers[0])

    def score(self, example: Example, output: str) -> Score:
        """1 where any of the answers stands in the output."""
        found = float(max(super().score(example, output).parts))
        return Score(found, (found,))


def _recipe(made_up: str) -> str:
    return (
        f"Data: {made_up}; or the user's questions: --task-option NAME.data=FILE, JSONL with"
        ' "question", "answers" (a list) and "context" (the passage needed, or a list of them).\n'
        "Prompt: the passages needed among others, as many as fit, numbered and shuffled; then the question.\n"
        "Metric: 1 where any of the answers stands in the output, in any case; else 0.\n"
        "Fed: the first answer.\n" + SOURCE
    )


class OneHop(Passages):
    """Questions that one passage answers."""

    name = "ruler-qa-1"
    hops = 1
    recipe = _recipe("made-up people and towns, a passage about each; one passage answers")


class TwoHops(Passages):
    """Questions that take two passages."""

    name = "ruler-qa-2"
    hops = 2
    recipe = _recipe(
        "made-up people and towns, a passage about each; one names the town, the town's own answers"
    )


@dataclass(frozen=True)
class Person:
    """A made-up person, and the town of birth. No two share a name, a town or a river."""

    name: str
    work: str
    born: int
    teacher: str
    town: str
    river: str
    founded: int
    trade: str
    market: str

    @classmethod
    def draw(cls, rng: np.random.Generator, seen: set[str]) -> Person:
        """A person none of whose names is in `seen`, to which they are added."""
        first, last, mentor, town, river = (
            draw_word(rng, seen, (2, 3)).capitalize() for _ in range(5)
        )
        born, founded = rng.integers((1820, 1100), (1980, 1700)).tolist()
        work, trade, market = (
            words[rng.integers(len(words))] for words in (PROFESSIONS, GOODS, DAYS)
        )
        return cls(
            f"{first} {last}", work, born, f"{mentor} {last}", town, river, founded, trade, market
        )

    def passages(self) -> tuple[str, str]:
        """About the person, about the town."""
        return (
            f"{self.name} was a {self.work}, born in {self.born} in the town of {self.town}. "
            f"The first lessons came from an uncle, {self.teacher}, whose workshop stood by the market. "
            f"In later years {self.name} travelled widely and wrote two books about the journeys.",
            f"{self.town} is a town on the river {self.river}, founded in {self.founded}. "
            f"It is known for its {self.trade}, which is sold on the market every {self.market}. "
            f"A ferry crosses the {self.river} below the old wall.",
        )

    def ask(self, rng: np.random.Generator, hops: int) -> Question:
        """A question whose answer takes this many passages."""
        person, town = self.passages()
        of_person = (
            (f"In which town was {self.name} born?", self.town),
            (f"In which year was {self.name} born?", str(self.born)),
            (f"Which uncle gave {self.name} the first lessons?", self.teacher),
        )
        its = f"the town in which {self.name} was born"
        of_town = (
            (f"On which river is {its}?", self.river),
            (f"In which year was {its} founded?", str(self.founded)),
        )
        asked = of_person if hops == 1 else of_town
        text, answer = asked[rng.integers(len(asked))]
        return Question(text, (answer,), (person,) if hops == 1 else (person, town))


def read_questions(data: str) -> list[Question]:
    """The questions of a JSONL file. Raises `ValueError` for a line (its number) that is none."""
    return [_question(record) for record in read_jsonl(place(data))]


def _question(record: Record) -> Question:
    context = record.get("context")
    return Question(
        record.text("question"),
        _texts(record, "answers", record.get("answers")),
        _texts(record, "context", [context] if isinstance(context, str) else context),
        record.where,
    )


def _texts(record: Record, name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{record.where}: {name!r} must be a list of one or more texts")
    return tuple(check_text(record.where, name, item) for item in value)
