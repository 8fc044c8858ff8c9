"""Every `refreshkv` command in README.md and docs/vllm.md parses; those that are cheap are run, pipes and all."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from refreshkv.cli import cli
from refreshkv.demo import MODEL_PATH

ROOT = Path(__file__).parents[2]


def commands(document: str) -> list[str]:
    """The command lines in ```bash blocks that mention the console script; continued lines are joined."""
    path = ROOT / document
    if not path.is_file():
        return []
    blocks = re.findall(
        r"^```(?:bash|sh|console)\n(.*?)^```",
        path.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"\s+#.*", "", line).removeprefix("$ ").strip() for line in lines)
    return [line for line in stripped if re.search(r"(^|\| *)refreshkv\b", line)]


LINES = [*commands("README.md"), *commands("docs/vllm.md")]


def calls(line: str) -> list[list[str]]:
    """The arguments of each `refreshkv` in a pipeline."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;&")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= set("|<>;&"):
            found.append([])
        else:
            found[-1].append(token)
    return [call[1:] for call in found if call and call[0] == "refreshkv"]


def parse(arguments: list[str]) -> None:
    """Let click parse, command by command, and run nothing."""
    command: click.Command = cli
    parent = None
    name = "refreshkv"
    while isinstance(command, click.Group):
        parent = command.make_context(name, list(arguments), parent=parent)
        arguments = [*parent._protected_args, *parent.args]
        if not arguments:
            return
        name, *arguments = arguments
        found = command.get_command(parent, name)
        assert found is not None, f"no command {name!r}"
        command = found
    command.make_context(name, list(arguments), parent=parent)


def cheap(line: str) -> bool:
    """Runs in seconds and offline: one answer of the bundled model, a few short ones, a printed prompt, or `info`."""
    return all(
        call[:1] == ["info"]
        or "--print-prompt" in call
        or (call[:1] == ["generate"] and "demo" in call)
        or (call[:1] == ["eval"] and "512" in call)
        for call in calls(line)
    )


def test_readme_has_commands() -> None:
    if not (ROOT / "README.md").is_file():
        pytest.skip("README.md is not there")
    assert LINES


@pytest.mark.parametrize("line", LINES)
def test_command_parses(line: str) -> None:
    assert calls(line)
    for call in calls(line):
        with contextlib.suppress(click.exceptions.Exit):  # --help, --version
            parse(call)


def test_cheap_commands_run(tmp_path: Path) -> None:
    """In the order of the document and in one folder: a later command may read what an earlier one wrote."""
    if not (MODEL_PATH / "config.json").is_file():
        pytest.skip("the bundled model is not there")
    script = tmp_path / "bin" / "refreshkv"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m refreshkv.cli "$@"\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(
            ROOT / "src"
        ),  # where the package is not installed, as in `make test-gpu`
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for line in filter(cheap, LINES):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, (line, done.stderr.decode())
