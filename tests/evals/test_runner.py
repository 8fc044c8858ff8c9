"""A grid on the bundled model: what a record holds, and that nothing that happens on the way changes the results."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import refreshkv
from refreshkv import demo
from refreshkv.evals import records as recording
from refreshkv.evals.grid import Grid, parse_methods
from refreshkv.evals.launch import Team
from refreshkv.evals.runner import Run, run
from refreshkv.evals.store import RunError
from tests.evals.toy import Perplexing, Toy

METHODS = ("full", "refreshkv-paper", "snapkv-1")
METHOD = "refreshkv:stride=2:threshold=none"


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return demo.load()


def grid(*tasks: Any, methods: tuple[str, ...] = METHODS, **settings: Any) -> Grid:
    settings = {"model": "demo", "batch": 2, **settings}
    return Grid(tasks=tasks or (Toy(),), methods=parse_methods(methods), **settings)


def lines(out: Path) -> list[dict[str, Any]]:
    """Without what differs from run to run."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for record in found:
        assert record.pop("seconds") > 0
    return found


@pytest.fixture(scope="module")
def whole(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*loaded, grid(), out)
    return lines(out)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are decoded from here on, as `title`s."""
    seen: list[str] = []
    for name in ("generate", "feed"):
        original = getattr(recording.decoding, name)

        def watched(*args: Any, original: Any = original, **options: Any) -> Any:
            seen.extend(options["names"])
            return original(*args, **options)

        monkeypatch.setattr(recording.decoding, name, watched)
    return seen


def test_a_record_says_everything(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    task = Toy(words=20)
    summaries = run(model, tokenizer, grid(task, methods=(METHOD,), mode="both", seed=3), tmp_path)
    free, forced = lines(tmp_path)[0], lines(tmp_path)[3]
    (example, *_) = task.examples(len, 3, None)
    common = {
        "task": "toy",
        "task_settings": {"words": 20, "answers": True, "start": 0},
        "example": "0000",
        "seed": 3,
        "method": METHOD,
        "model": "demo",
        "dtype": "float32",
        "device": "cpu",
        "chat": False,
        "budget": 0.125,
        "prompt_tokens": len(tokenizer(example.prompt)["input_ids"]),
        "answer_tokens": len(tokenizer(example.answer, add_special_tokens=False)["input_ids"]),
    }
    for record, mode in ((free, "free"), (forced, "forced")):
        assert record["key"] == f"toy|{METHOD}|{mode}|0000"
        assert record["mode"] == mode
        assert record.items() >= common.items()
        assert record["settings"]["stride"] == 2
        assert record["settings"]["budget"] == 0.125
        assert record["versions"]["torch"] == torch.__version__
        steps = record["output_tokens"] - 1
        full = steps // 2  # at a fixed stride of 2
        assert set(record["layers"]) == {"0", "1", "2", "3"}
        for layer in record["layers"].values():
            assert layer == {"full_steps": full, "steps": steps}
        assert record["full_share"] == pytest.approx(full / steps)
        assert record["effective_stride"] == (pytest.approx(steps / full) if full else None)
        assert 0 < record["kv_read_share"] < 1
    assert free["metric"] == "first letters"
    assert free["score"] == task.score(example, free["output"]).value
    assert free["parts"] == list(task.score(example, free["output"]).parts)
    assert forced["metric"] == "lines right, fed"
    assert len(forced["parts"]) == 2
    assert forced["score"] == sum(forced["parts"]) / 2
    assert [row.mode for row in summaries] == ["free", "forced"]
    assert (tmp_path / "summary.csv").read_text().count("\n") == 3
    assert (tmp_path / "report.html").stat().st_size
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tasks"] == {"toy": {"words": 20, "answers": True, "start": 0}}


def test_perplexity_is_the_mean_of_what_was_fed(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    run(model, tokenizer, grid(Perplexing(), methods=("full",), limit=2), tmp_path)
    for record, example in zip(lines(tmp_path), Perplexing().examples(len, 0, 2), strict=True):
        gold = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([tokenizer(example.prompt)["input_ids"] + gold])
        labels = tokens.clone()
        labels[:, : -len(gold)] = -100
        with torch.no_grad():
            expected = float(model(tokens, labels=labels).loss)
        assert record["score"] == pytest.approx(expected, abs=1e-3)
        assert record["mode"] == "forced"
        assert record["output_tokens"] == record["answer_tokens"] == len(gold)


def test_batches_change_nothing(loaded: Any, whole: list[Any], tmp_path: Path) -> None:
    for batch in (1, 4):
        run(*loaded, grid(batch=batch), tmp_path / str(batch))
        assert lines(tmp_path / str(batch)) == whole


def test_the_lossless_mode_in_a_run(loaded: Any, tmp_path: Path) -> None:
    """Its outputs are those of full attention, however they are batched, at half of the others' budget."""
    for batch in (1, 3):
        out = tmp_path / str(batch)
        full, exact = run(*loaded, grid(methods=("full", "refreshkv"), batch=batch), out)
        assert (full.score, full.output_tokens) == (exact.score, exact.output_tokens)
        found = lines(out)
        for one, other in zip(found[:3], found[3:], strict=True):
            assert one["output"] == other["output"]
            assert (other["budget"], other["settings"]["mode"]) == (0.0625, "exact")
            assert other["passes_per_token"] > 0
            assert one["passes_per_token"] is None


def test_the_budget_that_was_used(loaded: Any, tmp_path: Path) -> None:
    methods = ("snapkv-1", "refreshkv", "refreshkv:budget=9")
    for budget, used in ((None, [0.125, 0.0625, 9]), (40, [40, 40, 9])):
        out = tmp_path / str(budget)
        run(*loaded, grid(methods=methods, budget=budget, limit=1), out)
        assert [record["budget"] for record in lines(out)] == used
        assert json.loads((out / "config.json").read_text())["budget"] == budget
    with pytest.raises(ValueError, match="made with budget None, now it is 40; use another --out"):
        Run(*loaded, grid(methods=methods, budget=40, limit=1), tmp_path / "None")


def test_done_is_not_done_again(
    loaded: Any, whole: list[Any], decoded: list[str], tmp_path: Path
) -> None:
    run(*loaded, grid(limit=1, methods=METHODS[:2]), tmp_path)
    assert decoded == ["toy, example 0000"] * 2
    decoded.clear()
    summaries = run(*loaded, grid(), tmp_path)
    assert decoded == [f"toy, example {i:04d}" for i in (1, 1, 0, 1, 2, 2, 2)]
    assert lines(tmp_path) == whole  # sorted too
    assert [row.examples for row in summaries] == [3, 3, 3]
    decoded.clear()
    run(*loaded, grid(limit=1), tmp_path)  # a lower limit forgets nothing
    assert decoded == []
    assert lines(tmp_path) == whole


def test_another_task_comes_after(loaded: Any, whole: list[Any], tmp_path: Path) -> None:
    run(*loaded, grid(), tmp_path)
    run(*loaded, grid(Perplexing(), methods=("refreshkv-paper",), limit=1), tmp_path)
    found = lines(tmp_path)
    assert found[:-1] == whole
    assert found[-1]["key"] == "perplexity|refreshkv-paper|forced|0000"


@pytest.mark.parametrize("moment", ["decode", "write", "finish"])
def test_a_stop_at_any_moment(
    moment: str,
    loaded: Any,
    whole: list[Any],
    decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """What was decoded before the batch that was under way is kept, and not decoded again."""

    class Stop(BaseException):
        pass

    def after(calls: int, original: Callable[..., Any]) -> Callable[..., Any]:
        left = [calls]

        def stopping(*args: Any, **options: Any) -> Any:
            if not left[0]:
                raise Stop
            left[0] -= 1
            return original(*args, **options)

        return stopping

    where = {
        "decode": (loaded[0], "generate", 3),
        "write": (os, "fsync", 4),  # one for config.json, three batches
        "finish": (refreshkv.evals.runner, "write_report", 0),
    }
    owner, name, calls = where[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, after(calls, getattr(owner, name)))
        with pytest.raises(Stop):
            run(*loaded, grid(), tmp_path)
    if moment == "write":  # a kill does not wait for the end of a line
        data = (tmp_path / "results.jsonl").read_bytes()
        (tmp_path / "results.jsonl").write_bytes(data[:-40])
    run(*loaded, grid(), tmp_path)
    assert lines(tmp_path) == whole
    again = 0 if moment == "finish" else 1  # the fourth batch has one example
    assert len(decoded) == len(whole) + again


def test_a_full_disk(
    loaded: Any, whole: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write, left = os.write, [2]

    def full(file: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return write(file, data if left[0] else data[:100])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        message = r"^cannot write '.*results.jsonl' \(No space left on device\); the results so far"
        with pytest.raises(RunError, match=message):
            run(*loaded, grid(), tmp_path)
    assert lines(tmp_path) == whole[:2]
    run(*loaded, grid(), tmp_path)
    assert lines(tmp_path) == whole


def test_other_settings_and_other_data_are_refused(loaded: Any, tmp_path: Path) -> None:
    run(*loaded, grid(Toy(), limit=1, methods=("full",)), tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"was made with toy\.words 30, now it is 31; use another"):
        Run(*loaded, grid(Toy(words=31)), tmp_path)
    with pytest.raises(ValueError, match="was made with seed 0, now it is 1; use another --out"):
        Run(*loaded, grid(Toy(), seed=1), tmp_path)

    class Changed(Toy):
        def examples(self, *args: Any) -> Any:
            return Toy(start=1).examples(*args)

    with pytest.raises(ValueError, match="holds toy, example 0000 with another prompt: the data"):
        Run(*loaded, grid(Changed()), tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_prompt_that_does_not_fit(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"toy, example 0000: \d+ tokens of prompt and 4 of outp"):
        Run(*loaded, grid(Toy(words=1500)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_score_that_is_not_finite(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fed = recording.decoding.feed
    monkeypatch.setattr(
        recording.decoding,
        "feed",
        lambda *args, **options: [_with_nan(each) for each in fed(*args, **options)],
    )
    with pytest.raises(RunError, match=r"the score of perplexity, example 0000 .* try another --d"):
        run(*loaded, grid(Perplexing(), methods=("full",)), tmp_path)
    assert lines(tmp_path) == []


def _with_nan(fed: Any) -> Any:
    fed.logprobs[0] = float("nan")
    return fed


def test_a_team_shares_the_batches_and_its_main_one_merges(
    loaded: Any, whole: list[Any], tmp_path: Path
) -> None:
    """Two processes after one another; tests/cli/test_eval.py has them side by side."""
    first = Run(*loaded, grid(), tmp_path, team=Team(0, 2))
    second = Run(*loaded, grid(), tmp_path, team=Team(1, 2))
    assert {len(each.todo) for each in (first, second)} == {3}
    for each in (first, second):
        each.decode()
    assert (tmp_path / "results.jsonl").read_bytes() == b""
    assert second.finish() == []
    assert len(first.finish()) == 3
    assert lines(tmp_path) == whole
    assert not list(tmp_path.glob("results-*"))
    first.directory.close()


class Bar:
    def __init__(self, total: int) -> None:
        self.total, self.done, self.said, self.closed = total, 0, [], False

    def update(self, count: int) -> None:
        self.done += count

    def set_description(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        self.closed = True


def test_progress_counts_what_is_left(loaded: Any, tmp_path: Path) -> None:
    bars: list[Bar] = []

    def progress(total: int) -> Bar:
        bars.append(Bar(total))
        return bars[-1]

    run(*loaded, grid(methods=("full",), limit=1), tmp_path, progress=progress)
    run(*loaded, grid(methods=("full", "snapkv-1"), limit=2), tmp_path, progress=progress)
    assert [(bar.total, bar.done, bar.closed) for bar in bars] == [(1, 1, True), (3, 3, True)]
    assert bars[1].said == ["toy, full", "toy, snapkv-1"]
