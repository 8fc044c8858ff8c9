"""A real pretrained model, as users meet it. What is measured on real models stands in docs/fidelity.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import refreshkv
from refreshkv import models
from refreshkv.cli import cli

TEXT = Path(__file__).parents[1] / "LICENSE"
NAME = "smollm2-135m"


def run(*args: Any) -> dict[str, Any]:
    """The JSON that a command ends with."""
    result = CliRunner().invoke(cli, [*map(str, args), "--json"], prog_name="refreshkv")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout.splitlines()[-1])


def test_the_marker_follows_the_fixture(smollm2: Path, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("real")
    assert models.path(NAME) == smollm2


def test_what_was_said_of_it_is_true(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    known = models.MODELS[NAME]
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == known.parameters
    assert [type(model).__name__] == model.config.architectures == [known.architecture]
    assert model.config.max_position_embeddings == known.context
    about = run("info", "--model", NAME)["model"]
    assert about["supported"] and about["architecture"] == known.architecture
    assert about["max_positions"] == known.context


def test_it_knows_something_and_the_lossless_mode_keeps_it(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = (
        TEXT.read_text("utf-8")[:600] + "\n\nThe capital of Italy is Rome. The capital of France is"
    )
    prompt = tokenizer(text, return_tensors="pt")
    plain = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(plain[0, prompt["input_ids"].shape[1] :]).startswith(" Paris")
    for mode in ("full", "exact"):
        with refreshkv.attach(model, mode=mode):
            assert torch.equal(model.generate(**prompt, max_new_tokens=12, do_sample=False), plain)


def test_perplexity_of_a_licence(smollm2: Path, tmp_path: Path) -> None:
    task = ("--tasks", "perplexity", "--task-option", f"perplexity.data={TEXT}", "--length", 256)
    scored = ("--task-option", "perplexity.scored=32", "--methods", "full", "--limit", 1)
    (row,) = run("eval", "--model", NAME, *task, *scored, "--out", tmp_path / "run")["results"]
    assert 1 < row["score"] < 60  # 49,152 for a model that knows nothing
