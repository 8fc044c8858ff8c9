"""A task without data, for tests of the runner: short prompts, short answers, any model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from refreshkv.tasks.key_value import INTRO, request
from refreshkv.tasks.task import Count, Example, Score, Task, generator
from refreshkv.tasks.words import draw_word


@dataclass(frozen=True)
class Toy(Task):
    """`answers`: 2 lines to feed, or none. `words` of the prompt differ from example to example."""

    name = "toy"
    metric = "first letters"
    recipe = "Data: words.\nSource: ours."
    words: int = 30
    answers: bool = True
    start: int = 0

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        for index in range(3 if limit is None else limit):
            rng = generator(self.name, seed, index + self.start)
            drawn = [draw_word(rng) for _ in range(self.words + 5 * (index % 3))]
            lines = [f"{word}:{word[::-1]}\n" for word in drawn]
            # A request that the bundled model knows: it answers, instead of ending at once.
            prompt = INTRO + "".join(lines) + request(lines[:2])
            answer = f"{drawn[0]}\n{drawn[1]}\n" if self.answers else None
            yield Example(f"{index:04d}", prompt, 4 + index % 3, answer)

    def score(self, example: Example, output: str) -> Score:
        first = example.prompt.rsplit(" ", 1)[1]
        parts = tuple(float(a == b) for a, b in zip(first[:3], output, strict=False))
        return Score(sum(parts) / 3, parts)


@dataclass(frozen=True)
class Perplexing(Toy):
    """The same, fed only."""

    name = "perplexity"
    metric = "perplexity"
    kind = "perplexity"
