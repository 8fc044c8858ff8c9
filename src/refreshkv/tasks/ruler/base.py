"""What the thirteen kinds share: the length and the match of strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from refreshkv.tasks.task import Count, Example, Score, Seeded, check_integers

SOURCE = (
    "Source: RULER (Hsieh et al., COLM 2024) for the construction; the wording, the words and the generated text are"
    " ours. For numbers to set beside published ones run lm-evaluation-harness's own ruler tasks through the model"
    " type `refreshkv`."
)
MATCH_ALL = "Metric: share of the wanted strings that stand in the output, in any order and case.\n"


@dataclass(frozen=True)
class Ruler(Seeded):
    """Settings: `length` of the prompt in tokens, the answer not counted.

    Class attributes:
        new_tokens: where RULER cuts generation off; further off here where a tokenizer needs more for the answer.
    """

    metric = "strings found"
    new_tokens: ClassVar[int]
    length: int = 2048

    def __post_init__(self) -> None:
        check_integers(self, length=1)

    def wanted(
        self,
        id: str,
        prompt: str,
        expected: Sequence[str],
        count: Count,
        answer: str = "",
        **facts: Any,
    ) -> Example:
        """An example; its answer names all of `expected`, unless it is another."""
        answer = answer or ", ".join(expected)
        tokens = count(answer)
        most = max(self.new_tokens, tokens + tokens // 4)
        return Example(id, prompt, most, answer, {"expected": list(expected), **facts})

    def score(self, example: Example, output: str) -> Score:
        """Value: share of the expected strings in the output. Parts: whether each one is, in the order asked for."""
        parts = tuple(float(text.lower() in output.lower()) for text in example.facts["expected"])
        return Score(sum(parts) / len(parts), parts)
