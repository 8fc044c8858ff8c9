"""The Python of README.md runs as written, block after block, as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    from refreshkv.demo.prompts import demo_task, make_prompt

    printed = capsys.readouterr().out
    example = make_prompt("html-to-tsv", seed=0, length=1024)
    parts = demo_task("html-to-tsv", 1024).score(example, printed.split("full steps")[0]).parts
    assert sum(parts) >= 0.8 * len(parts), printed
    assert "KV read" in printed
