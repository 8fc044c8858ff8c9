"""The training recipe on tiny sizes: windows, structured start, deterministic runs, resuming."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from experiments.objective import LookAhead, hidden_states, next_token_loss
from experiments.recipe import FULL, SMOKE, Phase, Stage, llama_config
from experiments.structured_start import structured_start
from experiments.train import train
from experiments.windows import make_batch, training_window
from refreshkv.demo import tokenizer as tk
from refreshkv.demo.prompts import TASKS, demo_task
from refreshkv.tasks import chain_of_key as chain
from refreshkv.tasks import html_to_tsv as html
from refreshkv.tasks import key_value as pairs
from refreshkv.tasks.task import Example
from refreshkv.training.folder import METRICS

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
    return out, train(SMOKE, out, device="cpu", log_every=1, save_every=2)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_smoke_run_is_deterministic_and_logged(smoke_run, tmp_path) -> None:
    out, folder = smoke_run
    again = train(SMOKE, tmp_path, device="cpu", log_every=1, save_every=2)
    first, second = weights_of(folder), weights_of(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["step"] for line in lines_of(out)] == [1, 2, 3]
    assert set(lines_of(out)[-1]["lines_right"]) >= set(TASKS)
    assert (folder / "tokenizer.json").exists()
    assert (folder / "generation_config.json").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_run_is_that_of_a_plain_loop(smoke_run) -> None:
    out, folder = smoke_run
    torch.manual_seed(SMOKE.seed)
    model = LlamaForCausalLM(llama_config(SMOKE))
    structured_start(model, SMOKE.seed)
    heads = LookAhead(SMOKE.hidden_size, SMOKE.look_ahead)
    named = [*model.named_parameters(), *heads.named_parameters()]
    parts: dict[bool, list] = {True: [], False: []}
    for name, weight in named:
        parts[weight.ndim == 2 and "embed" not in name].append(weight)
    optimizer = torch.optim.AdamW(
        [
            {"params": parts[True], "weight_decay": 0.01},
            {"params": parts[False], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    steps = ((0, 0, 1e-3), (0, 1, 1e-3), (1, 0, 8e-4))
    for line, (number, index, rate) in zip(lines_of(out), steps, strict=True):
        rng = np.random.default_rng([SMOKE.seed, number, index])
        batch = make_batch(rng, BACKEND, SMOKE.phases[0].stages[number])
        tokens, answer, positions = (
            torch.from_numpy(part) for part in (batch.tokens, batch.answer, batch.positions)
        )
        with torch.autocast("cpu", torch.bfloat16):
            hidden = hidden_states(model, tokens[:, :-1], positions)
            loss = next_token_loss(model, hidden, tokens, answer)
            ahead = heads.loss(model, hidden, tokens, answer)
        (loss + 0.4 * ahead).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        for name, value in (("loss", loss.detach()), ("grad_norm", norm), ("learning_rate", rate)):
            assert line[name] == pytest.approx(float(value), rel=1e-5), name
    plain = model.to(torch.bfloat16).state_dict()
    for name, weight in weights_of(folder).items():
        torch.testing.assert_close(weight, plain[name].to(weight.dtype))


def test_a_run_that_was_stopped_ends_with_the_same_weights(
    smoke_run, tmp_path, monkeypatch
) -> None:
    _, folder = smoke_run

    def stop(model, tokens, *_) -> float:
        if tokens.shape[1] > SMOKE.phases[0].stages[0].length + 1:
            raise KeyboardInterrupt  # in the second stage, before its checkpoint
        return 0.0

    with monkeypatch.context() as patched:
        patched.setattr("experiments.train.teacher_forced", stop)
        with pytest.raises(KeyboardInterrupt):
            train(SMOKE, tmp_path, device="cpu", log_every=1, save_every=2)
    # What a crash leaves of the steps after the checkpoint must not be kept twice.
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps({"step": 3}) + "\n")
    resumed = weights_of(train(SMOKE, tmp_path, device="cpu", log_every=1, save_every=2))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    expected = weights_of(folder)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    with pytest.raises(ValueError, match="holds a run with seed 0, not 1: use another --out"):
        train(replace(SMOKE, seed=1), tmp_path, device="cpu")


def test_phases_may_be_added_to_a_run_that_has_ended(tmp_path) -> None:
    more = replace(SMOKE, phases=(*SMOKE.phases, Phase("more", (Stage(192, 1, 2),), 1e-3, 0.5)))
    folders = []
    for name, recipes in (("at once", [more]), ("added", [SMOKE, more])):
        for recipe in recipes:
            folders.append(train(recipe, tmp_path / name, device="cpu", log_every=1, save_every=2))
        phases = [line["phase"] for line in lines_of(tmp_path / name)]
        assert phases == ["smoke", "smoke", "smoke", "more", "more"]
    expected, added = weights_of(folders[0]), weights_of(folders[-1])
    assert all(torch.equal(expected[name], added[name]) for name in expected)
    longer = replace(SMOKE, phases=(replace(SMOKE.phases[0], peak_rate=1.0), *more.phases[1:]))
    with pytest.raises(ValueError, match="holds a run with phase smoke"):
        train(longer, tmp_path / "added", device="cpu")
