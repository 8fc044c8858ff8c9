"""Runs: what they leave, going on after a stop, and what can go wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from refreshkv import RefreshConfig
from refreshkv.evals.store import RunError
from refreshkv.training.run import Run
from tests.training.runs import (
    LENGTH,
    OFTEN,
    TAIL,
    Killed,
    metrics,
    model_of,
    recipe,
)


def test_what_a_run_leaves(whole: Path, tiny: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6]
    for line in lines:
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in line:
                first, tail = line[f"{prefix}first_loss"], line[f"{prefix}tail_loss"]
                mean = (LENGTH * first + (TAIL - 1) * tail) / (LENGTH + TAIL - 1)
                assert line[f"{prefix}loss"] == pytest.approx(mean, rel=1e-5)
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.3, "it learns nothing"
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates == pytest.approx([0.0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])
    trained = load_file(whole / "model" / "model.safetensors")
    newest = load_file(whole / "checkpoints" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(trained[name], newest[name]) for name in trained)
    assert (
        json.loads((whole / "model" / "config.json").read_text()).keys()
        == json.loads((tiny / "config.json").read_text()).keys()
    )
    said = (whole / "model" / "README.md").read_text()
    assert "refreshkv.attach(model, budget=6, stride=10)" in said
    assert "| tail | 8 |" in said and "| 6 | validation |" in said


@pytest.mark.parametrize("killed", [1, 3, 5])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    begin: Callable[..., Run], whole: Path, tmp_path: Path, killed: int
) -> None:
    def stop(done: int, steps: int) -> None:
        if done == killed:
            raise Killed

    with pytest.raises(Killed):
        begin(tmp_path / "out").train(stop)
    again = begin(tmp_path / "out")
    assert again.done == killed - 1
    again.train()
    ours, theirs = (
        load_file(out / "model" / "model.safetensors") for out in (tmp_path / "out", whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(tmp_path / "out")[:-1] == metrics(whole)[:-1]  # the last one sums up


def test_a_checkpoint_that_a_kill_cut_off_is_none(
    begin: Callable[..., Run], tmp_path: Path
) -> None:
    def stop(done: int, steps: int) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        begin(tmp_path / "out").train(stop)
    half = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    again = begin(tmp_path / "out")
    assert again.done == 2
    again.train()
    assert (half / "whole.json").exists()


def test_a_full_disk_leaves_the_checkpoint_before(
    begin: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = PreTrainedModel.save_pretrained

    def save(self: PreTrainedModel, place: Any, **options: Any) -> None:
        if Path(place).name == "checkpoint-4":
            Path(place, "model.safetensors").write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        saved(self, place, **options)

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", save)
        with pytest.raises(OSError, match="No space left on device"):
            begin(tmp_path / "out").train()
    again = begin(tmp_path / "out")
    assert again.done == 2
    again.train()


@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_a_damaged_checkpoint_is_named(
    begin: Callable[..., Run], tmp_path: Path, harm: str
) -> None:
    out = tmp_path / "out"
    begin(out).train()
    file = out / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    file.unlink() if harm == "missing" else file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint-6' is damaged, its file optimizer.pt"):
        begin(out)
    for path in file.parent.iterdir():
        path.unlink()
    file.parent.rmdir()
    assert begin(out).done == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1e-3}, "holds a run with rate 0.01, not 0.001: use another --out"),
        ({"config": RefreshConfig(budget=7, stride=None)}, "holds a run with config"),
    ],
)
def test_a_folder_is_of_one_recipe(
    begin: Callable[..., Run], whole: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        begin(whole, **changes)


def test_a_folder_of_something_else(begin: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for place in (tmp_path, tmp_path / "notes"):
        with pytest.raises(ValueError, match="is something else than a training run"):
            begin(place)


def test_a_wrong_path_to_the_data_can_be_mended(begin: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder: 'nowhere.jsonl'"):
        begin(tmp_path / "out", data="nowhere.jsonl")
    begin(tmp_path / "out")
    with pytest.raises(ValueError, match="holds a run with data"):
        begin(tmp_path / "out", data="nowhere.jsonl")


def test_an_optimiser_that_is_not_installed(
    tiny: Path, tokenizer: PreTrainedTokenizerFast, documents: Path, tmp_path: Path
) -> None:
    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ValueError, match=r"--optimizer adamw_8bit cannot be used: .*bitsandbytes"):
        Run(model_of(tiny), tokenizer, recipe(documents), tmp_path / "out", optimizer="adamw_8bit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 200}, "the model has 128 positions: lower --length"),
        ({"batch": 3}, "batch 3 is not made of whole"),
        ({"lora": 4}, "--lora needs peft"),
    ],
)
def test_what_cannot_be_trained(
    begin: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "out", **changes)


def test_a_loss_that_is_no_number_ends_the_run(begin: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is nan at step \d: give another --out and a lower --rate"):
        begin(tmp_path / "out", rate=1e30).train()


def test_adapters_are_trained_and_merged_also_after_a_stop(
    begin: Callable[..., Run], tmp_path: Path
) -> None:
    pytest.importorskip("peft")

    def stop(done: int, steps: int) -> None:
        if done == 3:
            raise Killed

    run = begin(tmp_path / "whole", lora=2)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train()
    with pytest.raises(Killed):
        begin(tmp_path / "stopped", lora=2).train(stop)
    begin(tmp_path / "stopped", lora=2).train()
    after, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped")
    )
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("_proj" in name for name in changed), "only the weights under adapters change"
    assert all(torch.equal(other[name], after[name]) for name in after)


def test_the_command_line(
    run: Callable[..., Any],
    last_json: Callable[[Any], Any],
    tiny: Path,
    documents: Path,
    tmp_path: Path,
) -> None:
    arguments = ["train", "--model", tiny, "--data", documents, "--out", tmp_path / "out", "--json"]
    wide = ["--length", 40, "--tail", 32, "--budget", 6, "--batch", 2, "--steps", 2, "--limit", 2]
    methods = ["--methods", "full,refreshkv-fixed:stride=10"]
    result = last_json(run(*arguments, *wide, *methods, *OFTEN))
    assert [row["method"] for row in result["before"]] == ["full", "refreshkv-fixed:stride=10"]
    assert [row["examples"] for row in result["after"]] == [2, 2]
    assert result["before"][0]["score"] != result["after"][0]["score"]
    again = last_json(run(*arguments, *wide, *methods, *OFTEN))
    assert again == result, "a run that has ended changes nothing"
