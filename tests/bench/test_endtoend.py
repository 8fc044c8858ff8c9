"""`bench.endtoend`: `generate` in every mode, timed as a user gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from refreshkv.bench import endtoend
from refreshkv.bench.checks import WrongResultError
from refreshkv.bench.record import read
from refreshkv.exact import ExactLayer

SMALL: dict[str, Any] = {
    **{"shape": "demo", "context": 48, "batch": 2, "new": 9, "turns": 2},
    **{"device": "cpu", "dtype": "float32", "progress": False},
}
NAMES = ["dynamic", "full", "lossless", "fast", "published"]


def test_every_mode(tmp_path: Path) -> None:
    path = tmp_path / "generate.csv"
    found = endtoend.run(**SMALL, results=path)
    assert list(found["variants"]) == NAMES and found["notes"] == {}
    for name, one in found["variants"].items():
        assert one["new_tokens"] == 9 and one["prefill_s"] > 0
        assert one["tokens_per_s"] > 0 and one["later_tokens_per_s"] > 0
        if name in ("dynamic", "full", "lossless"):
            assert one["same_tokens"] == 9
    rows = read(path)
    assert [(row["turn"], row["variant"]) for row in rows] == [
        (turn, name) for turn in (1, 2) for name in NAMES
    ]
    for row in rows:  # 2 rows of 8 tokens after the first
        assert row["tokens_per_s"] == pytest.approx(16 / row["decode_s"], rel=2e-3)
        assert (row["shape"], row["context"], row["batch"], row["new"]) == ("demo", 48, 2, 9)


def test_the_bundled_model_on_prompts_of_its_own() -> None:
    given = {**SMALL, "shape": "bundled", "context": 256, "new": 12, "turns": 1}
    found = endtoend.run(**given, skip=("fast", "published"))
    assert list(found["variants"]) == ["dynamic", "full", "lossless"]
    assert {one["same_tokens"] for one in found["variants"].values()} == {12}
    assert found["shape"] == "bundled"
    with pytest.raises(ValueError, match=r"need \d+ positions, the bundled model has"):
        endtoend.run(**{**given, "new": 10**6})


def test_rows_are_there_when_a_run_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = endtoend._generate, []

    def generate(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == len(NAMES) + 4:  # the fourth that is timed
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(endtoend, "_generate", generate)
    path = tmp_path / "generate.csv"
    with pytest.raises(KeyboardInterrupt):
        endtoend.run(**SMALL, results=path)
    assert [row["variant"] for row in read(path)] == NAMES[:3]


def test_wrong_tokens_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ExactLayer.verify
    monkeypatch.setattr(ExactLayer, "verify", lambda *given: -right(*given))
    with pytest.raises(WrongResultError, match=r"lossless: token \d differs from transformers'"):
        endtoend.run(**SMALL)


def test_16_bits_report_how_many_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ExactLayer.verify
    monkeypatch.setattr(ExactLayer, "verify", lambda *given: -right(*given))
    given = {**SMALL, "dtype": "float16", "turns": 1}
    found = endtoend.run(**given, skip=("fast", "published"))
    assert found["variants"]["full"]["same_tokens"] == 9
    assert found["variants"]["lossless"]["same_tokens"] < 9


def test_what_finds_no_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = endtoend._generate

    def generate(model: Any, inputs: Any, name: str, new: int) -> Any:
        if name in ("dynamic", "fast"):
            raise torch.OutOfMemoryError("no room")
        return right(model, inputs, name, new)

    monkeypatch.setattr(endtoend, "_generate", generate)
    found = endtoend.run(**SMALL)
    assert list(found["variants"]) == ["full", "lossless", "published"]
    assert found["notes"]["fast"] == "left out: OutOfMemoryError: no room"
    assert found["variants"]["full"]["same_tokens"] is None
