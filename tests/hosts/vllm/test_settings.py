"""What a server may be told, and what it says to the rest."""

from __future__ import annotations

from typing import Any

import pytest

from refreshkv.config import RefreshConfig, make_config
from refreshkv.hosts.vllm.settings import HostSettings, ServerSettings, read


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"refreshkv": {}}])
def test_the_mixed_mode_without_being_told(additional: object) -> None:
    assert read(additional) == ServerSettings(make_config("fast"), HostSettings())


@pytest.mark.parametrize(
    "given, config",
    [
        ({"budget": 64}, RefreshConfig(mode="mixed", budget=64)),
        ({"mode": "mixed", "skip": 0.0}, make_config("fast", skip=0.0)),
        ({"stride": 7}, make_config("paper-llama", stride=7)),
        ({"mode": "refresh"}, make_config("paper-llama")),
        ({"preset": "paper-qwen", "budget": 100}, make_config("paper-qwen", budget=100)),
        ({"mode": "full"}, make_config(None, mode="full")),
        ({"stride": 1, "threshold": None}, make_config("paper-llama", stride=1, threshold=None)),
    ],
    ids=str,
)
def test_settings_are_those_of_the_package(given: dict[str, Any], config: RefreshConfig) -> None:
    before = dict(given)
    assert read({"refreshkv": given}).config == config
    assert given == before, "what vLLM was given is changed"


def test_settings_of_the_host() -> None:
    told = read({"refreshkv": {"stagger": False, "log_interval": 0, "stride": 3}})
    assert told.host == HostSettings(stagger=False, log_interval=0.0)
    assert told.config.stride == 3


@pytest.mark.parametrize(
    "given, says",
    [
        ("mixed", "must be an object"),
        ([1], "must be an object"),
        ({"budgte": 64}, "budget"),
        ({"preset": "fsat"}, "fast"),
        ({"budget": -1}, "budget"),
        ({"mode": "mixed", "stride": 3}, "stride has no effect"),
        ({"mode": "exact"}, "mode 'exact' drafts and verifies"),
        ({"preset": "default"}, "mode 'exact' drafts and verifies"),
        ({"stride": 3, "recent": 16}, "recent is not available in vLLM"),
        ({"preset": "lse-drop"}, "is not available in vLLM"),
        ({"stagger": False}, "stagger has no effect in mode 'mixed'"),
        ({"log_interval": -1}, "log_interval is a number of seconds from 0"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(given: object, says: str) -> None:
    with pytest.raises(ValueError, match=r"^--additional-config \{\"refreshkv\": ") as error:
        read({"refreshkv": given})
    assert says in str(error.value) and "\n" not in str(error.value)
