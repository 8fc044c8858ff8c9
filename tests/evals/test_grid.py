"""Specs of methods, and which examples each cell gets."""

from __future__ import annotations

from typing import Any

import pytest

from refreshkv.evals.grid import Grid, batches, make_cells, parse_method, parse_methods
from tests.evals.toy import Perplexing, Toy


def grid(*tasks: Any, methods: tuple[str, ...] = ("full",), **settings: Any) -> Grid:
    return Grid(model="m", tasks=tasks, methods=parse_methods(methods), **settings)


@pytest.mark.parametrize(
    "text, settings",
    [
        ("refreshkv", {}),
        ("refreshkv:stride=10", {"stride": 10}),
        ("refreshkv:stride=never", {"stride": None}),
        ("refreshkv:stride=7:threshold=none", {"stride": 7, "threshold": None}),
        ("refreshkv:threshold=0.9:decide=head", {"threshold": 0.9, "decide": "head"}),
        ("snapkv-1:budget=64", {"budget": 64}),
        ("snapkv-1:budget=1.0", {"budget": 1.0}),
    ],
)
def test_spec(text: str, settings: dict[str, Any]) -> None:
    spec = parse_method(text)
    assert spec.text == text
    assert spec.name == text.split(":")[0]
    assert spec.settings == settings
    assert {k: type(v) for k, v in spec.settings.items()} == {
        k: type(v) for k, v in settings.items()
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("refeshkv", "unknown method 'refeshkv'; did you mean 'refreshkv'?"),
        ("refreshkv:strde=5", "method 'refreshkv:strde=5': .*'strde'.*'stride'"),
        ("refreshkv:stride", "method 'refreshkv:stride': write name:setting=value, not 'stride'"),
        ("refreshkv:", "write name:setting=value, not ''"),
        ("refreshkv:stride=", "write name:setting=value, not 'stride='"),
        ("refreshkv:stride=0", "stride must be an integer >= 1"),
        ("refreshkv:stride=5.5", "stride must be an integer >= 1"),
        ("refreshkv:threshold=high", "threshold is a cosine"),
        ("refreshkv:threshold=nan", "threshold is a cosine"),
        ("refreshkv:budget=none", "budget must be at least 1 token"),
        ("refreshkv:stride=5:stride=6", "stride is set twice"),
        ("refreshkv:stride=5:mode=exact", "unknown setting of refreshkv: 'mode'"),
    ],
)
def test_bad_spec(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_the_common_budget_is_checked_too() -> None:
    with pytest.raises(ValueError, match="budget must be at least 1 token"):
        parse_methods(["full"], 0)


@pytest.mark.parametrize(
    "text, own, common",
    [
        ("h2o", 0.125, 64),
        ("refreshkv-paper", 0.125, 64),
        ("refreshkv", 0.0625, 64),
        ("refreshkv:stride=5", 0.125, 64),
        ("refreshkv:budget=7", 7, 7),
    ],
)
def test_a_method_has_its_own_budget_where_none_is_given(text: str, own: Any, common: int) -> None:
    spec = parse_method(text)
    assert (spec.config(None).budget, spec.config(64).budget) == (own, common)


@pytest.mark.parametrize("mode", ["forced", "both"])
def test_the_lossless_mode_is_fed_nothing(mode: Any) -> None:
    message = r"method 'refreshkv:draft=4' .* task toy .* use --mode free, or .* refreshkv-paper$"
    with pytest.raises(ValueError, match=message):
        grid(Toy(), methods=("full", "refreshkv:draft=4"), mode=mode)
    grid(Toy(), methods=("refreshkv:stride=5", "refreshkv-fast"), mode=mode)
    with pytest.raises(
        ValueError, match=r"task perplexity .*; use another method such as refreshk"
    ):
        grid(Toy(), Perplexing(), methods=("refreshkv",))
    grid(Toy(), methods=("refreshkv",))


def test_order_of_cells() -> None:
    cells = make_cells(
        grid(Toy(), Perplexing(), methods=("full", "refreshkv-fast", "full"), mode="both"), len
    )
    assert [(cell.task.name, cell.method.text, cell.mode) for cell in cells] == [
        ("toy", "full", "free"),
        ("toy", "full", "forced"),
        ("toy", "refreshkv-fast", "free"),
        ("toy", "refreshkv-fast", "forced"),
        ("perplexity", "full", "forced"),
        ("perplexity", "refreshkv-fast", "forced"),
    ]
    assert cells[0].key(cells[0].examples[1]) == "toy|full|free|0001"


@pytest.mark.parametrize("mode", ["free", "forced", "both"])
def test_perplexity_is_always_forced(mode: Any) -> None:
    assert [cell.mode for cell in make_cells(grid(Perplexing(), mode=mode), len)] == ["forced"]


def test_no_answer_to_feed() -> None:
    assert [c.mode for c in make_cells(grid(Toy(answers=False), mode="both"), len)] == ["free"]
    with pytest.raises(ValueError, match="task toy has no gold answer to feed; use mode free"):
        make_cells(grid(Toy(answers=False), mode="forced"), len)


def test_batches_are_what_is_left_and_bring_the_methods_of_the_same_examples_together() -> None:
    cells = make_cells(grid(Toy(), methods=("full", "refreshkv"), limit=5), len)
    done = {"toy|full|free|0001": "", "toy|refreshkv|free|0004": ""}
    found = [
        [(cell.method.text, [example.id for example in examples]) for cell, examples in group]
        for group in batches(cells, done, 3)
    ]
    assert found == [
        [("full", ["0000", "0002"]), ("refreshkv", ["0000", "0001", "0002"])],
        [("full", ["0003", "0004"]), ("refreshkv", ["0003"])],
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"limit": 0}, "limit must be at least 1; got 0"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"mode": "fed"}, "mode must be 'free', 'forced' or 'both'; got 'fed'"),
    ],
)
def test_bad_grid(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(Toy(), **settings)
    with pytest.raises(ValueError, match="no tasks; name at least one"):
        grid()
