"""A real server process, its log and its metrics."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.vllm.engines import ENVIRONMENT

# Of vLLM; the chat template says no more than what a message says.
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16"),
    *("--block-size", "64", "--num-gpu-blocks-override", "256"),
    *(
        "--chat-template",
        "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}",
    ),
)
_OWN = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")  # of engines in this process


class Server:
    """A server of this command line, `refreshkv serve` or vLLM's own, that writes into `folder`."""

    def __init__(self, folder: Path, command: Sequence[str], **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "log"
        shared = {
            name: value for name, value in (os.environ | ENVIRONMENT).items() if name not in _OWN
        }
        words = [sys.executable, "-m", *command, *OPTIONS, "--port", str(self.port)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                words,
                env=shared | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def wait(self) -> None:
        """Until it answers."""
        self.until(lambda: "" if self._healthy() else "no answer", 180)

    def until(self, missing: Callable[[], str], seconds: float = 30) -> None:
        """Until nothing is `missing`, which says what is."""
        end = time.monotonic() + seconds
        while what := missing():
            assert self.process.poll() is None, self.log[-3000:]
            assert time.monotonic() < end, f"{what}\n{self.log[-3000:]}"
            time.sleep(0.5)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Sums over the labels, by name."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def lines(self) -> list[str]:
        """Ours of the log."""
        return re.findall(r"RefreshKV.*", self.log)

    def close(self) -> None:
        """Ask it to end, then end what is left of its group."""
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
