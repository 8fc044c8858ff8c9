"""Prompts and generation shared by the integration tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

NEW = 20
PAD = 0


def tokens(rows: int, length: int, seed: int = 0, vocab: int = 97) -> Tensor:
    """Random prompts without padding, `[rows, length]`."""
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """A ragged batch, left-padded to the longest row."""
    width = max(lengths)
    ids = tokens(len(lengths), width, seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = PAD
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(
    model: PreTrainedModel, inputs: Tensor | dict[str, Tensor], new: int = NEW, **options: Any
) -> Tensor:
    """Greedy new tokens, `[rows, new]`, with whatever the model is attached to."""
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    out = model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
    )
    return out[:, inputs["input_ids"].shape[1] :]


def refreshed(
    model: PreTrainedModel,
    inputs: Tensor | dict[str, Tensor],
    config: RefreshConfig,
    new: int = NEW,
    **options: Any,
) -> Tensor:
    """As `greedy`, under RefreshKV."""
    with refreshkv.attach(model, config):
        return greedy(model, inputs, new, **options)


def logits(
    model: PreTrainedModel,
    inputs: Tensor | dict[str, Tensor],
    new: int,
    along: Tensor | None = None,
) -> Tensor:
    """The logits of `new` greedy steps, `[new, rows, vocabulary]`, with whatever the model is attached to.

    `along` `[rows, P + new]`: the text to follow, prompt included, whatever is greedy here.
    """
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    options = {"max_new_tokens": new, "output_logits": True, "return_dict_in_generate": True}
    if along is not None:
        options["prefix_allowed_tokens_fn"] = lambda row, ids: [int(along[row, len(ids)])]
    return torch.stack(model.generate(**inputs, **options, do_sample=False).logits)
