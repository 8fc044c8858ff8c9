"""The registry: what a name gives, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from refreshkv.config import RefreshConfig, make_config
from refreshkv.methods import METHODS, find

NAMES = [
    "full",
    "streaming-llm",
    "h2o",
    "snapkv",
    "snapkv-1",
    "pyramidkv",
    "tova",
    "quest",
    "oracle-topk",
    "refreshkv",
    "refreshkv-fixed",
    "refreshkv-paper",
    "no-refresh",
    "no-full-attention",
    "no-reselection",
]
SETTINGS: dict[str, Any] = {
    "budget": 64,
    "stride": 7,
    "threshold": 0.5,
    "decide": "head",
    "group_reduction": "mean",
    "pool_kernel": 3,
}


def test_the_methods_in_the_order_of_tables() -> None:
    assert list(METHODS) == NAMES
    assert [find(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_where_it_comes_from_and_takes_the_settings_it_uses(name: str) -> None:
    method = find(name)
    assert method.label and method.source and method.note
    assert len({m.label for m in METHODS.values()}) == len(METHODS)
    given = {key: SETTINGS[key] for key in method.uses}
    expected = make_config(**{**method.settings, **given})
    assert method.config(**given) == expected
    assert "budget" in method.uses
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapvk", "unknown method 'snapvk'; did you mean 'snapkv'"),
        ("nonsense", "one of: full, h2o, no-full-attention"),
        (None, "unknown method None"),
    ],
)
def test_an_unknown_name(name: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(name)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("h2o", {"stride": 5}, "unknown setting of h2o: 'stride'.*budget, group_reduction"),
        ("snapkv", {"pool_kernal": 5}, "did you mean 'pool_kernel'"),
        ("full", {"mode": "refresh"}, "unknown setting of full: 'mode'"),
        ("refreshkv-fixed", {"threshold": 0.5}, "unknown setting of refreshkv-fixed"),
        ("no-refresh", {"stride": 5}, "unknown setting of no-refresh"),
        ("tova", {"budget": 0}, "budget must be at least 1"),
        ("refreshkv-paper", {"preset": "paper-qwen"}, "drop preset='paper-qwen'"),
        ("quest", {"preset": "paper-qwen"}, "drop preset"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(
    name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find(name).config(**given)


def test_what_the_variants_set() -> None:
    default, paper = make_config(), make_config("paper-llama")
    found = {name: find(name).config() for name in NAMES}
    assert found["full"].mode == "full"
    assert found["refreshkv"] == default
    assert found["refreshkv-fixed"] == dataclasses.replace(default, threshold=None)
    assert found["no-refresh"] == dataclasses.replace(default, stride=None)
    for name in ("refreshkv-paper", "no-full-attention", "no-reselection"):
        assert found[name] == paper
    assert find("refreshkv").config("paper-qwen", stride=10) == RefreshConfig(
        stride=10, threshold=0.95
    )
