"""A tiny model on disk and documents for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import last_json, run, tiny, tokenizer

__all__ = ["documents", "last_json", "run", "tiny", "tokenizer"]


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of 24 documents of 60 to 210 bytes, which is as many tokens."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    with path.open("w") as file:
        for number in range(24):
            size = 60 + 6 * number + int(draw.integers(6))
            file.write(
                json.dumps({"text": bytes(draw.integers(97, 123, size).tolist()).decode()}) + "\n"
            )
    return path
