"""These tests need vLLM, in an environment of its own: `make test-vllm`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.vllm.engines import ENVIRONMENT, Stock

os.environ |= {**ENVIRONMENT, "REFRESHKV_VLLM_CPU": "1"}  # before anything imports vLLM


@pytest.fixture(scope="session")
def stock() -> Iterator[Stock]:
    """vLLM without the plugin."""
    made = Stock()
    yield made
    made.close()
