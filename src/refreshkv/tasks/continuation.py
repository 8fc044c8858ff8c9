"""Continuation: a long document goes on greedily, to compare with how it goes on under full attention (ours)."""

from __future__ import annotations

from dataclasses import dataclass

from refreshkv.tasks.perplexity import Perplexity
from refreshkv.tasks.task import Example, Score


@dataclass(frozen=True)
class Continuation(Perplexity):
    """Settings as those of `Perplexity`; `scored` is the most tokens of a continuation."""

    name = "continuation"
    metric = "words of the document"
    kind = "generate"
    recipe = (
        "Data: --task-option continuation.data=D, as for perplexity.\n"
        "Prompt: the first `length` tokens of a document, nothing else; at most `scored` tokens are generated.\n"
        "Metric: the share of the document's next words with which the output begins, up to the first that differs. A"
        " model seldom has many; the yardstick is the text of full attention (same_as_full of a summary).\n"
        "Source: ours."
    )

    def score(self, example: Example, output: str) -> Score:
        """See `Task.score`."""
        wanted, said = (example.answer or "").split(), output.split()
        same = [one == other for one, other in zip(wanted, said, strict=False)]
        right = (*same, False).index(False)
        return Score(right / max(1, len(wanted)))
