"""Problems of mathematics, solved step by step: short prompts, long outputs, one answer that can be checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from refreshkv.tasks.task import Count, Example, Score, Task, check_integers
from refreshkv.tasks.texts import HubSet, Record, documents

LOCAL = 'JSONL with "problem" and "answer"'
BOX = "\\boxed"
ASK = f"\n\nThink step by step. End with the final answer inside {BOX}{{}}.\n"

HUB: Mapping[str, HubSet] = MappingProxyType(
    {
        "math-500": HubSet("HuggingFaceH4/MATH-500"),
        "aime-2024": HubSet("HuggingFaceH4/aime_2024", split="train"),
    }
)


@dataclass(frozen=True)
class Reasoning(Task):
    """Settings: `data` (see `recipe`), `max_new_tokens`, at which an output is cut off."""

    name = "reasoning"
    metric = "answer right"
    recipe = (
        f"Data: --task-option reasoning.data=D, where D is {LOCAL}; or, from the hub, math-500"
        " (HuggingFaceH4/MATH-500), aime-2024 (HuggingFaceH4/aime_2024) or hub:owner/name[/split] with the same fields."
        " Without a limit all of a local file, 100 of the hub's.\n"
        "Prompt: the problem, and the request to end with the answer in \\boxed{}; with --chat in the model's"
        " template.\n"
        "Metric: 1 where the answer in the last \\boxed{} equals the right one by the package math-verify, else 0; an"
        " output that is cut off before it has one scores 0.\n"
        "Source: ours; MATH (Hendrycks et al., 2021), of which MATH-500 is a part, and AIME 2024."
    )
    data: str | None = None
    max_new_tokens: int = 4096

    def __post_init__(self) -> None:
        check_integers(self, max_new_tokens=1)

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`. Problems come in the order of the data; the seed changes nothing."""
        records, limit = documents(self.name, self.data, HUB, LOCAL, limit)
        _math_verify()  # rather now than after an hour of generation
        for index, record in enumerate(islice(records, limit)):
            prompt = record.text("problem").strip() + ASK
            facts = {"answer": _answer(record), "source": record.where}
            yield Example(f"{index:04d}", prompt, self.max_new_tokens, facts=facts)

    def score(self, example: Example, output: str) -> Score:
        """1 where the answers are equal as mathematics, else 0."""
        check = _math_verify()
        # All of several boxes would be taken for one set; whoever reconsiders means the last.
        said = output[max(0, output.rfind(BOX)) :]
        only = [check.LatexExtractionConfig(try_extract_without_anchor=False)]
        right = check.parse(f"{BOX}{{{example.facts['answer']}}}", only)
        return Score(float(BOX in said and check.verify(right, check.parse(said, only))))


def _answer(record: Record) -> str:
    """A text, or an integer, which JSON may hold as well."""
    given = record.get("answer")
    return str(given) if type(given) is int else record.text("answer").strip().strip("$")


def _math_verify() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ValueError(
            "reasoning needs the package math-verify: pip install math-verify"
        ) from error
    # An answer that takes too long to compare is a wrong one, and its score says so.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify
