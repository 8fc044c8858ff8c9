"""`refreshkv info`, and help."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config

import refreshkv
from refreshkv.cli import COMMANDS, info


def test_json(run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    record = last_json(run("info", "--json"))
    assert list(record) == [
        *("versions", "os", "devices", "cpu", "kernels", "native", "architectures", "presets")
    ]
    assert record["versions"]["refreshkv"] == refreshkv.__version__
    assert set(record["versions"]) == {
        "refreshkv",
        "python",
        "torch",
        "transformers",
        "huggingface-hub",
        "tokenizers",
    }
    assert "reference" in record["kernels"]
    assert record["os"]["name"] == platform.system()
    assert set(record["native"]) == {"compiler", "compiler_version", "cache"}
    assert set(record["presets"]) == set(refreshkv.PRESETS)


def test_text(run: Callable[..., Any]) -> None:
    result = run("info")
    assert result.exit_code == 0
    for expected in (*refreshkv.PROVEN_ARCHITECTURES, *refreshkv.PRESETS, "transformers", "cpu"):
        assert expected in result.stdout


def test_compiler_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    assert info.native() == {
        "compiler": sys.executable,
        "compiler_version": f"Python {platform.python_version()}",
        "cache": str(tmp_path / "refreshkv"),
    }
    (tmp_path / "refreshkv").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others can write to"):
        assert info.native()["cache"] is None
    (tmp_path / "refreshkv").chmod(0o700)
    for broken in ("/no/such/compiler", "false", "'"):
        monkeypatch.setenv("CXX", broken)
        assert info.native()["compiler_version"] is None
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert info.native()["compiler"] is None


def test_supported_model_needs_only_its_config(
    tiny: Path, tmp_path: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    shutil.copy(tiny / "config.json", tmp_path)
    model = last_json(run("info", "--model", tmp_path, "--json"))["model"]
    assert model["supported"] is True
    assert model["architecture"] == "LlamaForCausalLM"
    assert model["max_positions"] == 128
    assert "supported      yes" in run("info", "--model", tmp_path).stdout


def test_unsupported_model_is_an_answer(
    tmp_path: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    model = last_json(run("info", "--model", tmp_path, "--json"))["model"]
    assert model["supported"] is False
    assert "encoder-decoder" in model["reason"]


def test_missing_model_is_bad_input(tmp_path: Path, run: Callable[..., Any]) -> None:
    assert run("info", "--model", tmp_path / "no").exit_code == 2


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("bench", "decode")])
def test_help(command: tuple[str, ...], run: Callable[..., Any]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: refreshkv")


def test_no_command_shows_help(run: Callable[..., Any]) -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr
