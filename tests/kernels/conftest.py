"""What the tests of the Triton kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer, until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU machine the Triton kernels are tested on the GPU, by `-m gpu`; broken ones could leave it unusable."""
    if not torch.cuda.is_available():
        return
    for item in items:
        if item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.gpu)
            if item.name.startswith("test_a_broken"):
                item.add_marker(
                    pytest.mark.skip(reason="kernels are broken in the interpreter only")
                )
