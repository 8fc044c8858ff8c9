"""Presets in files: settings that somebody measured on their own model, as JSON.

    {"settings": {"mode": "exact", "budget": 0.0625, ...}, "model": "...", "version": "...", "measured": {...}}

`settings` alone counts; the other keys say where they come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from refreshkv import __version__
from refreshkv.config import RefreshConfig, check_names, names_of
from refreshkv.text import reason

KEYS: Mapping[str, type] = {"settings": dict, "model": str, "version": str, "measured": dict}
_LARGEST = 1 << 20  # bytes; what is larger was not written as a preset


def load_preset(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a file that `refreshkv compare --write-preset` wrote, for `attach(model, preset=...)`.

    Raises:
        ValueError: a file that cannot be read, is no such JSON, or holds an unknown setting, a value out of range or
            one without effect; one line that names the file.
    """
    try:
        return _settings(Path(path))
    except ValueError as error:
        raise ValueError(f"preset file {os.fspath(path)!r}: {error}") from None


def write_preset(
    path: Path, config: RefreshConfig, *, model: str, measured: Mapping[str, Any]
) -> None:
    """Write settings with what was `measured` of them (plain numbers) on a model.

    Raises:
        OSError: the file cannot be written.
    """
    settings = vars(config)
    unread = RefreshConfig.unread(settings)
    record = {
        "settings": {name: value for name, value in settings.items() if name not in unread},
        "model": model,
        "version": __version__,
        "measured": measured,
    }
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _settings(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({reason(error)}); check the path") from None
    if len(data) > _LARGEST:
        raise ValueError("is too large for a preset; write one by 'refreshkv compare'")
    try:
        record = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"is not JSON ({reason(error)}); write one by 'refreshkv compare'"
        ) from None
    if not isinstance(record, dict) or "settings" not in record:
        raise ValueError("needs {\"settings\": {...}}; write one by 'refreshkv compare'")
    check_names("key", record, KEYS)
    for name, value in record.items():
        if not isinstance(value, KEYS[name]):
            raise ValueError(f"{name} is no {'object' if KEYS[name] is dict else 'text'}")
    settings: dict[str, Any] = record["settings"]
    check_names("setting", settings, names_of(RefreshConfig))
    if RefreshConfig(**settings).mode == "full":
        raise ValueError("mode 'full' is no preset; use --mode full")
    return settings


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")
