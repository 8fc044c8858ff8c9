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
    "token-select",
    "int4-keys",
    "int2-keys",
    "oracle-topk",
    "refreshkv",
    "refreshkv-fast",
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
    "recent": 5,
    "successor": 1,
    "window": 8,
    "anchor": 0.3,
    "trigger": "lse-drop",
    "drop": 2.0,
    "score_only": True,
    "draft": 3,
    "confidence": 0.4,
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
    config = method.config(**given)
    assert {key: getattr(config, key) for key in given} == given
    kept = {key: value for key, value in method.settings.items() if key not in given}
    assert {key: getattr(config, key) for key in kept} == kept
    assert "budget" in method.uses
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapvk", "unknown method 'snapvk'; did you mean 'snapkv'"),
        ("nonsense", "one of: full, h2o, int2-keys"),
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
    assert found["refreshkv-fast"] == make_config("fast")
    assert found["refreshkv-fixed"] == dataclasses.replace(paper, threshold=None)
    assert found["no-refresh"] == dataclasses.replace(paper, stride=None)
    assert found["no-full-attention"] == dataclasses.replace(paper, score_only=True)
    for name in ("refreshkv-paper", "no-reselection"):
        assert found[name] == paper
    for name in NAMES:
        if find(name).make is not None:
            assert found[name].mode == "refresh"
    assert find("refreshkv").config("paper-qwen", stride=10) == RefreshConfig(
        stride=10, threshold=0.95
    )
