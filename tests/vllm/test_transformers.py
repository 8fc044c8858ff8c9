"""At equal settings the engine and transformers decode alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import refreshkv
from refreshkv.demo import load
from tests.vllm.engines import Answer, Engine, Prompt, assert_same, ragged
from tests.vllm.servers import Server

NEW = 48
TEXT = Path(__file__).parents[2] / "LICENSE"
SETTINGS: list[dict[str, Any]] = [
    {"mode": "mixed", "budget": 64},
    {"mode": "mixed", "budget": 16, "key_bits": 3, "skip": 0.2},
    {"mode": "refresh", "budget": 64, "threshold": None, "stride": 5},
    {"mode": "refresh", "budget": 64, "threshold": 0.85, "stride": 3},
    {"mode": "refresh", "budget": 64, "threshold": 0.95, "stride": 4, "decide": "head"},
    {"mode": "full"},
]


def hosted(settings: dict[str, Any]) -> dict[str, Any]:
    """As vLLM is told: there the stride counts from the end of the prompt if it is asked to."""
    return settings | {"stagger": False} if settings["mode"] == "refresh" else settings


def generated(
    model: PreTrainedModel, prompts: Sequence[Prompt], settings: dict[str, Any], new: int = NEW
) -> list[Answer]:
    """What transformers makes of each prompt."""
    found = []
    model.generation_config.eos_token_id = None
    for ids in prompts:
        with refreshkv.attach(model, **settings):
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=new,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = out.sequences[0, len(ids) :].tolist()
        logits = (
            step[0].float().log_softmax(-1)[token].item()
            for step, token in zip(out.logits, tokens, strict=True)
        )
        found.append(Answer(tuple(tokens), tuple(logits), 0))
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_bundled_model(settings: dict[str, Any]) -> None:
    prompts = ragged()
    with Engine(hosted(settings)) as engine:
        found = engine.generate(prompts, NEW)
    assert_same(found, generated(load()[0], prompts, settings))


def real_prompts(folder: Path) -> list[Prompt]:
    """Of natural text, some hundred tokens each."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text("utf-8")).input_ids
    return [ids[begin : begin + length] for begin, length in ((0, 300), (200, 576), (400, 801))]


def of_a_server(model: Path, prompts: Sequence[Prompt], budget: int, folder: Path) -> list[Answer]:
    """What `refreshkv serve` with this budget answers to all of them at once."""
    server = Server(folder, ["refreshkv.cli", "serve", str(model), "--budget", str(budget), "--"])
    asked: dict[str, Any] = {"max_tokens": NEW, "temperature": 0, "logprobs": 0}
    more = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    try:
        server.wait()
        client = server.client()
        (name,) = [served.id for served in client.models.list()]
        found = client.completions.create(model=name, prompt=prompts, extra_body=more, **asked)
    finally:
        server.close()
    answers = []
    for choice in found.choices:
        tokens = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
        answers.append(Answer(tuple(tokens), tuple(choice.logprobs.token_logprobs), 0))
    return answers


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]], ids=str)
def test_a_real_model(settings: dict[str, Any], smollm2: Path, tmp_path: Path) -> None:
    prompts = real_prompts(smollm2)
    if settings["mode"] == "mixed":
        found = of_a_server(smollm2, prompts, settings["budget"], tmp_path)
    else:
        with Engine(hosted(settings), smollm2) as engine:
            found = engine.generate(prompts, NEW)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    # What a budget just leaves out, one sum more or less decides; full attention is 0.5 to 2.6 away.
    assert_same(found, generated(model, prompts, settings), within=0.1)


def test_a_real_model_in_bfloat16(smollm2: Path) -> None:
    prompts, settings = real_prompts(smollm2), SETTINGS[0]
    with Engine(settings, smollm2, dtype="bfloat16") as engine:
        found = engine.generate(prompts, NEW)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16).eval()
    ties = 0
    for one, other in zip(found, generated(model, prompts, settings), strict=True):
        for a, b, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
            assert abs(p - q) < 0.4  # each took its best token: two of them are as good
            if a != b:
                ties += 1
                break  # from here on they are different texts
    assert ties <= 1
