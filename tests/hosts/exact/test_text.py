"""Greedy text is that of full attention, token by token in float32, however many drafts are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

from ...conftest import build
from ..prompts import PAD, tokens
from .driver import ONE_ROW, OPTIONS, RAGGED, SMALL, run, same


@pytest.mark.filterwarnings("ignore:.*no full-attention layer")
@pytest.mark.parametrize("rows", ["one row", "ragged"])
def test_every_architecture(model: PreTrainedModel, rows: str) -> None:
    inputs = ONE_ROW if rows == "one row" else RAGGED
    vanilla = run(model, inputs)
    for config in (OPTIONS, SMALL) if rows == "ragged" else (OPTIONS,):
        with refreshkv.attach(model, config) as session:
            assert torch.equal(run(model, inputs), vanilla)
        assert session.stats.drafts.full > 0


@pytest.mark.parametrize("draft", [1, 2, 8, 33])
def test_any_number_of_drafts(llama: PreTrainedModel, draft: int) -> None:
    refused = same(llama, RefreshConfig(mode="exact", budget=6, draft=draft), max_new_tokens=37)
    assert refused.acceptance < 0.2
    right = same(llama, RefreshConfig(mode="exact", budget=1000, draft=draft), max_new_tokens=37)
    assert right.acceptance == 1.0
    assert right.drafts.full == 3 * -(-36 // (draft + 1))


def test_drafts_that_end_where_the_model_is_unsure(llama: PreTrainedModel) -> None:
    sure, unsure = (
        same(llama, RefreshConfig(mode="exact", budget=1000, confidence=confidence)).drafts
        for confidence in (0.0, 0.3)
    )
    assert 0 < unsure.drafted < sure.drafted
    assert unsure.accepted == unsure.drafted


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_few_new_tokens(llama: PreTrainedModel, config: RefreshConfig, new: int) -> None:
    vanilla = run(llama, max_new_tokens=new)
    with refreshkv.attach(llama, config) as session:
        assert torch.equal(run(llama, max_new_tokens=new), vanilla)
    assert session.stats.drafts.yielded == 3 * (new - 1)


def test_a_prompt_of_one_token(llama: PreTrainedModel, config: RefreshConfig) -> None:
    same(llama, config, {"input_ids": tokens(1, 1)})


def test_a_text_to_the_last_learned_position(config: RefreshConfig) -> None:
    """Rows that draft ahead must not ask for positions that the model does not have."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 34 + 10, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    same(model, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
def test_half_precision(architecture: str, dtype: torch.dtype) -> None:
    """The first token that differs, if one does, was a near tie of full attention's two best.

    A pass over several tokens rounds otherwise than one a token: at most 4e-2 (bfloat16) and 5e-3 (float16) of the
    logits' size.
    """
    model = build(architecture).to(dtype)
    options = {"output_logits": True, "return_dict_in_generate": True}
    vanilla = run(model, **options)
    with refreshkv.attach(model, OPTIONS):
        ours = run(model, **options)
    differ = ours.sequences != vanilla.sequences
    for row in range(3):
        if differ[row].any():
            logits = vanilla.logits[int(differ[row].int().argmax()) - 34][row].float()
            best = logits.topk(2).values
            bound = {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
            assert best[0] - best[1] < bound * logits.abs().max()
