"""Runs in processes of their own: one that is killed, two that share the work, weights in shards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from refreshkv.training.run import Run
from tests.training.runs import (
    OFTEN,
    OPTIONS,
    environment,
    metrics,
)


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
from refreshkv.training.run import Run
from tests.training.runs import model_of, recipe

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
