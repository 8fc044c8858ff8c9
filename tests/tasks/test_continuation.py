"""Continuations: the prompts of a perplexity, scored by the words with which an output begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from refreshkv.tasks import make_task


def words(text: str) -> int:
    return len(text.split())


def test_the_document_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(300)))
    options = {"data": str(tmp_path), "length": 100, "scored": 32}
    (example,) = make_task("continuation", **options).examples(words, 0, None)
    (fed,) = make_task("perplexity", **options).examples(words, 0, None)
    assert example == fed
    assert (words(example.prompt), example.max_new_tokens) == (100, 32)
    task = make_task("continuation", **options)
    assert task.kind == "generate"
    right = " ".join(f"word{i}" for i in range(100, 132))
    for output, score in (
        (right, 1),
        (f"\n{right} word132 and more", 1),
        (right[: right.index(" word116")], 0.5),
        (right.replace("word108", "sword"), 0.25),
        ("sword " + right, 0),
        ("", 0),
    ):
        assert task.score(example, output).value == score


def test_bad_settings_name_this_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"continuation: no data; give continuation\.data: "):
        next(make_task("continuation").examples(words, 0, 1))
    with pytest.raises(ValueError, match="continuation: scored must be an integer >= 32; got 3"):
        make_task("continuation", scored=3)
