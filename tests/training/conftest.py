"""A tiny model on disk, documents for it, and runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from refreshkv.training.run import Run
from tests.cli.conftest import last_json, run, tiny, tokenizer
from tests.training.runs import model_of, recipe

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


@pytest.fixture
def begin(tiny: Path, tokenizer: PreTrainedTokenizerFast, documents: Path) -> Callable[..., Run]:
    """`begin(out, ...)`: a run of the tiny model; settings of the recipe may be changed."""

    def make(out: Path, **changes: Any) -> Run:
        asked = recipe(documents, **changes)
        return Run(model_of(tiny), tokenizer, asked, out, log_every=1, save_every=2)

    return make


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Path,
    tokenizer: PreTrainedTokenizerFast,
    documents: Path,
) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    Run(model_of(tiny), tokenizer, recipe(documents), out, log_every=1, save_every=2).train()
    return out
