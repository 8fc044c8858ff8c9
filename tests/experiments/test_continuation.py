"""Texts continued under several methods: what the table says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import continuation
from refreshkv import demo
from refreshkv.demo.prompts import make_prompt
from refreshkv.evals.encoding import answer_tokens


def test_the_lossless_mode_continues_as_full_attention_and_eviction_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = demo.load()
    prompt = make_prompt("key-value", seed=0, length=300).prompt
    (tmp_path / "text.txt").write_text(prompt + " filler" * 60, encoding="utf-8")
    length = len(answer_tokens(tokenizer, prompt))
    methods = ("refreshkv", "tova:budget=4")
    continuation.show("demo", str(tmp_path), length=length, new_tokens=24, methods=methods)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| `full`", "| `refreshkv`", "| `tova:budget=4`"]
    assert [row[1] for row in rows] == ["1/1", "1/1", "0/1"]
    assert rows[0][2:] == ["100.0", "100.0", "1 |"]
    assert float(rows[1][3]) >= float(rows[1][2]) > 5
    assert float(rows[1][4].rstrip(" |")) >= 1
