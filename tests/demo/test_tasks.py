"""Prompts of the demo tasks: deterministic, self-consistent, of the length asked for."""

from __future__ import annotations

import re

import pytest

from refreshkv.demo import tokenizer as tk
from refreshkv.demo.tasks import MIN_LENGTH, TASKS, make_prompt, score_lines

TOKENIZER = tk.build_tokenizer()


def split_prompt(task: str, seed: int, length: int = 512) -> tuple[list[str], str, list[str]]:
    """(context lines, the request's argument, answer lines)."""
    p = make_prompt(task, seed, length)
    assert p.prompt.endswith("\n")
    assert p.answer.endswith("\n")
    *context, request = p.prompt.removesuffix("\n").split("\n")
    answer = p.answer.removesuffix("\n").split("\n")
    assert len(answer) == p.answer_lines
    return context[1:], request.split(" ")[-1], answer


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_deterministic_and_differ_by_seed(task: str) -> None:
    assert make_prompt(task, 3, 512) == make_prompt(task, 3, 512)
    assert len({make_prompt(task, seed, 512).prompt for seed in range(10)}) == 10


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [MIN_LENGTH, 512, 1024, 4096])
def test_length_is_about_what_was_asked_for(task: str, length: int) -> None:
    for seed in range(4):
        actual = len(TOKENIZER(make_prompt(task, seed, length).prompt).input_ids)
        assert abs(actual - length) <= 0.06 * length + 24


@pytest.mark.parametrize("seed", range(5))
def test_chain_follows_from_the_context(seed: int) -> None:
    context, given, answer = split_prompt("chain-of-key", seed)
    successor = dict(line.split("-") for line in context)
    assert len(successor) == len(context), "every first word must be unique"
    for key in answer:
        follower = given.split("-")[1]
        given = f"{follower}-{successor[follower]}"
        assert key == given
    assert given.endswith("-.")
    assert 9 <= len(answer) <= 12


@pytest.mark.parametrize("seed", range(5))
def test_table_is_the_one_asked_for(seed: int) -> None:
    context, name, answer = split_prompt("html-to-tsv", seed)
    tables = re.findall(r"<table>\n(.*?)</table>", "\n".join(context), re.DOTALL)
    cells = [re.findall(r"<td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", t) for t in tables]
    (wanted,) = [rows for rows in cells if rows[0][0] == name]
    assert answer == ["\t".join(row) for row in wanted]
    assert 10 <= len(answer) <= 12


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_asked_for_in_order(seed: int) -> None:
    context, names, answer = split_prompt("key-value", seed)
    value = dict(line.split(":") for line in context)
    assert len(value) == len(context)
    assert answer == [f"{key}:{value[key]}" for key in names.split(",")]


def test_score_counts_lines_in_their_place() -> None:
    assert score_lines("a\nb\nc\n", "a\nb\nc\n") == (3, 3)
    assert score_lines("a\nb\nc\n", "a\nx\nc\nd\n") == (2, 3)
    assert score_lines("a\nb\nc\n", "b\nc\n") == (0, 3)
    assert score_lines("a\nb\nc\n", "a\nb") == (2, 3)
    assert score_lines("a\nb\n", "") == (0, 2)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'chain-of-keys'.*'chain-of-key'"):
        make_prompt("chain-of-keys", 0)
    with pytest.raises(ValueError, match="at least 128"):
        make_prompt("key-value", 0, 64)
    with pytest.raises(ValueError, match="seed"):
        make_prompt("key-value", -1)
