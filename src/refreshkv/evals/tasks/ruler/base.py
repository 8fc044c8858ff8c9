"""What the thirteen kinds share: the length, the number of examples and the match of strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from refreshkv.evals.task import Count, Example, Score, Task, fit, generator

SOURCE = (
    "Source: RULER (Hsieh et al., COLM 2024) for the construction; the wording, the words and the generated text are"
    " ours. For numbers to set beside published ones run lm-evaluation-harness's own ruler tasks through the model"
    " type `refreshkv`."
)
MATCH_ALL = "Metric: share of the wanted strings that stand in the output, in any order and case.\n"


@dataclass(frozen=True)
class Ruler(Task):
    """Settings: `length` of the prompt in tokens, the answer not counted.

    Class attributes:
        new_tokens: where RULER cuts generation off; further off here where a tokenizer needs more for the answer.
    """

    metric = "strings found"
    new_tokens: ClassVar[int]
    length: int = 2048

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"{self.name}: length must be an integer >= 1; got {self.length!r}")

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`. 100 examples where no limit is given, as in RefreshKV's paper."""
        make = self._maker(count)
        for index in range(100 if limit is None else limit):
            yield make(f"{index:04d}", generator(self.name, seed, index))

    def _maker(self, count: Count) -> Callable[[str, np.random.Generator], Example]:
        """What makes one example from its id and its random numbers; data are read here, once."""
        raise NotImplementedError

    def _fill(self, build: Callable[[int], str], count: Count, most: int = 1 << 20) -> int:
        """The largest n for which `build(n)` fits into the length."""
        try:
            return fit(build, count, self.length, most)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _example(
        self, id: str, prompt: str, answer: str, expected: Sequence[str], count: Count, **facts: Any
    ) -> Example:
        tokens = count(answer)
        most = max(self.new_tokens, tokens + tokens // 4)
        return Example(id, prompt, most, answer, {"expected": list(expected), **facts})

    def score(self, example: Example, output: str) -> Score:
        """Value: share of the expected strings in the output. Parts: whether each one is, in the order asked for."""
        parts = tuple(float(text.lower() in output.lower()) for text in example.facts["expected"])
        return Score(sum(parts) / len(parts), parts)
