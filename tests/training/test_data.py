"""Documents become whole sequences, the same after every restart; recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from refreshkv import RefreshConfig
from refreshkv.training.data import Collator, Sequences, prepare
from refreshkv.training.recipe import Recipe
from tests.training.runs import (
    LENGTH,
    TAIL,
    recipe,
)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "epochs has no effect beside steps; leave one out"),
        (
            {"keep": "budget", "config": RefreshConfig(mode="mixed", budget=3)},
            "keep has no effect in mode 'mixed'",
        ),
    ],
)
def test_nothing_is_ignored(documents: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(documents, **changes)


def test_the_defaults_are_the_papers() -> None:
    paper = Recipe(model="m", data="d")
    assert (paper.length, paper.tail, paper.config.budget) == (8192, 50, 2048)
    assert (paper.rate, paper.batch, paper.epochs, paper.warmup) == (5e-6, 64, 1, 20)
    assert (paper.config.stride, paper.config.pool_kernel, paper.keep) == (None, 7, "all")


def test_the_documents_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/training.md makes them by these lines; a few of them here."""
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    lines = guide.split("```python\n")[1].split("```")[0]
    assert lines.count("limit=400") == 1
    monkeypatch.chdir(tmp_path)
    exec(lines.replace("limit=400", "limit=2"), {})
    rows = [json.loads(line) for line in (tmp_path / "tables.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all("<table>" in row["text"] for row in rows)
