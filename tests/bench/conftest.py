"""One small run for all tests that only read its record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from refreshkv.bench import decode, kernels, timing

SMALL = {
    "shape": "demo",
    "context": 128,
    "batch": 2,
    "budget": 32,
    "draft": 3,
    "acceptance": 0.5,
    "device": "cpu",
    "dtype": "float32",
    "steps": 1,
    "cycles": 1,
    "progress": False,
}


@pytest.fixture(autouse=True, scope="package")
def _fast() -> Iterator[None]:
    """A machine of one GB/s with small caches: measuring the real one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (decode, kernels):
            patch.setattr(module, "read_bandwidth", lambda device: 1e9)
        patch.setattr(timing, "_MOST_COPIES", 2)
        yield


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """The process has as many threads afterwards."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def record(_fast: None) -> dict[str, Any]:
    """`decode.run` with everything that a CPU can do."""
    return decode.run(**SMALL)
