"""Nothing from elsewhere reaches a terminal as a command, and streams that are closed or full end in one line."""

from __future__ import annotations

import json
import logging
import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from refreshkv import cli as package
from refreshkv.cli import common, loading
from tests.cli.test_process import CLI, ENVIRONMENT

EVIL = "\x1b[31m\u202e\x9b2J\r\u2066"
QUICK = ("--max-new-tokens", 2)


def harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.replace("\t", " ").split("\n"))


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "--model", f"./{EVIL}", "--prompt", "a"),
        ("generate", "--model", EVIL, "--prompt", "a"),
        ("generate", "--model", "demo", "--prompt-file", f"/{EVIL}"),
        ("generate", "--model", "demo", "--prompt", "a", "--preset", EVIL),
        ("generate", "--model", "demo", "--prompt", "a", "--budget", EVIL),
        ("generate", f"--{EVIL}"),
        (EVIL,),
        ("info", "--model", f"/{EVIL}"),
        ("eval", "--describe", EVIL),
        ("eval", "--model", "demo", "--tasks", EVIL, "--methods", "full", "--out", "x"),
        ("eval", "--model", "demo", "--tasks", "key-value", "--methods", EVIL, "--out", "x"),
        ("eval", "--out", f"/dev/null/{EVIL}\0"),
        ("compare", "--model", "demo", "--prompt", "a", "--methods", EVIL),
        ("compare", "--model", "demo", "--prompt", "a", "--preset", f"/{EVIL}.json"),
        ("compare", "--model", "demo", "--prompt", "a", "--write-preset", f"/{EVIL}"),
        ("demo", "--tasks", EVIL),
        ("bench", "decode", "--shape", EVIL),
        ("models", "fetch", EVIL),
        ("bench", "plan", "--device", EVIL),
        ("bench", "plan", "--check", f"/{EVIL}"),
    ],
    ids=lambda args: ascii(" ".join(args)),
)
def test_errors_are_harmless(args: tuple[str, ...], run: Callable[..., Any]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert harmless(result.stderr) and r"\x1b" in result.stderr


def test_failures_notes_and_traces_are_harmless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REFRESHKV_DEBUG", "1")
    assert package.report(RuntimeError(EVIL)) == 1
    assert harmless(capsys.readouterr().err)
    assert package.note(UserWarning(f"a\n{EVIL}")) == (
        "refreshkv: note: a " + r"\x1b[31m\u202e\x9b2J \u2066" + "\n"
    )


def test_logs_of_libraries_are_harmless() -> None:
    loading.quiet()
    record = logging.LogRecord("transformers", logging.ERROR, "", 0, f"a\n{EVIL}", (), None)
    for handler in logging.getLogger("transformers").handlers:
        assert harmless(handler.format(record))
        assert handler.format(record).startswith(r"refreshkv: note: a \x1b")


def test_tables_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=EVIL, caption=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    common.console().print(table)
    common.console().print(f"a\t{EVIL}\nb")
    assert harmless(capsys.readouterr().out)


@pytest.fixture
def shouting(tiny: Path, tmp_path: Path) -> Path:
    """A model that says ESC whatever it is asked, of a name that does so too."""
    folder = Path(shutil.copytree(tiny, tmp_path / f"m{EVIL}"))
    (escape,) = PreTrainedTokenizerFast.from_pretrained(folder)("\x1b")["input_ids"]
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.zero_()  # all logits are equal, and the first of equals is taken
    model.save_pretrained(folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    turned = {0: escape, escape: 0}
    words = made["model"]["vocab"]
    made["model"]["vocab"] = {word: turned.get(i, i) for word, i in words.items()}
    for added in made["added_tokens"]:
        added["id"] = turned.get(added["id"], added["id"])
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


def test_a_terminal_is_shown_what_the_model_says(shouting: Path) -> None:
    """A pipe gets it as it is: it is the text that was asked for."""
    command = [*CLI, "generate", "--model", str(shouting), "--prompt", "a", *map(str, QUICK)]
    piped = subprocess.run(command, capture_output=True, env=ENVIRONMENT, check=True)
    assert piped.stdout == b"\x1b\x1b\n"
    controller, terminal = pty.openpty()
    with os.fdopen(controller, "rb") as screen:
        subprocess.run(
            command, stdout=terminal, stderr=subprocess.DEVNULL, env=ENVIRONMENT, check=True
        )
        os.close(terminal)
        assert screen.read1() == rb"\x1b\x1b" + b"\r\n"


def test_info_of_a_model_with_an_evil_name(shouting: Path, run: Callable[..., Any]) -> None:
    config = json.loads((shouting / "config.json").read_text())
    (shouting / "config.json").write_text(json.dumps({**config, "architectures": [EVIL]}))
    for command in (["info"], ["bench", "plan"]):
        result = run(*command, "--model", shouting)
        assert result.exit_code == 0, result.stderr
        assert harmless(result.stdout) and r"\x1b" in result.stdout


@pytest.mark.parametrize("command", ["info", "--help", "demo --print-prompt key-value"])
def test_a_closed_stdout_is_bad_input(command: str) -> None:
    line = f"exec {' '.join(CLI)} {command} >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.startswith(b"refreshkv: error: stdout is closed; give the output a place")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("command", ["info --json", "--help", "demo --print-prompt key-value"])
def test_a_full_stdout_is_a_failure(command: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*CLI, *command.split()], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        assert done.returncode == 1
        assert done.stderr == (
            b"refreshkv: error: cannot write (No space left on device); make room, or give another"
            b" place\n"
        )
        both = subprocess.run([*CLI, "generat"], stdout=full, stderr=full, env=ENVIRONMENT)
        assert both.returncode == 2


def test_without_stdin_and_stderr(tiny: Path) -> None:
    line = f"exec {' '.join(CLI)} generate --model {tiny} --prompt a --json <&- 2>&-"
    done = subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 2  # no room for 256 tokens, and nowhere to say so
    line = line.replace("--json", "--json --max-new-tokens 2")
    done = subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert json.loads(done.stdout)["new_tokens"] == 2
