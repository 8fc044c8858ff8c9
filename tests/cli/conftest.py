"""Tiny models on disk, and a way to run a command line inside the test's process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refreshkv.cli import cli

POSITIONS = 128


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may wait for the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def run() -> Callable[..., Result]:
    """`run("generate", "--model", ...)`; the result has exit_code, stdout and stderr."""

    def invoke(*args: Any, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(
            cli, [str(arg) for arg in args], input=stdin, prog_name="refreshkv"
        )

    return invoke


@pytest.fixture
def last_json() -> Callable[[Result], Any]:
    """The JSON object on the last line of stdout."""

    def parse(result: Result) -> Any:
        assert result.exit_code == 0, (result.stderr, result.exception)
        return json.loads(result.stdout.splitlines()[-1])

    return parse


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes only: any text is as many tokens as it has bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<eos>", *alphabet])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a random Llama of two layers, 128 positions and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,  # random weights: without an end every run gives all its tokens
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same model whatever test came before
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tokenizer with a tiny random model: everything of the bundled one but its skill."""
    from refreshkv.demo.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("models") / "stand-in"
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_demo(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model demo` and `refreshkv demo` use the stand-in."""
    monkeypatch.setattr("refreshkv.demo.MODEL_PATH", stand_in)
