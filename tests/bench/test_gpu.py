"""What only a GPU shows: graphs, events, and the benchmarks on it. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refreshkv.bench import decode, kernels
from refreshkv.bench.timing import Timed, copies_for, milliseconds

from .conftest import SMALL

pytestmark = pytest.mark.gpu


def test_a_graph_repeats_the_call() -> None:
    device = torch.device("cuda")
    total = torch.zeros(4, device=device)
    timed = Timed(lambda: total.add_(1))
    assert timed.capture(device)
    before = total.clone()
    assert timed.call() is total and torch.equal(total, before + 1)
    assert milliseconds(timed.call, device) < 10


def test_a_call_that_waits_is_not_captured_and_does_no_harm() -> None:
    device = torch.device("cuda")
    block = torch.ones(4, device=device)
    assert not Timed(lambda: block.sum().item()).capture(device)
    assert block.sum().item() == 4
    assert Timed(lambda: block.sum()).capture(device)


def test_operands_leave_the_second_level_cache() -> None:
    size = torch.cuda.get_device_properties(0).L2_cache_size
    assert copies_for(size, size, torch.device("cuda")) >= 2


def test_decode_and_kernels() -> None:
    given: dict[str, Any] = {**SMALL, "device": "cuda", "dtype": "bfloat16"}
    found = decode.run(**given)
    assert found["ms"]["static"] > 0 and found["ms"]["exact"] > 0
    assert "CUDA graphs" in found["notes"]["exact"] and found["notes"]["partial"] == "CUDA graph"
    names = ("shape", "context", "batch", "budget", "draft", "device", "dtype", "progress")
    layer = kernels.run(**{name: given[name] for name in names}, steps=1)
    assert len(layer["kernels"]) == 9  # those that Triton has
