"""`refreshkv bench`: options reach `refreshkv.bench`, and its record is printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECORD = {
    "shape": "demo",
    "context": 64,
    "batch": 1,
    "budget": 8,
    "stride": None,
    "device": "a CPU",
    "dtype": "float32",
    "ms": {"partial": 1.25, "full": 2.5, "mix": 1.5},
    "ms_range": {"partial": [1.0, 2.0], "full": [2.0, 3.0]},
    "ratios": {"mix_over_static": 2.0, "mix_over_default": None},
}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run` was called with."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "refreshkv.bench.decode.run", lambda **options: (seen.update(options), RECORD)[1]
    )
    return seen


def test_options(
    given: dict[str, Any], run: Callable[..., Any], last_json: Callable[..., Any], tmp_path: Path
) -> None:
    result = run(
        *(
            "bench",
            "decode",
            "--shape",
            "demo",
            "--context",
            64,
            "--batch",
            2,
            "--budget",
            "8",
            "--stride",
            "never",
        ),
        *(
            "--device",
            "cpu",
            "--steps",
            3,
            "--threads",
            1,
            "--skip",
            "default, empty",
            "--dtype",
            "float32",
        ),
        *("--results", tmp_path / "decode.csv", "--json"),
    )
    assert last_json(result) == RECORD
    assert given == {
        "shape": "demo",
        "context": 64,
        "batch": 2,
        "budget": 8,
        "stride": None,
        "device": "cpu",
        "dtype": "float32",
        "steps": 3,
        "threads": 1,
        "skip": ("default", "empty"),
        "results": tmp_path / "decode.csv",
        "progress": False,
    }


def test_defaults(given: dict[str, Any], run: Callable[..., Any]) -> None:
    result = run("bench", "decode")
    assert result.exit_code == 0, result.exception
    assert given["budget"] == 0.125
    assert given["stride"] == 10
    for expected in ("partial", "1.25", "1.00 - 2.00", "mix_over_static", "2.000"):
        assert expected in result.stdout


@pytest.mark.slow
def test_real_run(run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    record = last_json(
        run(
            "bench",
            "decode",
            "--shape",
            "demo",
            "--context",
            256,
            "--steps",
            2,
            "--device",
            "cpu",
            "--json",
        )
    )
    assert {"partial", "full", "mix", "static", "default"} <= set(record["ms"])
    assert {"mix_over_static", "mix_over_default", "mix_over_own_dense", "share_of_ideal"} <= set(
        record["ratios"]
    )
