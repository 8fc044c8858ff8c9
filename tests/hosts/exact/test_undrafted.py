"""What does not draft runs as full attention, or is refused in one line."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig

import refreshkv
from refreshkv.hosts.transformers.fallback import full_reason
from refreshkv.hosts.transformers.support import exact_reason, rope_reason
from refreshkv.hosts.transformers.versions import CACHE

from ...conftest import build
from ..prompts import tokens
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
        called.append(type(kwargs[CACHE]).__name__)
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


FULL: dict[str, tuple[dict[str, Any], str]] = {
    "attentions": ({"output_attentions": True}, "output_attentions=True was asked for"),
    "hidden states": ({"output_hidden_states": True}, "'output_hidden_states'"),
    "guidance": ({"guidance_scale": 1.5}, "may carry a state"),
    "no cache": ({"use_cache": False}, "use_cache=False was asked for"),
}


@pytest.mark.parametrize("options, message", FULL.values(), ids=FULL)
def test_what_drafts_cannot_give_runs_as_full_attention(
    options: dict[str, Any], message: str
) -> None:
    model = build("llama")
    model.set_attn_implementation("eager")  # which alone gives attention weights
    options = {**options, "return_dict_in_generate": True}
    vanilla = run(model, **options)
    with refreshkv.attach(model, SMALL), warnings.catch_warnings(record=True) as said:
        ours = run(model, **options)
    texts = [str(w.message) for w in said if "runs as full attention" in str(w.message)]
    assert len(texts) == 1 and message in texts[0]
    assert torch.equal(ours.sequences, vanilla.sequences)
    for name in ("attentions", "hidden_states"):
        one, other = (getattr(result, name) for result in (ours, vanilla))
        assert (one is None) == (other is None)
        for step, expected in zip(one or (), other or (), strict=True):
            assert len(step) == len(expected)


def test_processes_that_keep_in_step_do_not_draft(llama: PreTrainedModel) -> None:
    with refreshkv.attach(llama, SMALL) as session:
        arguments = {CACHE: session.new_cache(), "position_ids": torch.arange(9)[None]}
        config = GenerationConfig(max_new_tokens=5)
        given = (llama, tokens(1, 9), LogitsProcessorList(), config, 14, arguments)
        assert full_reason(*given) is None
        assert "keep in step" in str(full_reason(*given, synced_gpus=True))


class Conditioned(transformers.LlamaForCausalLM):
    """A forward pass with an argument of its own."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, shift: Any = None, **kwargs: Any
    ) -> Any:
        embeddings = self.get_input_embeddings()(input_ids)
        if shift is not None:
            embeddings = embeddings + shift[:, None, None]
        return super().forward(inputs_embeds=embeddings, position_ids=position_ids, **kwargs)


class Prepared(transformers.LlamaForCausalLM):
    """Positions as prompt tuning makes them: counted on from the cache, and no others."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] * 2 + 3
        return inputs


class Carried(transformers.LlamaForCausalLM):
    """Positions that are carried on in steps of two."""

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        kept = super()._update_model_kwargs_for_generation(*args, **kwargs)
        kept["position_ids"][..., -1] += 1
        return kept


OWN: dict[str, tuple[type[PreTrainedModel], dict[str, Any], str]] = {
    "an argument": (Conditioned, {"shift": torch.tensor([2.0, -1.5, 0.5])}, "argument 'shift'"),
    "inputs": (Prepared, {}, "Prepared has a prepare_inputs_for_generation of its own"),
    "what is carried on": (Carried, {}, "_update_model_kwargs_for_generation of its own"),
}


@pytest.mark.parametrize("cls, arguments, message", OWN.values(), ids=OWN)
def test_a_pass_of_the_models_own_making(
    cls: type[PreTrainedModel], arguments: dict[str, Any], message: str
) -> None:
    model = build("llama")
    model.__class__ = cls
    vanilla = run(model, **arguments)
    with refreshkv.attach(model, SMALL), pytest.warns(UserWarning, match=message):
        assert torch.equal(run(model, **arguments), vanilla)
    model.__class__ = transformers.LlamaForCausalLM
    assert not torch.equal(run(model), vanilla)


def test_inputs_replaced_on_the_instance_as_peft_does(llama: PreTrainedModel) -> None:
    """And put back as an attribute of the instance, which is the class's own again."""
    own = llama.prepare_inputs_for_generation
    llama.prepare_inputs_for_generation = functools.wraps(own)(lambda *a, **k: own(*a, **k))
    try:
        vanilla = run(llama)
        message = "prepare_inputs_for_generation of its own"
        with refreshkv.attach(llama, SMALL), pytest.warns(UserWarning, match=message):
            assert torch.equal(run(llama), vanilla)
        llama.prepare_inputs_for_generation = own
        same(llama, SMALL)
    finally:
        del llama.prepare_inputs_for_generation


class Automaton(LogitsProcessor):
    """Alternates two halves of the vocabulary, by the number of calls, as the grammars of other packages do."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        allowed = torch.arange(scores.shape[-1]) % 2 == self.calls % 2
        return scores.masked_fill(~allowed, -float("inf"))


def test_a_processor_with_a_state_runs_as_full_attention(llama: PreTrainedModel) -> None:
    vanilla = run(llama, ONE_ROW, logits_processor=[Automaton()])
    message = "Automaton may carry a state.*stateless = True"
    with refreshkv.attach(llama, SMALL), pytest.warns(UserWarning, match=message):
        assert torch.equal(run(llama, ONE_ROW, logits_processor=[Automaton()]), vanilla)


@pytest.mark.parametrize(
    "options",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 2, "num_beam_groups": 2}],
    ids=["contrastive", "groups"],
)
def test_code_of_the_hub_is_refused(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    with refreshkv.attach(llama, SMALL), pytest.raises(ValueError, match=r"hub|trust_remote_code"):
        run(llama, **options)
