"""The text model's recipe on tiny sizes: what is held out, the tokenizer, windows, and deterministic runs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from experiments import text_model as tm
from experiments.recipe import Phase, Stage
from experiments.structured_start import structured_start
from refreshkv.tasks.perplexity import Perplexity
from refreshkv.training.checkpoints import last_whole
from refreshkv.training.folder import METRICS

SMOKE = tm.TextRecipe(
    phases=(Phase("text", (Stage(32, 2, 2), Stage(64, 1, 1)), 1e-3, 0.5, warmup_steps=1),),
    vocabulary=320,
    hidden_size=128,
    intermediate_size=64,
    layers=3,
    smallest_file=200,
    held_out_share=0.3,
    held_out_files=3,
    smallest_held_out=500,
)
WORDS = ("def", "return", "self", "value", "<eos>", "the", "cache", "\n", "é漢")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A root with 30 texts, and four files that do not belong to the corpus."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(30):
        text = " ".join(WORDS[j] for j in rng.integers(len(WORDS), size=80 + 40 * (i % 3)))
        (root / f"file{i}.{('py', 'md', 'rst')[i % 3]}").write_text(text, encoding="utf-8")
    (root / "copy.txt").write_bytes((root / "file0.py").read_bytes())
    (root / "data.txt").write_text("12345 678 90\n" * 99)
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (root / "tests").mkdir()
    (root / "tests" / "test_it.py").write_text("assert it\n" * 99)
    return {"root": root}


@pytest.fixture(scope="module")
def run(roots, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, tm.train(SMOKE, roots, out, log_every=1, save_every=2)


def test_corpus_leaves_out_tests_data_copies_and_what_is_held_out(roots) -> None:
    corpus = tm.read_corpus(roots, SMOKE)
    names = {*corpus.training, *corpus.held_out}
    assert not names & {f"root/{name}" for name in ("data.txt", "latin.txt", "tests/test_it.py")}
    assert len({"root/copy.txt", "root/file0.py"} & names) <= 1
    assert not set(corpus.training.values()) & set(corpus.held_out.values())
    assert 1 <= len(corpus.held_out) <= SMOKE.held_out_files
    assert min(map(len, corpus.held_out.values())) >= SMOKE.smallest_held_out
    assert list(corpus.training) == list(tm.read_corpus(roots, SMOKE).training)


def test_no_text_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="no text to train on"):
        tm.read_corpus({"root": tmp_path}, SMOKE)


TOKENIZER = tm.train_tokenizer([" ".join(WORDS) * 50], SMOKE)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.lists(st.sampled_from((*WORDS, "<pad>"))).map("".join))
def test_any_text_round_trips(text: str) -> None:
    encoded = TOKENIZER(text).input_ids
    assert encoded[0] == TOKENIZER.bos_token_id == 1
    assert not set(encoded[1:]) & set(TOKENIZER.all_special_ids)
    assert TOKENIZER.decode(encoded, skip_special_tokens=True) == text


def test_windows_stay_in_one_file_where_it_is_long_enough() -> None:
    texts = ["ab" * 40, "cd", "ef" * 50]
    stream = tm.Stream(texts, TOKENIZER.backend_tokenizer)
    eos = TOKENIZER.eos_token_id
    assert [stream.tokens[end - 1] for end in stream.starts[1:]] == [eos] * 3
    for position in range(len(stream.tokens)):
        row = stream.window(position, 20)
        assert row[0] == TOKENIZER.bos_token_id and len(row) == 21
        in_short_file = stream.starts[1] <= position < stream.starts[2]
        assert (eos in row[1:-1]) == in_short_file
    assert len(stream.beginnings(20)) == 2


def test_smoke_run_writes_a_folder_that_loads_and_is_logged(run) -> None:
    out, folder = run
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def value <eos> é漢\n  return\n"
    encoded = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(encoded.input_ids[0], skip_special_tokens=True) == text
    assert encoded.input_ids[0, 0] == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert model(encoded.input_ids).logits.shape[-1] == SMOKE.vocabulary
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_held_out_folder_is_read_by_the_perplexity_task(run) -> None:
    out, folder = run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = Perplexity(length=64, scored=32, data=str(out / "held-out"))
    examples = task.examples(lambda text: len(tokenizer(text).input_ids), seed=0, limit=None)
    assert len(list(examples)) == len(list((out / "held-out").iterdir()))


def test_same_seed_gives_the_same_weights(run, roots, tmp_path) -> None:
    folders = [run[1], tm.train(SMOKE, roots, tmp_path, log_every=1, save_every=2)]
    first, second = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_was_stopped_ends_with_the_same_weights(
    run, roots, tmp_path, monkeypatch
) -> None:
    measured = []

    def stop(*_) -> dict:
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt  # at the last step, before its checkpoint
        return {}

    with monkeypatch.context() as patched:
        patched.setattr(tm, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            tm.train(SMOKE, roots, tmp_path, log_every=1, save_every=2)
    assert last_whole(tmp_path / "checkpoints")[1] == 2
    folders = [run[1], tm.train(SMOKE, roots, tmp_path, log_every=1, save_every=2)]
    first, second = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="holds a run with vocabulary 320, not 321"):
        tm.train(replace(SMOKE, vocabulary=321), roots, tmp_path)


def test_a_run_is_that_of_a_plain_loop(run, roots) -> None:
    out, folder = run
    texts = tm.read_corpus(roots, SMOKE).training.values()
    stream = tm.Stream(texts, tm.train_tokenizer(texts, SMOKE).backend_tokenizer)
    torch.manual_seed(SMOKE.seed)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder, dtype=torch.float32))
    structured_start(model, SMOKE.seed)
    matrices = [w for w in model.model.layers.parameters() if w.ndim == 2]
    norms = [w for w in model.parameters() if w.ndim < 2]
    others = [
        {"params": [model.lm_head.weight], "weight_decay": 0.05},
        {"params": norms, "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), fused=True)
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    plan = ((0, 0, 1e-3), (0, 1, 1e-3), (1, 0, 2 / 3 * 1e-3))
    for line, (number, index, rate) in zip(lines, plan, strict=True):
        rng = np.random.default_rng([SMOKE.seed, number, index])
        rows = stream.batch(rng, SMOKE.phases[0].stages[number])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert line["learning_rate"] == pytest.approx(rate)
    plain = model.to(torch.bfloat16).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        torch.testing.assert_close(weight, plain[name], atol=1e-4, rtol=2e-2)


def test_what_is_held_out_is_measured_by_its_beginnings(run, roots, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(run[1], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run[1])
    texts = list(tm.read_corpus(roots, SMOKE).held_out.values())
    held_out = tm.Stream(texts, tokenizer.backend_tokenizer)
    assert tm.measure(model, held_out) == {}, "all are shorter"
    monkeypatch.setattr(tm, "MEASURED", 64)
    monkeypatch.setattr(tm, "MEASURED_FILES", 2)
    losses = []
    for text in texts[:2]:
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, :65]
        losses.append(model(tokens, labels=tokens).loss.item())
    assert tm.measure(model, held_out)["held_out_64"] == pytest.approx(sum(losses) / 2, rel=1e-2)


def test_steps_follow_from_the_minutes() -> None:
    short, long = (tm.recipe_for(minutes).phases[0].stages for minutes in (1, 10))
    assert 9 < sum(s.tokens for s in long) / sum(s.tokens for s in short) < 11
    assert [stage.length for stage in long] == [512, 1024, 2048, 4096]
