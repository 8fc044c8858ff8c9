"""`refreshkv demo`, with a stand-in for the bundled model (and once, marked slow, with the real one)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from refreshkv.cli.side_by_side import METHODS, Excerpt, Report, Row
from refreshkv.cli.side_by_side_view import plain, show
from refreshkv.demo.prompts import TASKS, make_prompt

SMALL = ("demo", "--length", 400, "--examples", 2, "--tasks", "key-value,chain-of-key")


def test_method_names() -> None:
    assert [method.name for method in METHODS] == [
        "full",
        "streaming-llm",
        "snapkv",
        "refreshkv-paper",
        "refreshkv-fast",
        "refreshkv",
    ]


@pytest.mark.usefixtures("small_demo")
def test_json(run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    result = run(*SMALL, "--seed", 5, "--json")
    record = last_json(result)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert {name: record[name] for name in ("model", "length", "budget", "seed", "examples")} == {
        "model": "demo",
        "length": 400,
        "budget": 0.125,
        "seed": 5,
        "examples": 2,
    }
    tasks = ("key-value", "chain-of-key")
    assert [(row["task"], row["method"]) for row in record["results"]] == [
        (task, method.name) for task in tasks for method in METHODS
    ]
    for row in record["results"]:
        total = {"key-value": 5, "chain-of-key": 10}[row["task"]] * 2
        assert row["lines_total"] == total
        assert 0 <= row["lines_right"] <= total
        assert row["output_tokens"] > 0
        assert set(row) == set(Row.__dataclass_fields__)
    full, _, snapkv, _, fast, exact = record["results"][:6]
    assert full["kv_read_share"] == 1
    assert snapkv["full_share"] == 0
    assert snapkv["effective_stride"] is None
    assert snapkv["kv_read_share"] < fast["kv_read_share"] < 1
    assert (exact["lines_right"], exact["output_tokens"]) == (
        full["lines_right"],
        full["output_tokens"],
    )
    for task, shown in zip(tasks, record["shown"], strict=True):
        assert shown["task"] == task
        assert shown["expected"] == make_prompt(task, shown["seed"], 400).answer
        assert list(shown["outputs"]) == [method.name for method in METHODS]


@pytest.mark.usefixtures("small_demo")
def test_table(run: Callable[..., Any]) -> None:
    result = run(*SMALL)
    assert result.exit_code == 0, result.stderr
    for expected in (
        *(method.label for method in METHODS),
        "key-value",
        "lines right",
        "KV read",
        "expected",
        "x ",
    ):
        assert expected in result.stdout
    assert result.stderr == ""


def test_generated_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """No markup is obeyed, and no escape sequence reaches the terminal."""
    text = "[red]a[/]\x1b[2J\n[/]\n"
    row = Row("key-value", "full", 0, 1, 9, 1.0, 1.0, 1.0, 0.1, 0.1)
    show(Report((row,), (Excerpt("key-value", 0, "x:y\n", {"full": text}),)), 200)
    out = capsys.readouterr().out
    assert "[red]a[/]" in out
    assert "\x1b" not in out
    assert plain("a\tb\x07\u202e").plain == "a b\\x07\\u202e"


@pytest.mark.parametrize("task", TASKS)
def test_print_prompt(task: str, run: Callable[..., Any]) -> None:
    result = run("demo", "--print-prompt", task, "--seed", 3, "--length", 400)
    assert result.exit_code == 0
    assert result.stdout_bytes == make_prompt(task, 3, 400).prompt.encode()


@pytest.mark.usefixtures("small_demo")
def test_printed_prompt_goes_into_generate(
    run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    prompt = run("demo", "--print-prompt", "html-to-tsv", "--seed", 3, "--length", 300).stdout_bytes
    result = run(
        "generate",
        "--model",
        "demo",
        "--mode",
        "refresh",
        "--max-new-tokens",
        4,
        "--json",
        stdin=prompt,
    )
    assert last_json(result)["model"] == "demo"


@pytest.mark.slow
def test_refreshing_beats_evicting(run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    """The point of the demo, on the real model."""
    record = last_json(run("demo", "--examples", 6, "--json"))
    right = dict.fromkeys((method.name for method in METHODS), 0)
    for row in record["results"]:
        right[row["method"]] += row["lines_right"]
    total = sum(row["lines_total"] for row in record["results"] if row["method"] == "full")
    assert right["full"] > 0.8 * total
    assert right["snapkv"] < right["refreshkv-paper"] < right["refreshkv-fast"]
    assert right["refreshkv"] == right["full"]
