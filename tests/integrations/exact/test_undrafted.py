"""What does not draft runs as full attention, or is refused in one line."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.integrations.transformers.support import exact_reason, rope_reason

from ...conftest import build
from ..test_kv_sharing import sharing  # noqa: F401
from .driver import ONE_ROW, OPTIONS, SMALL, run, same


def test_beams_run_as_full_attention(llama: PreTrainedModel) -> None:
    vanilla = run(llama, num_beams=3)
    message = "full attention: beam search does not draft"
    with refreshkv.attach(llama, SMALL) as session, pytest.warns(UserWarning, match=message):
        assert torch.equal(run(llama, num_beams=3), vanilla)
    assert session.stats.full_share == 1.0 and session.stats.acceptance is None


def test_prompt_lookup_runs_as_full_attention(llama: PreTrainedModel) -> None:
    inputs = {"input_ids": ONE_ROW["input_ids"] % 7 + 1}
    vanilla = run(llama, inputs, prompt_lookup_num_tokens=3)
    with refreshkv.attach(llama, SMALL), pytest.warns(UserWarning, match="does not draft"):
        assert torch.equal(run(llama, inputs, prompt_lookup_num_tokens=3), vanilla)


def test_a_draft_model(llama: PreTrainedModel) -> None:
    draft = build("llama", num_hidden_layers=1)
    vanilla = run(llama, ONE_ROW)
    with refreshkv.attach(llama, SMALL):
        assert torch.equal(run(llama, ONE_ROW, assistant_model=draft), vanilla)
    with refreshkv.attach(draft, SMALL):
        assert torch.equal(run(llama, ONE_ROW, assistant_model=draft), vanilla)


def test_a_loop_of_the_caller(llama: PreTrainedModel) -> None:
    called = []

    def loop(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        called.append(type(kwargs["past_key_values"]).__name__)
        return type(model)._sample(model, input_ids, **kwargs)

    vanilla = run(llama)
    with refreshkv.attach(llama, SMALL) as session:
        assert torch.equal(run(llama, custom_generate=loop), vanilla)
    assert called == ["RefreshCache"] and session.stats.full_share == 1.0


def test_shared_keys_run_as_full_attention(sharing: PreTrainedModel) -> None:  # noqa: F811
    vanilla = run(sharing)
    assert "another layer's keys" in exact_reason(sharing.config)
    with refreshkv.attach(sharing, SMALL), pytest.warns(UserWarning, match="full attention"):
        assert torch.equal(run(sharing), vanilla)


def test_a_stateful_watermark_runs_as_full_attention(llama: PreTrainedModel) -> None:
    options = {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3),
        "do_sample": True,
    }
    torch.manual_seed(0)
    vanilla = run(llama, **options)
    torch.manual_seed(0)
    with refreshkv.attach(llama, SMALL), pytest.warns(UserWarning, match="SynthID"):
        assert torch.equal(run(llama, **options), vanilla)


ROPES: dict[str, tuple[dict[str, Any], int, int, bool]] = {
    "plain": ({"rope_type": "default"}, 30, 900, False),
    "dynamic, short": ({"rope_type": "dynamic", "factor": 2.0}, 30, 40, False),
    "dynamic, long": ({"rope_type": "dynamic", "factor": 2.0}, 30, 900, True),
}


@pytest.mark.parametrize("parameters, first, last, changes", ROPES.values(), ids=ROPES)
def test_rope_that_changes_with_the_length(
    parameters: dict[str, Any], first: int, last: int, changes: bool
) -> None:
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **parameters})
    assert (rope_reason(model.config, first, last) is not None) == changes


@pytest.mark.parametrize("border, drafts", [(20, True), (34, False), (38, False), (100, True)])
def test_a_long_rope(border: int, drafts: bool) -> None:
    """Before its border and beyond it there are drafts; a text that crosses it would not be the same."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": border,
        "factor": 4.0,
    }
    model = build("llama", rope_parameters=rope)
    if drafts:
        same(model, OPTIONS)
        return
    vanilla = run(model)
    with refreshkv.attach(model, OPTIONS), pytest.warns(UserWarning, match="RoPE changes at"):
        assert torch.equal(run(model), vanilla)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attentions": (
        {"output_attentions": True, "return_dict_in_generate": True},
        "no output_attentions",
    ),
    "hidden states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "no output_hidden_states",
    ),
    "guidance": ({"guidance_scale": 1.5}, "no classifier-free guidance"),
    "processes": ({"synced_gpus": True}, "cannot keep processes in step"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_given_is_refused_in_one_line(
    llama: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with refreshkv.attach(llama, SMALL), pytest.raises(ValueError, match=message) as error:
        run(llama, **options)
    assert "\n" not in str(error.value) and "mode='full'" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 2, "num_beam_groups": 2}],
    ids=["contrastive", "groups"],
)
def test_code_of_the_hub_is_refused(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    with refreshkv.attach(llama, SMALL), pytest.raises(ValueError, match=r"hub|trust_remote_code"):
        run(llama, **options)


def test_a_cache_of_other_settings_goes_its_own_way(llama: PreTrainedModel) -> None:
    """The cache's own settings count, here those of the method without verification."""
    other = RefreshConfig(mode="refresh", budget=6, stride=None)
    with refreshkv.attach(llama, other) as session:
        expected = run(llama)
    with warnings.catch_warnings(), refreshkv.attach(llama, SMALL):
        warnings.simplefilter("error")
        cache = refreshkv.RefreshCache(llama.config, other)
        assert torch.equal(run(llama, past_key_values=cache), expected)
    assert cache.stats.full_share == session.stats.full_share == 0
