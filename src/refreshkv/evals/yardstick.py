"""How far a method's next-token distributions are from those of full attention on the same fed text: KL, in nats.

The distributions of a text are large (50 MB in 16 bits for 512 tokens of a vocabulary of 50,000) and never written.
Those of the batch that is being worked on are in memory: full attention comes first in its batch, and where a run goes
on and has its records already, it is fed once more. Log-probabilities are kept in float16, whose rounding shifts the
mean over some thousand tokens by less than .00001 (`Compared`).

Letters: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refreshkv.evals.grid import Cell
from refreshkv.evals.results import BASELINE
from refreshkv.tasks.task import Example

_LEAST = -1e4  # nats: of what a model rules out, whose infinity times no probability would be none


class Kept:
    """Of each step the log-probabilities `[B, V]`, as full attention passes."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, step: int, logprobs: Tensor) -> None:
        """Keep those of one step, `[B, V]`."""
        self.steps.append(logprobs.clamp(min=_LEAST).half())

    def kl(self, row: int, tokens: int) -> float:
        """Of full attention to itself."""
        return 0.0


class Compared:
    """KL(full || method) of every step and row, as a method passes.

    Args:
        full: of each row, the pass of full attention that had its text, and the row there.
    """

    def __init__(self, full: Sequence[tuple[Kept, int]]) -> None:
        self.full = full
        self.steps: list[Tensor] = []

    def __call__(self, step: int, logprobs: Tensor) -> None:
        """Compare those of one step, `[B, V]`."""
        full = torch.stack([kept.steps[step][row] for kept, row in self.full]).float()
        share = full.exp()
        apart = (share * (full - logprobs.clamp(min=_LEAST))).sum(-1)
        # Rounded shares do not quite add up to 1; with what is missing the error is of second order.
        self.steps.append(apart + 1 - share.sum(-1))

    def kl(self, row: int, tokens: int) -> float:
        """The mean over the first `tokens` steps of a row, in nats."""
        return float(torch.stack(self.steps)[:tokens, row].double().mean())


class Yardstick:
    """What full attention said of the batch that it was fed last."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], tuple[Kept, int]] = {}

    def lacks(self, cell: Cell, examples: Sequence[Example]) -> bool:
        """Whether full attention has to be fed these texts first."""
        return any((cell.task.name, example.id) not in self._held for example in examples)

    def watch(self, cell: Cell, examples: Sequence[Example]) -> Kept | Compared:
        """What is to see each step of `cell` on these texts."""
        places = [(cell.task.name, example.id) for example in examples]
        if cell.method.text != BASELINE:
            return Compared([self._held[place] for place in places])
        kept = Kept()
        self._held = {place: (kept, row) for row, place in enumerate(places)}
        return kept
