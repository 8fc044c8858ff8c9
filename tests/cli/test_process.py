"""The console script as a process: what only a real one shows (purity of stdout, exit codes, start-up time)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CLI = [sys.executable, "-m", "refreshkv"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "REFRESHKV_DEBUG": "", "OMP_NUM_THREADS": "1"}


def refreshkv(*args: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*CLI, *map(str, args)], input=stdin, capture_output=True, env=ENVIRONMENT, timeout=120
    )


def test_generate_json_owns_stdout(tiny: Path) -> None:
    done = refreshkv(
        "generate", "--model", tiny, "--max-new-tokens", 3, "--json", stdin="naïve\n".encode()
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout)["prompt_tokens"] == len("naïve\n".encode())


def test_bad_input_is_one_line_without_a_traceback(tiny: Path) -> None:
    done = refreshkv("generate", "--model", tiny, "--prompt", "x" * 500)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"refreshkv: error: the prompt is 500 tokens long")
    assert done.stderr.count(b"\n") == 1


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from refreshkv.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "cli.main(['generate', '--help'], standalone_mode=False)\n"
        "cli.main(['serve', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'tqdm', 'vllm'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5  # 0.1 s on an idle machine


def test_reader_that_leaves_early() -> None:
    """`refreshkv demo --print-prompt ... | head -c 1`: quiet, whatever the exit code."""
    command = [*CLI, "demo", "--print-prompt", "key-value", "--length", "200000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
