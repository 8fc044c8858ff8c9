"""The bundled model: small, offline, an ordinary Llama, and able to do the tasks."""

from __future__ import annotations

import pytest
import torch

from refreshkv.demo import MODEL_PATH, load
from refreshkv.demo.prompts import TASKS, demo_task, make_prompt
from refreshkv.tasks import make_task
from refreshkv.tasks.task import Example

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}


@pytest.fixture(scope="module")
def bundled():
    return load()


def test_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_PATH.iterdir()}
    assert files.keys() == FILES
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


def generate_answers(model, tokenizer, examples: list[Example]) -> list[str]:
    """Greedy, by transformers' own `generate`, as one left-padded batch."""
    inputs = tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True)
    most = max(e.max_new_tokens for e in examples)
    out = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=most
    )
    return tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("task", TASKS)
def test_solves_a_prompt_of_every_task(bundled, task: str) -> None:
    examples = [make_prompt(task, seed, 600) for seed in range(3)]
    scored = demo_task(task, 600)
    outputs = generate_answers(*bundled, examples)
    scores = [scored.score(*pair).value for pair in zip(examples, outputs, strict=True)]
    assert sum(scores) >= 2.7


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


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 4096])
@pytest.mark.parametrize(
    ("task", "options", "bar"),
    [
        ("chain-of-key", {}, 0.95),
        ("html-to-tsv", {}, 0.95),
        ("key-value", {"keys": 5}, 0.98),
        ("key-value", {"keys": 1}, 0.98),
    ],
)
def test_reaches_its_bars(bundled, task: str, options: dict, bar: float, length: int) -> None:
    """The bars hold for the mean over many prompts; a sample of 40 may fall short by its noise."""
    made = make_task(task, length=length, **options)
    count = bundled[1]
    examples = list(
        made.examples(lambda t: len(count(t, add_special_tokens=False).input_ids), 0, 40)
    )
    outputs = [
        t for i in range(0, 40, 10) for t in generate_answers(*bundled, examples[i : i + 10])
    ]
    mean = sum(made.score(*pair).value for pair in zip(examples, outputs, strict=True)) / 40
    assert mean >= bar - 0.03
