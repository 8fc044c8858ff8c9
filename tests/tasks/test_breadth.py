"""The families of `tasks.breadth`: deterministic, of the length asked for, consistent with their own scores."""

from __future__ import annotations

import re
from functools import cache

import pytest

from refreshkv.demo.tokenizer import build_backend
from refreshkv.tasks import make_task
from refreshkv.tasks.breadth import LEAST_USED, PREFIX, TASKS
from refreshkv.tasks.html_to_tsv import ASK, CAPTION_END, CELL, HEAD_CELL
from refreshkv.tasks.key_value import INTRO
from refreshkv.tasks.task import Example

BACKEND = build_backend()
FAMILIES = [name.removeprefix(PREFIX) for name in TASKS]


def tokens(text: str) -> int:
    return len(BACKEND.encode(text, add_special_tokens=False).ids)


def fresh(name: str, seed: int, limit: int, length: int = 1024) -> list[Example]:
    return list(make_task(PREFIX + name, length=length).examples(tokens, seed, limit))


@cache
def made(name: str) -> list[Example]:
    return fresh(name, 0, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_depend_on_seed_and_number_only(name: str) -> None:
    examples = made(name)
    assert fresh(name, 0, 1) == examples[:1]
    assert len({example.id for example in examples}) == 2
    assert len({example.prompt for example in [*examples, *fresh(name, 1, 1)]}) == 3


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_use_the_length_and_answers_fit(name: str, length: int) -> None:
    examples = made(name) if length == 1024 else fresh(name, 0, 1, length)
    assert examples
    for example in examples:
        assert LEAST_USED * length <= tokens(example.prompt) <= length
        assert tokens(example.answer) < example.max_new_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gold_answer_scores_one_and_nothing_scores_zero(name: str) -> None:
    task = make_task(PREFIX + name)
    for example in made(name):
        score = task.score(example, example.answer)
        assert score.value == 1.0 and set(score.parts) == {1.0}
        assert task.score(example, "").value == 0.0


def test_the_middle_column_is_left_out() -> None:
    for example in made("table-skip"):
        page, _, request = example.prompt.rpartition(ASK)
        header, *rows = (line.split("\t") for line in example.answer.splitlines())
        caption, _, named = request.strip().partition(CAPTION_END)
        assert named.split(HEAD_CELL) == header
        table = page.split(f"<caption>{caption}</caption>")[1].split("</table>")[0]
        cells = [re.findall("<t[hd]>(.*?)</t[hd]>", line) for line in table.splitlines()]
        assert [row[::2] for row in cells if len(row) == 3] == [header, *rows]


def test_reversed_lines_are_the_last_ones() -> None:
    for example in made("reversed"):
        *lines, request = example.prompt.removeprefix(INTRO).splitlines()
        assert example.answer.splitlines() == lines[:-7:-1]
        assert request.endswith(",".join(line.split(":")[0] for line in lines[:-7:-1]))


def test_interleaved_answers_alternate() -> None:
    for example in made("interleaved"):
        lines = example.answer.splitlines()
        for line in lines[::2]:
            assert f"<tr><td>{line}\n" in example.prompt
        for row in lines[1::2]:
            assert "\n" + row.replace("\t", CELL) + "</td></tr>" in example.prompt


def test_an_unknown_family_is_named_with_its_nearest() -> None:
    with pytest.raises(
        ValueError, match="unknown task 'breadth-table-5'; did you mean 'breadth-table-"
    ):
        make_task("breadth-table-5")
    with pytest.raises(ValueError, match="did you mean 'breadth-needle-new'"):
        make_task("breadth-needle-nee")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_length_that_is_too_short_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="raise the length"):
        fresh(name, 0, 1, length=8)
