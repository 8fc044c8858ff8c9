"""The lines of `results.jsonl`: how one is written, what it has to hold, and how they are read back.

What stands before a line break was written whole; half a line at the end is what a kill has left. A line that is whole
and no result is named and never counted: a score that is none would spoil every mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
BASELINE = "full"  # the method that others are compared with: full attention
Record = dict[str, Any]

_NAMES = ("task", "method", "mode", "example")  # in the order of a key
_TEXTS = (*_NAMES, "key", "prompt_sha256")
_NUMBERS = ("prompt_tokens", "output_tokens")
_NUMBERS_OR_NULL = ("answer_tokens", "full_share", "kv_read_share", "passes_per_token", "kl")


def line_of(record: Record) -> str:
    """Strict JSON on one line, ASCII only."""
    return json.dumps(record, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[Record]:
    """The records of a file; half a line at its end is left out.

    Raises:
        ValueError: a line that is no result, by its number, and why.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line, parse_constant=_refuse)
                check(record)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"line {number} of '{path}' is not a result ({error}); remove that line and run again"
                ) from None
            yield record


def check(record: object) -> None:
    """Raise `ValueError`, with what is wrong, unless all that is counted or looked up is there and of its kind."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for name in (*_TEXTS, "score"):
        if name not in record:
            raise ValueError(f"no {name!r}")
    for name in _TEXTS:
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is {record[name]!r}, which is no text")
    if record["mode"] not in ("free", "forced"):
        raise ValueError(f"mode is {record['mode']!r}, which is none")
    key = "|".join(record[name] for name in _NAMES)
    if record["key"] != key:
        raise ValueError(f"key is {record['key']!r}, but its parts make {key!r}")
    counted = {"score": record["score"]}
    counted |= {name: record.get(name, 0) for name in _NUMBERS}
    counted |= {name: record[name] for name in _NUMBERS_OR_NULL if record.get(name) is not None}
    for place, layer in _mapping(record, "layers").items():
        steps = _mapping({place: layer}, place)
        counted |= {f"layers.{place}.{name}": steps.get(name) for name in ("steps", "full_steps")}
    parts = record.get("parts", [])
    counted |= {
        f"parts.{i}": part for i, part in enumerate(parts if isinstance(parts, list) else [parts])
    }
    said = record.get("said")
    if said is not None and not (
        isinstance(said, list) and all(type(token) is int for token in said)
    ):
        raise ValueError(f"said is {said!r}, which is no list of tokens")
    for name, value in counted.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{name} is {value!r}, which is no number")


def _mapping(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = record.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {found!r}, which is no object")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
