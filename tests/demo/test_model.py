"""The bundled model: small, offline, an ordinary Llama, and able to do the tasks."""

from __future__ import annotations

import pytest
import torch

from refreshkv.demo import MODEL_PATH, load
from refreshkv.demo.evaluate import evaluate, generate_answers
from refreshkv.demo.tasks import TASKS, make_prompt

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_log.jsonl",
    "README.md",
}


@pytest.fixture(scope="module")
def bundled():
    return load()


def test_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_PATH.iterdir()}
    assert files.keys() >= FILES
    assert sum(files.values()) <= 16 * 2**20


def test_model_is_an_ordinary_llama(bundled) -> None:
    model, tokenizer = bundled
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 8192
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert load(torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("task", TASKS)
def test_solves_a_prompt_of_every_task(bundled, task: str) -> None:
    score = evaluate(*bundled, task, length=512, examples=2)
    assert score.lines_right >= 0.9


def test_padding_does_not_change_an_answer(bundled) -> None:
    prompts = [make_prompt("key-value", seed, length) for seed, length in ((0, 256), (1, 400))]
    assert generate_answers(*bundled, prompts) == [
        generate_answers(*bundled, [prompt])[0] for prompt in prompts
    ]


def test_loads_by_auto_classes() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer("banana").input_ids == load()[1]("banana").input_ids
