"""`--tasks`, `--length` and `--task-option` become tasks with values of the right type."""

from __future__ import annotations

from typing import Any

import pytest

from refreshkv.cli.task_options import make_tasks
from refreshkv.tasks import options_of


def settings(names: str, *options: str, length: int = 500) -> list[dict[str, Any]]:
    return [vars(task) for task in make_tasks(names.split(","), length, options)]


def test_length_is_for_every_task_that_has_it() -> None:
    made = make_tasks(["chain-of-key", "ruler"], 500, ())
    assert len(made) == 14
    for task in made:
        assert task.length == 500  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "option, name, value",
    [
        ("summarization.max_new_tokens=12", "max_new_tokens", 12),
        ("summarization.max_new_tokens=none", "max_new_tokens", None),
        ("summarization.data=7", "data", "7"),  # text stays text
        ("summarization.data=a.b=c.jsonl", "data", "a.b=c.jsonl"),
        ("summarization.length=900", "length", 900),  # beats --length
    ],
)
def test_values(option: str, name: str, value: object) -> None:
    (made,) = settings("summarization", option)
    assert made[name] == value
    assert type(made[name]) is type(value)
    assert {**made, name: None} == {
        **options_of("summarization"),
        **({} if name == "length" else {"length": 500}),
        name: None,
    }


def test_an_option_for_a_group_goes_to_those_that_have_it() -> None:
    (made,) = settings("ruler-vt", "ruler-vt.length=600")
    assert made["length"] == 600
    assert {each["length"] for each in settings("ruler", "ruler.length=600")} == {600}


@pytest.mark.parametrize(
    "option, message",
    [
        ("summarization.length=5.5", "length must be an integer >= 1; got 5.5"),
        ("summarization.length=[1]", "length must be an integer"),
        ("summarization.max_new_tokens=few", "max_new_tokens must be an integer >= 1; got 'few'"),
        ("summarization=5", "is not TASK.NAME=VALUE"),
        (".length=5", "is not TASK.NAME=VALUE"),
        ("key-value.keys=5", "key-value is not among --tasks; add it, or leave the option out"),
        ("ruler.length=5", "ruler-niah-single-1 is not among --tasks"),
    ],
)
def test_bad_options(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tasks(["summarization"], 500, (option,))
