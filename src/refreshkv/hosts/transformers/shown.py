"""What `generate` lets a caller see of the lossless mode, token by token, in the order of its own loop (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

if TYPE_CHECKING:
    from refreshkv.hosts.transformers.drafting import _Run


class Shown:
    """The text as far as every unfinished row has it: what streamers and stopping criteria see.

    Rows run ahead of each other. Criteria that are no more than a length and end tokens are decided on the host, which
    has the tokens; others are called with the arguments that they get in the loop of transformers.
    """

    def __init__(self, run: _Run, criteria: StoppingCriteriaList, streamer: Any) -> None:
        self._run, self._criteria, self._streamer = run, criteria, streamer
        self._has_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._plain = all(type(c) in (MaxLengthCriteria, EosTokenCriteria) for c in criteria)
        self._ends = {
            int(token) for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id
        }
        self._unfinished = [True] * run.rows
        self._columns: list[list[int]] = []
        self._prompt = run.ids[:, : run.prompt]

    @property
    def going(self) -> list[bool]:
        """Rows that go on. Without an end token `generate` goes on with every row until all have finished."""
        return self._unfinished if self._has_end else [True] * len(self._unfinished)

    def advance(self) -> bool:
        """Show what every such row has by now; whether all have finished."""
        run = self._run
        while all(
            made > len(self._columns)
            for made, goes in zip(run.seen, self.going, strict=True)
            if goes
        ):
            column = [
                text[len(self._columns)] if goes else run.pad
                for text, goes in zip(run.texts, self.going, strict=True)
            ]
            self._columns.append(column)
            done = self._done(column)
            self._unfinished = [
                goes and not ends for goes, ends in zip(self._unfinished, done, strict=True)
            ]
            if self._streamer is not None:
                self._streamer.put(torch.tensor(column))
            count = len(self._columns)
            finished = [not goes for goes in self._unfinished]
            ahead = any(made > count for made, ends in zip(run.seen, finished, strict=True) if ends)
            if self._has_end and ahead:
                run.stop(finished, count)
            if all(finished):
                return True
        return False

    def sequences(self) -> Tensor:
        """`[B, P + n]`, the prompt and what was shown; finished rows are padded."""
        return self._with_prompt(self._columns)

    def _done(self, column: list[int]) -> list[bool]:
        """Which rows the criteria stop after the newest token."""
        count = len(self._columns)
        if not self._plain:
            shown = self._with_prompt(self._columns)
            stops: list[bool] = self._criteria(shown, self._run.scores_until(count)).tolist()
            return stops
        full = self._run.new is not None and count >= self._run.new
        return [full or token in self._ends for token in column]

    def _with_prompt(self, columns: list[list[int]]) -> Tensor:
        new = torch.tensor(columns, dtype=self._prompt.dtype, device=self._prompt.device)
        return torch.cat([self._prompt, new.T], 1)
