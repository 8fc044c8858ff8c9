"""The training recipe on tiny sizes: windows, structured start, deterministic runs, resuming."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from experiments.objective import hidden_states
from experiments.recipe import FULL, SMOKE, Phase, Stage, llama_config
from experiments.structured_start import structured_start
from experiments.train import LOG, Trainer, train
from experiments.windows import make_batch, training_window
from refreshkv.demo import tokenizer as tk
from refreshkv.demo.prompts import TASKS, demo_task
from refreshkv.tasks import chain_of_key as chain
from refreshkv.tasks import html_to_tsv as html
from refreshkv.tasks import key_value as pairs
from refreshkv.tasks.task import Example

BACKEND = tk.build_backend()


@pytest.mark.parametrize("task", TASKS)
def test_loss_falls_on_answers_and_their_end_only(task: str) -> None:
    row, wanted, context = training_window(np.random.default_rng(0), BACKEND, task, 1200, 0.4)
    eos = BACKEND.token_to_id(tk.EOS)
    assert not any(wanted[:context])
    assert all(w for token, w in zip(row, wanted, strict=True) if token == eos)
    # Each stretch without loss after the context is one request, which follows an <eos>.
    starts = [i for i in range(context + 1, len(row)) if wanted[i - 1] and not wanted[i]]
    requests = {BACKEND.token_to_id(phrase) for phrase in (chain.RULE, html.ASK, pairs.ASK)}
    assert starts
    assert all(row[i - 1] == eos and row[i] in requests for i in starts)


@pytest.mark.parametrize("task", TASKS)
def test_a_window_reads_like_a_prompt_of_its_task(task: str) -> None:
    """One question of a window, put after its context, is answered rightly by what follows."""
    row, wanted, context = training_window(np.random.default_rng(3), BACKEND, task, 1500, 0.5)
    begin = context
    for _ in range(9):  # the first question whose answer is complete and whose first key is free
        start = begin + wanted[begin:].index(True)
        end = start + wanted[start:].index(False)
        prompt = BACKEND.decode(row[1:context] + row[begin:start], skip_special_tokens=False)
        answer = BACKEND.decode(row[start : end - 1], skip_special_tokens=False)
        if not (task == "chain-of-key" and not prompt.endswith("Chain of ten keys:\n")):
            break
        begin = end
    lines = [line.removeprefix(chain.LINE) for line in prompt.splitlines()]
    example = Example("0", prompt, 0, answer, {"context": lines})
    assert demo_task(task, 2048).score(example, answer).value == 1
    assert prompt.endswith("\n")


def test_batches_are_deterministic_and_shift_only_the_questions() -> None:
    a, b = (make_batch(np.random.default_rng(1), BACKEND, Stage(256, 6, 1)) for _ in range(2))
    assert all(
        np.array_equal(getattr(a, f), getattr(b, f)) for f in ("tokens", "answer", "positions")
    )
    steps = np.diff(a.positions, axis=1)
    assert ((steps != 1).sum(axis=1) <= 1).all()
    assert (steps >= 1).all()
    assert (steps > 1).any()


def test_a_gap_in_positions_does_not_hide_the_context() -> None:
    model = LlamaForCausalLM(llama_config(SMOKE)).eval()
    tokens = torch.randint(3, 99, (1, 8))
    positions = torch.tensor([[0, 1, 2, 3, 50, 51, 52, 53]])
    other = tokens.clone()
    other[0, 0] += 1
    states = [hidden_states(model, t, positions) for t in (tokens, other)]
    assert (states[0] - states[1])[0, -1].abs().max() > 0


@torch.no_grad()
def test_structured_start_finds_the_follower_of_a_repeated_ngram() -> None:
    model = LlamaForCausalLM(llama_config(FULL)).eval()
    structured_start(model, seed=0)
    model.set_attn_implementation("eager")
    # 300 random tokens, then a part of them again: layer 1 must look one past the first copy.
    first = torch.randint(259, 449, (1, 300), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([first, first[:, 100:150]], dim=1)
    weights = model(tokens, output_attentions=True).attentions[1]  # [1, H, L, L]
    rows = torch.arange(310, 349)
    assert weights[0, 0, rows, rows - 300 + 100 + 1].mean() > 0.5


def test_structured_start_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="3\\+ layers"):
        structured_start(LlamaForCausalLM(llama_config(replace(SMOKE, layers=2))))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    return out, train(SMOKE, out, device="cpu", log_every=1)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


def test_smoke_run_is_deterministic_and_logged(smoke_run, tmp_path) -> None:
    out, folder = smoke_run
    again = train(SMOKE, tmp_path, device="cpu", log_every=1)
    first, second = weights_of(folder), weights_of(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert set(records[-1]["lines_right"]) >= set(TASKS)
    assert (folder / "tokenizer.json").exists()
    assert (folder / "generation_config.json").exists()


def test_resumed_run_ends_with_the_same_weights(smoke_run, tmp_path) -> None:
    _, folder = smoke_run
    trainer = Trainer(SMOKE, tmp_path, "cpu", log_every=1)
    trainer.run(stages=1)
    log = tmp_path / LOG
    # What a crash in the middle of the next stage leaves behind must not be kept twice.
    log.write_text(log.read_text() + json.dumps({"step": 3}) + "\n")
    resumed = weights_of(train(SMOKE, tmp_path, device="cpu", log_every=1))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    expected = weights_of(folder)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(SMOKE, seed=1), tmp_path, device="cpu")


def test_phases_may_be_added_to_a_finished_run(tmp_path) -> None:
    train(SMOKE, tmp_path, device="cpu", log_every=1)
    more = replace(SMOKE, phases=(*SMOKE.phases, Phase("more", (Stage(96, 1, 1),), 1e-3, 0.5)))
    train(more, tmp_path, device="cpu", log_every=1)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["smoke", "smoke", "smoke", "more"]
    longer = replace(SMOKE, phases=(replace(SMOKE.phases[0], peak_rate=1.0), *more.phases[1:]))
    with pytest.raises(ValueError, match="another recipe"):
        train(longer, tmp_path, device="cpu")
