"""Presets in files: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import refreshkv
from refreshkv import RefreshConfig, load_preset, make_config
from refreshkv.presets import write_preset


def written(path: Path, config: RefreshConfig) -> dict[str, Any]:
    write_preset(path, config, model="some/model", measured={"speedup": 1.25, "texts": 3})
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    "config",
    [
        *(make_config(name) for name in refreshkv.PRESETS),
        make_config(budget=1, draft=3),
        make_config(budget=1.0),
        make_config("lse-drop", ring="indexed"),
        make_config("fast", key_bits=4),
        make_config(stride=None),
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, config: RefreshConfig) -> None:
    record = written(tmp_path / "own.json", config)
    assert set(record) == {"settings", "model", "version", "measured"}
    assert (record["model"], record["version"]) == ("some/model", refreshkv.__version__)
    settings = load_preset(tmp_path / "own.json")
    assert make_config(settings) == config
    assert isinstance(make_config(settings).budget, type(config.budget))
    # Only what is read: a preset can then be built upon.
    assert not set(settings) & set(RefreshConfig.unread(vars(config)))


def test_settings_build_on_a_preset_of_ones_own(tmp_path: Path) -> None:
    written(tmp_path / "own.json", make_config(draft=4))
    settings = load_preset(tmp_path / "own.json")
    assert make_config(settings, confidence=0.5) == make_config(draft=4, confidence=0.5)
    # What the new mode leaves without effect is dropped, as from a preset by name.
    assert make_config(settings, mode="refresh") == make_config("default", mode="refresh")
    with pytest.raises(ValueError, match="stride has no effect"):
        make_config(settings, stride=3)
    with pytest.raises(ValueError, match="has no effect in mode 'full'"):
        make_config(settings, mode="full")
    with pytest.raises(ValueError, match="unknown setting 'drift'; did you mean 'draft'"):
        make_config({"drift": 3})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"settings": {"budget": NaN}}', "NaN is no number"),
        (b"[]", 'needs {"settings"'),
        (b'{"budget": 0.5}', 'needs {"settings"'),
        (b'{"settings": {}, "modle": "a"}', "unknown key 'modle'; did you mean 'model'"),
        (b'{"settings": [1]}', "settings is no object"),
        (b'{"settings": {}, "model": 3}', "model is no text"),
        (b'{"settings": {"budgets": 3}}', "unknown setting 'budgets'; did you mean 'budget'"),
        (b'{"settings": {"budget": 0}}', "budget must be at least 1"),
        (b'{"settings": {"budget": "half"}}', "budget must be"),
        (b'{"settings": {"stride": 3, "mode": "exact"}}', "stride has no effect in mode 'exact'"),
        (b'{"settings": {"mode": "full"}}', "mode 'full' is no preset"),
        (b" " * ((1 << 20) + 1), "is too large"),
    ],
)
def test_wrong_content_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "own.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"preset file '.*own\.json': ") as caught:
        load_preset(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for wrong in (tmp_path / "no.json", tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read .*; check the path"):
            load_preset(wrong)
