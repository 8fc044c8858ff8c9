"""The registry: what a name gives, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from refreshkv.config import PRESETS, RefreshConfig, make_config
from refreshkv.methods import METHODS, find

NAMES = [
    "full",
    "streaming-llm",
    "h2o",
    "snapkv",
    "snapkv-1",
    "pyramidkv",
    "tova",
    "citrus",
    "cascading",
    "subgen",
    "quest",
    "token-select",
    "kascade",
    "squeezed",
    "hip",
    "int4-keys",
    "int2-keys",
    "twilight",
    "kivi-4",
    "kivi-2",
    "critiprefill",
    "oracle-topk",
    "refreshkv",
    "refreshkv-fast",
    "refreshkv-lse-drop",
    "refreshkv-fixed",
    "refreshkv-paper",
    "no-refresh",
    "no-full-attention",
    "no-reselection",
]
GROUPED = {"budget": 64, "group_reduction": "mean"}
SELECTION = {**GROUPED, "pool_kernel": 3, "recent": 5, "successor": 1, "window": 8, "anchor": 0.3}
SNAPKV = {**GROUPED, "window": 8, "keep_window": False, "pool_kernel": 3}
QUERY = {**SELECTION, "stride": 7, "threshold": 0.5, "decide": "head"}
# All that a method takes at once.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"budget": 64},
    "streaming-llm": {"budget": 64, "sinks": 0},
    "h2o": GROUPED,
    "snapkv": SNAPKV,
    "snapkv-1": {**GROUPED, "pool_kernel": 3},
    "pyramidkv": {**SNAPKV, "beta": 5},
    "tova": {"budget": 64},
    "citrus": {"budget": 64, "chunk": 16, "window": 8},
    "cascading": {**GROUPED, "sinks": 2, "sub_caches": 3, "decay": 0.9},
    "subgen": {"budget": 64, "samples": 3, "seed": 7},
    "quest": {**GROUPED, "page_size": 4},
    "token-select": {"budget": 64, "threshold": None},
    "kascade": {
        **GROUPED,
        "group_reduction": "max",
        "anchors": "1-3",
        "dense_first": False,
        "window": 8,
    },
    "squeezed": {**GROUPED, "clusters": 0.2, "window": 8},
    "hip": {**GROUPED, "interval": 2},
    "int4-keys": GROUPED,
    "int2-keys": GROUPED,
    "twilight": {**GROUPED, "share": 0.5},
    "kivi-4": {"budget": 64},
    "kivi-2": {"budget": 64},
    "critiprefill": {"budget": 64},
    "oracle-topk": GROUPED,
    "refreshkv": {**SELECTION, "draft": 3, "confidence": 0.4},
    "refreshkv-fast": {"budget": 64, "key_bits": 4, "value_bits": 3},
    "refreshkv-lse-drop": {**SELECTION, "stride": 7, "drop": 2.0, "score_only": False},
    "refreshkv-fixed": {**SELECTION, "stride": 7, "score_only": True},
    "refreshkv-paper": QUERY,
    "no-refresh": SELECTION,
    "no-full-attention": QUERY,
    "no-reselection": QUERY,
}


def test_the_methods_in_the_order_of_tables() -> None:
    assert list(METHODS) == NAMES
    assert [find(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_where_it_comes_from_and_takes_the_settings_it_has(name: str) -> None:
    method, given = find(name), SETTINGS[name]
    assert method.label and method.source and method.note
    assert len({m.label for m in METHODS.values()}) == len(METHODS)
    assert set(given) <= set(method.names)
    if method.settings is not RefreshConfig:
        assert set(given) == set(method.names)
    config = method.config(**given)
    assert type(config) is method.settings
    expected = {**PRESETS.get(method.preset, {}), **method.fixed, **given}
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.for_cache().budget == 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["snapkv", "snapkv-1", "pyramidkv", "quest", "refreshkv"])
def test_a_cache_keeps_the_prompt_queries_that_a_method_looks_at(name: str) -> None:
    own = {"snapkv-1": 1, "quest": 1}.get(name, 32)
    assert find(name).config().for_cache().window == own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapvk", "unknown method 'snapvk'; did you mean 'snapkv'"),
        ("nonsense", "one of: cascading, citrus, critiprefill, full"),
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
        ("full", {"stride": 5}, "stride has no effect in mode 'full'"),
        ("refreshkv-fixed", {"trigger": "lse-drop"}, "unknown setting of refreshkv-fixed"),
        ("refreshkv-fixed", {"decide": "head"}, "decide has no effect without a threshold"),
        ("no-refresh", {"threshold": 0.5}, "threshold has no effect without a stride"),
        ("no-reselection", {"score_only": True}, "unknown setting of no-reselection"),
        ("refreshkv-fast", {"anchor": 0.5}, "anchor has no effect in mode 'mixed'"),
        ("refreshkv-lse-drop", {"threshold": 0.5}, "threshold has no effect with trigger 'lse-d"),
        ("snapkv-1", {"window": 32}, "unknown setting of snapkv-1: 'window'"),
        ("int4-keys", {"bits": 2}, "unknown setting of int4-keys: 'bits'"),
        ("tova", {"budget": 0}, "budget must be at least 1"),
        ("quest", {"page_size": 0}, "page_size must be an integer >= 1; got 0"),
        ("pyramidkv", {"beta": 2.5}, "beta must be an integer >= 1; got 2.5"),
        ("snapkv", {"window": None}, "window must be an integer >= 1; got None"),
        ("kascade", {"anchors": "3-2"}, "anchors names layers from 1 on, ascending, .*; got '3-2'"),
        ("kascade", {"anchors": 0}, "anchors names layers from 1 on, .*; got 0"),
        ("token-select", {"threshold": 2}, "threshold is a cosine in .*; got 2"),
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
    assert found["refreshkv-lse-drop"] == make_config("lse-drop")
    assert found["refreshkv-fixed"] == dataclasses.replace(paper, threshold=None)
    assert found["no-refresh"] == dataclasses.replace(paper, stride=None)
    assert found["no-full-attention"] == dataclasses.replace(paper, score_only=True)
    for name in ("refreshkv-paper", "no-reselection"):
        assert found[name] == paper
    for name in NAMES:
        if find(name).make is not None:
            assert found[name].mode == ("mixed" if name.startswith("kivi") else "refresh")
    assert (found["int4-keys"].bits, found["int2-keys"].bits) == (4, 2)
    assert find("refreshkv").config("paper-qwen", stride=10) == RefreshConfig(
        stride=10, threshold=0.95
    )
