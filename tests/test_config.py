"""`RefreshConfig` takes what makes sense and names, in one line, what does not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from refreshkv.config import (
    PRESETS,
    Exact,
    RefreshConfig,
    Rounding,
    Schedule,
    Selection,
    make_config,
    names_of,
)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("budget", v) for v in (0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, "2048", None)],
        *[("stride", v) for v in (0, -5, 1.5, True, "5")],
        *[("threshold", v) for v in (math.nan, 2, -1.01, math.inf, True, "0.85")],
        *[("pool_kernel", v) for v in (0, -7, 2, 6, 3.0, True, None)],
        *[("decide", v) for v in ("heads", None, ["layer"])],
        *[("group_reduction", v) for v in ("sum", None)],
        *[("mode", v) for v in ("partial", None, True)],
        *[("recent", v) for v in (-1, 1.0, True, "16", None)],
        *[("successor", v) for v in (-1, 2.0, True, None)],
        *[("window", v) for v in (0, -32, 32.0, True, None)],
        *[("anchor", v) for v in (-0.01, 1.01, 2, math.nan, math.inf, True, "0.25", None)],
        *[("trigger", v) for v in ("lse", None, True, ["query"])],
        *[("drop", v) for v in (0, 0.0, -4.0, math.nan, True, "4", None)],
        *[("draft", v) for v in (0, -8, 8.0, True, None)],
        *[("drafter", v) for v in ("full", None, True)],
        *[("skip", v) for v in (-0.01, 1.01, 2, math.nan, True, "0.05", None)],
        *[(bits, v) for bits in ("key_bits", "value_bits") for v in (0, 7, 16, 2.0, True, None)],
    ],
)
def test_a_bad_value_is_named_in_one_line(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        RefreshConfig(**{setting: value})
    assert setting in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("budget", v) for v in (1, 10**6, 1.0, 1e-9)],
        *[("stride", v) for v in (1, 1000, None)],
        *[("threshold", v) for v in (-1, -1.0, 0, 1, 1.0, None)],
        *[("pool_kernel", v) for v in (1, 7, 63)],
        *[("decide", v) for v in ("layer", "head")],
        *[("group_reduction", v) for v in ("max", "mean")],
        *[("mode", v) for v in ("refresh", "mixed", "exact", "full")],
        *[("recent", v) for v in (0, 16, 10**6)],
        *[("successor", v) for v in (0, 2, 10**6)],
        *[("window", v) for v in (1, 32, 10**6)],
        *[("anchor", v) for v in (0, 0.0, 0.25, 1, 1.0)],
        *[("trigger", v) for v in ("query", "lse-drop")],
        *[("drop", v) for v in (1e-9, 4, 4.0, math.inf)],
        *[("draft", v) for v in (1, 8, 1000)],
        *[("drafter", v) for v in ("partial", "mixed")],
        *[("skip", v) for v in (0, 0.0, 0.5, 1, 1.0)],
        *[(bits, v) for bits in ("key_bits", "value_bits") for v in (1, 2, 6)],
    ],
)
def test_the_edges_of_every_range_are_valid(setting: str, value: Any) -> None:
    beside: dict[str, Any] = {
        **{name: {"mode": "exact"} for name in ("draft", "drafter")},
        **{name: {"mode": "mixed"} for name in ("key_bits", "value_bits", "skip")},
        "drop": {"trigger": "lse-drop"},
    }
    settings = {**beside.get(setting, {}), setting: value}
    assert getattr(RefreshConfig(**settings), setting) == value


@pytest.mark.parametrize(
    ("budget", "prompt", "expected"),
    [
        (0.125, 16384, 2048),
        (0.1, 30, 3),
        (0.1, 31, 4),
        (0.07, 100, 7),  # 7.000000000000001 in floating point
        (0.7, 10, 7),
        (0.125, 1, 1),
        (1e-9, 100, 1),
        (0.125, 0, 1),
        (2048, 100, 2048),
        (1, 100, 1),
        *[(1.0, n, n) for n in (1, 3, 7, 999, 131072)],
    ],
)
def test_a_share_is_rounded_up_and_tokens_stay(
    budget: int | float, prompt: int, expected: int
) -> None:
    resolved = RefreshConfig(budget=budget).resolve_budget(prompt)
    assert resolved == expected
    assert isinstance(resolved, int)


def test_a_config_never_changes_and_a_copy_is_checked_again() -> None:
    config = RefreshConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stride = 10  # type: ignore[misc]
    with pytest.raises(ValueError, match="stride"):
        dataclasses.replace(config, stride=0)
    with pytest.raises(TypeError):
        RefreshConfig(0.5)  # type: ignore[misc]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_says_what_it_says(name: str) -> None:
    config = make_config(name)
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]


def test_presets_are_read_only() -> None:
    with pytest.raises(TypeError):
        PRESETS["mine"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        PRESETS["default"]["stride"] = 1  # type: ignore[index]


def test_settings_replace_those_of_the_preset() -> None:
    assert make_config() == make_config("default")
    changed = make_config("paper-qwen", stride=10, recent=3)
    assert (changed.stride, changed.threshold, changed.recent) == (10, 0.95, 3)
    with pytest.raises(ValueError, match="budget"):
        make_config("paper-qwen", budget=0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("stride", 5),
        ("stride", None),
        ("threshold", 0.9),
        ("threshold", None),
        ("decide", "head"),
        ("trigger", "lse-drop"),
        ("score_only", True),
        ("score_only", False),
    ],
)
def test_the_schedule_belongs_to_the_lossy_mode(setting: str, value: Any) -> None:
    """It asks for that mode where no preset is named, and has no place in the other."""
    assert make_config(**{setting: value}) == make_config("paper-llama", **{setting: value})
    message = f"^{setting} has no effect in mode 'exact'; leave it out, or set mode='refresh'$"
    for lossless in ({"preset": "default"}, {"mode": "exact"}):
        with pytest.raises(ValueError, match=message):
            make_config(**lossless, **{setting: value})
    assert getattr(make_config("default", mode="refresh", **{setting: value}), setting) == value


THEMES = (Selection, Schedule, Exact, Rounding)
NO_EFFECT = "{} has no effect {}; leave it out{}"
LSE, QUERY, STRIDE = (
    ("with trigger 'lse-drop'", ", or set trigger='query'"),
    ("with trigger 'query'", ", or set trigger='lse-drop'"),
    ("without a stride", ", or set one"),
)


@pytest.mark.parametrize(
    ("setting", "why", "given"),
    [
        ("drop", QUERY, {"drop": 1.0}),
        ("drop", QUERY, {"drop": 1.0, "stride": None}),
        ("threshold", LSE, {"trigger": "lse-drop", "threshold": 0.5}),
        ("threshold", LSE, {"trigger": "lse-drop", "threshold": None}),
        ("decide", LSE, {"trigger": "lse-drop", "decide": "head", "stride": None}),
        ("threshold", STRIDE, {"stride": None, "threshold": 0.5}),
        ("decide", STRIDE, {"stride": None, "decide": "head"}),
        ("decide", ("without a threshold", ", or set one"), {"threshold": None, "decide": "head"}),
        *[
            (name, ("in mode 'refresh'", ", or set mode='exact'"), {"mode": "refresh", name: value})
            for name, value in {"draft": 3, "confidence": 0.5, "drafter": "mixed"}.items()
        ],
        *[
            (name, ("in mode 'refresh'", ", or set mode='mixed'"), {"mode": "refresh", name: value})
            for name, value in {"key_bits": 4, "value_bits": 4, "skip": 0.5}.items()
        ],
        *[
            (name, ("in mode 'mixed'", f", or set mode={mode!r}"), {"mode": "mixed", name: value})
            for mode, settings in {
                "refresh": {"stride": 3, "drop": 2.0, "recent": 1, "window": 8, "anchor": 0.5},
                "exact": {"draft": 3, "confidence": 0.5, "drafter": "mixed"},
            }.items()
            for name, value in settings.items()
        ],
        *[
            (
                name,
                (f"with drafter {drafter!r}", f", or set drafter={other!r}"),
                {"mode": "exact", "drafter": drafter, name: value},
            )
            for drafter, other, name, value in (
                ("partial", "mixed", "key_bits", 4),
                ("mixed", "partial", "recent", 4),
                ("mixed", "partial", "window", 8),
            )
        ],
        *[
            (name, ("in mode 'full'", ""), {"mode": "full", name: value})
            for name, value in {
                **{"stride": 3, "threshold": None, "decide": "head", "trigger": "lse-drop"},
                **{"drop": 2.0, "score_only": True, "draft": 3, "confidence": 0.5},
                **{"pool_kernel": 1, "group_reduction": "mean", "recent": 1, "successor": 1},
                **{"window": 8, "anchor": 0.5, "key_bits": 4, "drafter": "mixed"},
            }.items()
        ],
    ],
)
def test_a_setting_that_nothing_reads_is_refused(
    setting: str, why: tuple[str, str], given: dict[str, Any]
) -> None:
    expected = NO_EFFECT.format(setting, *why)
    for make in (RefreshConfig, make_config):
        with pytest.raises(ValueError, match="no effect") as caught:
            make(**given)
        assert str(caught.value) == expected
    if setting in names_of(Schedule) and "mode" not in given:  # the theme checks itself
        with pytest.raises(ValueError, match="no effect"):
            Schedule(**given)


def test_what_is_given_counts_though_it_be_the_default() -> None:
    """A constructor cannot tell; `make_config` can."""
    assert RefreshConfig(mode="exact", stride=5) == RefreshConfig(mode="exact")
    with pytest.raises(ValueError, match="stride has no effect in mode 'exact'"):
        make_config(mode="exact", stride=5)
    with pytest.raises(ValueError, match="threshold has no effect with trigger 'lse-drop'"):
        make_config("lse-drop", threshold=0.85)


def test_a_preset_gives_way_to_what_replaces_it() -> None:
    assert make_config("lse-drop", trigger="query").drop == RefreshConfig().drop
    assert make_config("default", drafter="mixed") == RefreshConfig(
        mode="exact", drafter="mixed", budget=0.0625, draft=16, confidence=0.5
    )
    assert make_config("default", mode="refresh") == RefreshConfig(
        budget=0.0625, recent=16, successor=2, window=32, anchor=0.5
    )
    with pytest.raises(ValueError, match=r"^preset 'fast' has no effect in mode 'full'; leave it "):
        make_config("fast", mode="full")


def test_a_copy_that_would_not_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="stride has no effect in mode 'exact'"):
        dataclasses.replace(RefreshConfig(stride=3), mode="exact")


def test_the_themes_are_the_settings() -> None:
    themes = [name for theme in THEMES for name in names_of(theme)]
    assert [*themes, "mode"] == names_of(RefreshConfig)
    for theme in THEMES:
        assert isinstance(RefreshConfig(), theme)
        assert {n: getattr(theme(), n) for n in names_of(theme)}.items() <= vars(
            RefreshConfig()
        ).items()
    with pytest.raises(ValueError, match="drop is a number of nats"):
        Schedule(trigger="lse-drop", drop=0)


@pytest.mark.parametrize(
    ("given", "mode", "budget"),
    [
        ({}, "exact", 0.0625),
        ({"mode": "exact"}, "exact", 0.0625),
        ({"budget": 64}, "exact", 64),
        ({"draft": 3, "confidence": 0.5}, "exact", 0.0625),
        ({"window": 8, "anchor": 0.0, "recent": 1, "successor": 0}, "exact", 0.0625),
        ({"mode": "full"}, "full", 0.0625),
        ({"mode": "refresh"}, "refresh", 0.125),
        ({"stride": 5, "budget": 64}, "refresh", 64),
        ({"mode": "mixed"}, "mixed", 0.05),
        ({"mode": "mixed", "budget": 64, "key_bits": 4}, "mixed", 64),
    ],
)
def test_the_preset_that_is_meant_where_none_is_named(
    given: dict[str, Any], mode: str, budget: int | float
) -> None:
    config = make_config(**given)
    assert (config.mode, config.budget) == (mode, budget)
    if mode != "full":
        preset = {"refresh": "paper-llama", "mixed": "fast", "exact": "default"}[mode]
        assert config == make_config(preset, **given)


def test_an_unknown_preset_names_its_nearest_neighbour() -> None:
    with pytest.raises(
        ValueError, match=r"^unknown preset 'paper-lama'; did you mean 'paper-llama'\?.*$"
    ):
        make_config("paper-lama")
    with pytest.raises(ValueError, match=r"^unknown preset 'zzz'; \(one of: default, ") as caught:
        make_config("zzz")
    assert all(name in str(caught.value) for name in PRESETS)


@pytest.mark.parametrize(
    ("wrong", "right"), [("tresshold", "threshold"), ("budgets", "budget"), ("pool", "pool_kernel")]
)
def test_an_unknown_setting_names_its_nearest_neighbour(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"^unknown setting '{wrong}'; did you mean '{right}'\?"):
        make_config(**{wrong: 1})
