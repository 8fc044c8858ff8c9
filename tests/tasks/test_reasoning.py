"""Problems with one answer: equal as mathematics is right, and only the last box counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from refreshkv.tasks import make_task
from refreshkv.tasks.reasoning import ASK, HUB
from refreshkv.tasks.task import Example


def examples(path: Path, *rows: object, limit: int | None = None, **options: Any) -> list[Example]:
    pytest.importorskip("math_verify")
    file = path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(make_task("reasoning", data=str(file), **options).examples(len, 0, limit))


def test_a_problem_is_asked_as_it_is(tmp_path: Path) -> None:
    rows = [{"problem": " What is 1 + 1?\n", "answer": 2}, {"problem": "b", "answer": "$\\pi$"}]
    first, second = examples(tmp_path, *rows, max_new_tokens=7)
    assert first.prompt == "What is 1 + 1?" + ASK
    assert "\\boxed{}" in first.prompt
    assert (first.max_new_tokens, first.answer) == (7, None)  # there is nothing to feed
    assert [example.facts["answer"] for example in (first, second)] == ["2", "\\pi"]
    assert "line 2 of" in second.facts["source"]
    assert examples(tmp_path, *rows, limit=1, max_new_tokens=7) == [first]


@pytest.mark.parametrize(
    "answer, output, right",
    [
        ("\\frac{1}{2}", "It is \\boxed{0.5}.", 1),
        ("\\frac{1}{2}", "\\boxed{2}. Wait, no: \\boxed{\\dfrac12}", 1),
        ("\\frac{1}{2}", "\\boxed{1/2}. Wait, no: \\boxed{2}", 0),
        ("\\frac{1}{2}", "It is 1/2.", 0),
        ("\\frac{1}{2}", "It is \\boxed{1/", 0),
        ("\\frac{1}{2}", "", 0),
        ("204", "\\boxed{0204}", 1),
        ("204", "\\boxed{205}", 0),
        ("\\text{Evelyn}", "\\boxed{Evelyn}", 1),
        ("[0,2)", "\\boxed{[0, 2)}", 1),
        ("[0,2)", "\\boxed{[0, 2]}", 0),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "\\boxed{(3, \\pi/2)}", 1),
    ],
)
def test_the_last_box_counts(tmp_path: Path, answer: str, output: str, right: int) -> None:
    task = make_task("reasoning", data=str(tmp_path / "problems.jsonl"))
    (example,) = examples(tmp_path, {"problem": "p", "answer": answer})
    assert task.score(example, output).value == right


@pytest.mark.parametrize(
    "row, message",
    [
        ({"problem": "p"}, "'answer' is missing"),
        ({"problem": " ", "answer": "1"}, "'problem' must be a text"),
        ({"problem": "p", "answer": 0.5}, "'answer' must be a text"),
        ({"problem": "p", "answer": True}, "'answer' must be a text"),
    ],
)
def test_lines_that_are_no_problem(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"line 1 of .*{message}"):
        examples(tmp_path, row)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be an integer >= 1"):
        make_task("reasoning", max_new_tokens=0)
    with pytest.raises(ValueError, match=r"no data; give reasoning\.data"):
        next(make_task("reasoning").examples(len, 0, 1))
    with pytest.raises(ValueError, match="did you mean 'math-500'"):
        next(make_task("reasoning", data="math500").examples(len, 0, 1))


def test_it_says_which_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    file = tmp_path / "problems.jsonl"
    file.write_text('{"problem": "p", "answer": "1"}\n')
    with pytest.raises(ValueError, match="pip install math-verify"):
        next(make_task("reasoning", data=str(file)).examples(len, 0, 1))


@pytest.mark.parametrize("name", HUB)
def test_sets_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    asked = []

    def load(id: str, subset: None, *, split: str, **_: Any) -> list[dict[str, Any]]:
        asked.append((id, split))
        return [{"problem": f"p{i}", "answer": str(i), "solution": "s"} for i in range(200)]

    monkeypatch.setattr("datasets.load_dataset", load)
    made = list(make_task("reasoning", data=name).examples(len, 0, None))
    assert len(made) == 100 and made[7].facts["answer"] == "7"
    assert asked == [
        {
            "math-500": ("HuggingFaceH4/MATH-500", "test"),
            "aime-2024": ("HuggingFaceH4/aime_2024", "train"),
        }[name]
    ]
