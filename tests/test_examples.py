"""Each file of examples/ runs by itself, and the bundled model's answers in it are the right ones."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from refreshkv.demo.prompts import make_prompt

FOLDER = Path(__file__).parents[1] / "examples"


LIST, PAGE = (make_prompt(task, seed=0, length=1024) for task in ("key-value", "html-to-tsv"))
ASKED = LIST.prompt.splitlines()[20:80:20]
EXPECTED = {
    "batch": ["  right"] * 3,
    "chat": ["model: " + line for line in ASKED],
    "pipeline": (LIST.answer or "").splitlines(),
    "several_questions": ASKED,
    "streaming": (PAGE.answer or "").splitlines(),
}


def test_every_example_is_run() -> None:
    assert sorted(EXPECTED) == sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line in EXPECTED[name]] == EXPECTED[name]
    assert "KV read" in printed[-1]
