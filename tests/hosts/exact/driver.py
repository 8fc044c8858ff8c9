"""What the tests of the lossless mode share: inputs, settings, and the comparison with `generate` without us."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import refreshkv
from refreshkv import RefreshConfig

from ..prompts import left_padded, tokens

RAGGED = left_padded([34, 21, 27])
ONE_ROW = {"input_ids": tokens(1, 30), "attention_mask": torch.ones(1, 30, dtype=torch.long)}
SMALL = RefreshConfig(mode="exact", budget=6, draft=5)  # nearly every draft is refused
LARGE = RefreshConfig(mode="exact", budget=1000, draft=5)  # every draft stands
OPTIONS = RefreshConfig(
    mode="exact", budget=8, draft=4, recent=4, successor=2, anchor=0.25, window=8
)
CONFIGS = {"options": OPTIONS, "large": LARGE}


def run(model: PreTrainedModel, inputs: dict[str, Any] = RAGGED, **options: Any) -> Any:
    """`generate`, greedy unless told otherwise."""
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 11, **options})


def same(
    model: PreTrainedModel,
    config: RefreshConfig,
    inputs: dict[str, Any] = RAGGED,
    **options: Any,
) -> refreshkv.Stats:
    """The same sequences with and without us; the statistics."""
    vanilla = run(model, inputs, **options)
    with warnings.catch_warnings(), refreshkv.attach(model, config) as session:
        warnings.filterwarnings("error", message="mode='exact'")
        assert torch.equal(run(model, inputs, **options), vanilla)
    assert session.stats.drafts.full > 0
    return session.stats


def ends_for(model: PreTrainedModel, inputs: dict[str, Any], new: int) -> list[int]:
    """Tokens of the vanilla output at which rows end at different times, all but one of them."""
    text = run(model, inputs, max_new_tokens=new)[:, inputs["input_ids"].shape[1] :]
    return [int(text[0, 2]), int(text[1, 5])]


def lengths_of(text: Tensor, ends: list[int]) -> list[int]:
    """New tokens of each row, its end token included."""
    found = [[token in ends for token in row] for row in text.tolist()]
    return [row.index(True) + 1 if True in row else len(row) for row in found]


class Record(StoppingCriteria):
    """What a stopping criterion is shown; row i is done after `lengths[i]` new tokens."""

    def __init__(self, prompt: int, lengths: list[int] | None = None) -> None:
        self.prompt, self.lengths = prompt, lengths
        self.seen: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.clone())
        if scores is not None:
            assert len(scores) == input_ids.shape[1] - self.prompt
            self.scores.append(scores[-1])
        new = input_ids.shape[1] - self.prompt
        lengths = self.lengths or [10**9] * len(input_ids)
        return torch.tensor([new >= length for length in lengths])


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1
