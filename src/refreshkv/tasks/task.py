"""What a task is: examples made from a seed, and a score for an output."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

Count = Callable[[str], int]  # the tokens of a text, in the tokenizer of the model under test


@dataclass(frozen=True)
class Example:
    """One prompt, and all that its score needs.

    Attributes:
        id: unique within a run of the task, and the same whenever the example is the same.
        prompt: the text given to the model, unchanged (a trailing newline belongs to it).
        max_new_tokens: where generation is cut off at the latest.
        answer: the one right output where there is one; it can be fed instead of being generated.
        facts: what the metric needs beside the output; plain JSON values.
    """

    id: str
    prompt: str
    max_new_tokens: int
    answer: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The quality of one output.

    Attributes:
        value: the task's metric for this example.
        parts: for outputs made of several keys, rows or lines: the quality of each, in the order of the output.
    """

    value: float
    parts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Task(ABC):
    """A task: a frozen record of its settings. Subclasses add fields, each with a default.

    Class attributes:
        name: as given to `--tasks`.
        metric: what `Score.value` is, for the head of a column.
        kind: "generate": the output is generated and scored as text. "perplexity": `answer` is fed under the method,
            and the value is its mean negative log-likelihood in nats a token.
        recipe: a few lines for a reader who wants to re-make it: data, prompt, metric, source.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    recipe: ClassVar[str]
    kind: ClassVar[Literal["generate", "perplexity"]] = "generate"

    @abstractmethod
    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """The examples 0, 1, ... `limit` - 1 (`None`: the task's own number). The same arguments give the same ones.

        Raises:
            ValueError: settings or data that cannot work, in one line that names the input and the remedy.
        """

    @abstractmethod
    def score(self, example: Example, output: str) -> Score:
        """The quality of `output`."""


def check_integers(task: Task, **least: int) -> None:
    """Raise `ValueError` unless each of these settings is an integer of at least so much."""
    for name, limit in least.items():
        value = getattr(task, name)
        if type(value) is not int or value < limit:
            raise ValueError(f"{task.name}: {name} must be an integer >= {limit}; got {value!r}")


class Seeded(Task):
    """A task whose examples are made up, each from random numbers of its own.

    Class attributes:
        number: how many there are where no limit is given.
    """

    number: ClassVar[int] = 100

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`."""
        for index in range(self.number if limit is None else limit):
            yield self.make(f"{index:04d}", generator(self.name, seed, index), count)

    @abstractmethod
    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """One example."""


def generator(task: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one example: they depend on nothing else."""
    return np.random.default_rng([zlib.crc32(task.encode()), seed, index])


def answered(id: str, prompt: str, answer: str, count: Count, **facts: Any) -> Example:
    """An example with a right answer; an output may be a quarter longer, and four tokens."""
    tokens = count(answer)
    return Example(id, prompt, tokens + tokens // 4 + 4, answer, facts)


def fit(build: Callable[[int], str], count: Count, tokens: int, most: int = 1 << 20) -> int:
    """The largest n in 0 .. `most` for which `build(n)` has at most `tokens` tokens; its length must grow with n.

    Raises:
        ValueError: even `build(0)` is longer.
    """
    used = count(build(0))
    if used > tokens:
        raise ValueError(
            f"a length of {tokens} tokens is too short for this task: raise the length"
        )
    # Counting a long prompt is slow, and lengths grow almost evenly: interpolate, and halve every fourth time.
    low, at_low, high = 0, used, most + 1  # low fits, high does not
    guess, turn = min(16, most), 0
    while high - low > 1:
        size = max(low + 1, min(guess, high - 1))
        used = count(build(size))
        slope = (used - at_low) / (size - low)
        if used <= tokens:
            low, at_low = size, used
        else:
            high = size
        turn += 1
        if turn % 4 == 0 and high <= most:
            guess = (low + high) // 2
        else:
            guess = low + int((tokens - at_low) / slope) if slope > 0 else 2 * low + 1
    return low
