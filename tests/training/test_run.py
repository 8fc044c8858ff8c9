"""Runs: what is trained on, going on after a kill, several processes, and what can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from refreshkv import RefreshConfig
from refreshkv.training.data import Collator, Sequences, prepare
from refreshkv.training.recipe import Recipe
from refreshkv.training.run import Run

LENGTH, TAIL = 40, 8
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "length": LENGTH,
    "tail": TAIL,
    "config": RefreshConfig(budget=6, stride=None),
    "batch": 4,
    "micro_batch": 2,
    "rate": 1e-2,
    "warmup": 2,
    "steps": 6,
}
# The same on the command line.
OPTIONS: list[Any] = ["--length", LENGTH, "--tail", TAIL, "--budget", 6, "--batch", 4]
OPTIONS += ["--micro-batch", 2, "--rate", 1e-2, "--warmup", 2, "--steps", 6]
OFTEN: list[Any] = ["--log-every", 1, "--save-every", 2, "--device", "cpu"]


def recipe(documents: Path, **changes: Any) -> Recipe:
    return Recipe(**{**SETTINGS, "data": str(documents), **changes})


def model_of(tiny: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def metrics(out: Path) -> list[dict[str, float]]:
    """What does not depend on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]


class Killed(BaseException):
    pass


@pytest.fixture
def begin(tiny: Path, tokenizer: PreTrainedTokenizerFast, documents: Path) -> Callable[..., Run]:
    """`begin(out, ...)`: a run of the tiny model; settings of the recipe may be changed."""

    def make(out: Path, **changes: Any) -> Run:
        asked = recipe(documents, **changes)
        return Run(model_of(tiny), tokenizer, asked, out, log_every=1, save_every=2)

    return make


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Path,
    tokenizer: PreTrainedTokenizerFast,
    documents: Path,
) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    Run(model_of(tiny), tokenizer, recipe(documents), out, log_every=1, save_every=2).train()
    return out


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
    with pytest.raises(ValueError, match="holds something else than a training run"):
        begin(tmp_path)


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


def test_sequences_are_whole_documents_cut(
    documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    asked = recipe(documents)
    about = prepare(asked, tokenizer, tmp_path / "data")
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    width = LENGTH + TAIL
    parts: dict[str, list[str]] = {"training": [], "validation": []}
    tests = []
    for number, text in enumerate(texts):  # all are long enough
        part = {1: "validation", 2: "test"}.get(number % 10, "training")
        if part == "test":
            tests.append(text)
        else:
            parts[part] += [text[at : at + width] for at in range(0, len(text) - width + 1, width)]
    for part, expected in parts.items():
        held = Sequences(tmp_path / "data" / f"{part}.bin", width)
        assert [tokenizer.decode(item["tokens"]) for item in held] == expected
        assert about["sequences"][part] == len(expected)
    kept = (tmp_path / "data" / "test.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in kept] == tests
    assert (about["read"], about["long_enough"]) == (24, 24)


def test_data_are_read_once_and_may_not_change(
    documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(documents.read_bytes())
    asked = recipe(copy)
    about = prepare(asked, tokenizer, tmp_path / "data")
    assert prepare(asked, tokenizer, tmp_path / "data") == about
    copy.write_bytes(copy.read_bytes() + b'{"text": "more"}\n')
    with pytest.raises(ValueError, match="was made with another source"):
        prepare(asked, tokenizer, tmp_path / "data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: write one JSON object a line"),
        (b'{"text": "a"}\n{"text": "', r"line 2 of .* is not JSON"),
        (b'{"words": "a"}\n', "the field 'text' is missing"),
        (b'{"text": "short"}\n', "0 of 1 documents have 40 \\+ 8 tokens, and at least 3"),
    ],
)
def test_data_that_will_not_do(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(recipe(tmp_path / "bad.jsonl"), tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_lengths_are_drawn_alike_after_a_restart(documents: Path) -> None:
    collate = Collator(recipe(documents, shortest=10))
    items = [{"number": n, "tokens": torch.arange(LENGTH + TAIL)} for n in range(30)]
    lengths = [collate([item])["input_ids"].shape[1] - TAIL for item in items]
    assert lengths == [collate([item])["input_ids"].shape[1] - TAIL for item in items]
    assert min(lengths) >= 10 and max(lengths) <= LENGTH and len(set(lengths)) > 10


@pytest.mark.parametrize(
    "changes", [{"rate": 0.0}, {"shortest": 41}, {"keep": "some"}, {"tail": 1}]
)
def test_a_recipe_names_what_is_wrong(documents: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        recipe(documents, **changes)


def test_the_defaults_are_the_papers() -> None:
    paper = Recipe(model="m", data="d")
    assert (paper.length, paper.tail, paper.config.budget) == (8192, 50, 2048)
    assert (paper.rate, paper.batch, paper.epochs, paper.warmup) == (5e-6, 64, 1, 20)
    assert (paper.config.stride, paper.config.pool_kernel, paper.keep) == (None, 7, "all")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def launched(
    arguments: list[Any], processes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """The command line in processes of its own."""
    command = [sys.executable, "-m"]
    if processes is not None:
        command += ["accelerate.commands.launch", "--cpu", "--num_processes", processes]
        command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--num_cpu_threads_per_process", 1, "-m"]
    command = [str(part) for part in (*command, "refreshkv", "train", *arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import AutoTokenizer
from tests.training.test_run import Run, model_of, recipe

def kill(done, steps):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)

tiny, documents, out = map(Path, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(tiny)
Run(model_of(tiny), tokenizer, recipe(documents), out, log_every=1, save_every=2).train(kill)
"""


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_bit_for_bit(
    begin: Callable[..., Run], tiny: Path, documents: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, tiny, documents, out]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    again = begin(out)
    assert again.done == 4
    again.train()
    ours, theirs = (load_file(one / "model" / "model.safetensors") for one in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    tiny: Path, documents: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", tiny, "--data", documents, "--out", out, "--no-evaluate"]
    ended = launched([*arguments, *OPTIONS, *OFTEN], processes=2)
    assert ended.returncode == 0, ended.stderr
    for ours, alone in zip(metrics(out), metrics(whole), strict=True):
        assert ours["step"] == alone["step"]
        for name in ("loss", "first_loss", "tail_loss", "eval_loss", "grad_norm"):
            if name in alone:
                assert ours[name] == pytest.approx(alone[name], rel=1e-4), (ours["step"], name)


SHARDED = """
import sys, torch
from torch.distributed.fsdp import fully_shard
from refreshkv import RefreshConfig
from refreshkv.training.objective import PartialTail
from refreshkv.training.tail import Tail
from tests.conftest import build
from tests.hosts.prompts import tokens

def step(model):
    with PartialTail(model, Tail(8, RefreshConfig(budget=6, stride=None))) as objective:
        losses = objective.losses(model(tokens(1, 50), use_cache=False).logits, tokens(1, 50))
        losses.mean.backward()
    return losses.mean.detach(), model.lm_head.weight.grad

torch.distributed.init_process_group("gloo")
alone, sharded = build("llama").train(), build("llama").train()
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(sharded)
(loss, gradient), (loss_sharded, part) = step(alone), step(sharded)
torch.testing.assert_close(loss_sharded, loss)
torch.testing.assert_close(part.full_tensor(), gradient)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_weights_in_shards_have_the_loss_and_gradients_of_whole_ones(tmp_path: Path) -> None:
    """FSDP2 itself: on CPUs accelerate takes DDP instead."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command.append(str(tmp_path / "sharded.py"))
    ended = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert ended.returncode == 0, ended.stderr


def test_adapters_are_trained_and_merged(begin: Callable[..., Run], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out"
    run = begin(out, lora=2)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train()
    after = load_file(out / "model" / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("_proj" in name for name in changed), "only the weights under adapters change"


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
