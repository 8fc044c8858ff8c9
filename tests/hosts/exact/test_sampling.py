"""Sampled text has the distribution of full attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

from ...conftest import build
from ..prompts import tokens
from .driver import RAGGED, run, same


def distribution(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> Tensor:
    """The probability of every text of `new` tokens after the prompt `[1, P]`, in the order of its digits."""
    texts, chances = ids, torch.ones(1, dtype=torch.double)
    vocab = model.config.vocab_size
    for _ in range(new):
        out = model.generate(
            texts,
            attention_mask=torch.ones_like(texts),
            do_sample=True,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        chances = (chances[:, None] * out.scores[0].double().softmax(-1)).flatten()
        token = torch.arange(vocab).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(vocab, 0), token], 1)
    return chances


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "warped": {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "penalty": {"top_k": 0, "temperature": 1.5, "repetition_penalty": 1.4},
}


@pytest.mark.parametrize(
    "name, confidence", [("plain", 0.0), ("warped", 0.0), ("penalty", 0.0), ("warped", 0.45)]
)
def test_sampled_text_has_the_distribution_of_full_attention(name: str, confidence: float) -> None:
    """Chi-square over all texts of two tokens; the seed is fixed, and a right loop fails at one of 10,000."""
    sizes = {"vocab_size": 7, "num_hidden_layers": 1, "num_key_value_heads": 1}
    model = build("llama", num_attention_heads=2, hidden_size=16, **sizes)
    ids, options = tokens(1, 20, vocab=7), SAMPLING[name]
    rows = 1500
    expected = distribution(model, ids, 2, **options) * rows
    config = RefreshConfig(mode="exact", budget=2, draft=3, pool_kernel=1, confidence=confidence)
    with refreshkv.attach(model, config) as session:
        torch.manual_seed(1)
        text = model.generate(
            ids, do_sample=True, max_new_tokens=4, num_return_sequences=rows, **options
        )
    assert 0.1 < session.stats.acceptance < 0.9
    observed = torch.bincount(text[:, 20] * 7 + text[:, 21], minlength=49).double()
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected)]
    cells = [cell[cells[1] > 0] for cell in cells]
    assert chisquare(*cells).pvalue > 1e-4


def test_several_return_sequences_of_a_ragged_batch(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    with refreshkv.attach(llama, config):
        texts = []
        for _ in range(2):
            torch.manual_seed(0)
            texts.append(run(llama, do_sample=True, num_return_sequences=2, eos_token_id=5))
        assert texts[0].shape[0] == 6 and torch.equal(*texts)
        assert torch.equal(texts[0][:, :34], RAGGED["input_ids"].repeat_interleave(2, 0))


def test_a_distribution_of_one_token_is_greedy(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    same(llama, config, do_sample=True, top_k=1)
