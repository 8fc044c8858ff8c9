"""What only a GPU shows: graphs, events, and the benchmarks on it. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from refreshkv.bench import decode, endtoend, kernels, memory
from refreshkv.bench.checks import relative_rms, rounding
from refreshkv.bench.rivals import attention_rivals
from refreshkv.bench.shapes import build
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decode(dtype: str) -> None:
    found = decode.run(**{**SMALL, "device": "cuda", "dtype": dtype})
    assert found["ms"]["static"] > 0 and found["ms"]["exact"] > 0
    names = ("own_dense", "full", "mixed", "partial", "empty", "snapkv", "flash")
    assert {found["notes"][name] for name in names} == {"CUDA graph"}
    assert found["notes"]["exact"] == "CUDA graphs of a draft and of a full pass"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels(dtype: str) -> None:
    names = ("shape", "context", "batch", "budget", "draft", "progress")
    given = {name: SMALL[name] for name in names}
    found = kernels.run(**given, device="cuda", dtype=dtype, steps=1)
    timed = {one["kernel"]: one["cuda_graph"] for one in found["kernels"]}
    assert {"attend_full", "select", "refresh", "verify"} <= set(timed) and all(timed.values())


@pytest.mark.parametrize("rows", [1, 3])
def test_rivals_compute_the_same(rows: int) -> None:
    device, generator = torch.device("cuda"), torch.Generator(device="cuda").manual_seed(0)
    given = [
        torch.randn(rows, *size, 128, generator=generator, device=device, dtype=torch.bfloat16)
        for size in ((8,), (2, 1000), (2, 1000))
    ]
    rivals = attention_rivals(device, rows)
    expected = rivals["torch sdpa"](*given)
    assert {"torch sdpa", "torch sdpa, not packed", "torch flash"} <= set(rivals)
    for name in ("torch sdpa, not packed", "torch flash"):
        error = relative_rms(rivals[name](*given), expected)
        assert error < rounding(torch.bfloat16)


def test_generate() -> None:
    given = {"shape": "bundled", "context": 256, "batch": 2, "new": 24, "turns": 1}
    found = endtoend.run(**given, device="cuda", dtype="float32", progress=False)
    assert set(found["variants"]) == set(endtoend.MODES)
    assert found["variants"]["lossless"]["same_tokens"] == 24


def test_memory_is_what_the_estimate_says() -> None:
    """Without the caches of others, whose steps are theirs, never more than was counted."""
    sizes = {"shape": "llama-3.2-1b", "context": 32768, "batch": 4, "budget": 0.1}
    given = {**SMALL, **sizes, "device": "cuda", "dtype": "bfloat16"}
    before = torch.cuda.memory_allocated()
    held = decode.run(**given, skip=("static", "default", "mixed"))["memory"]
    names = ("weights", "store", "checks", "exact", "partial", "full")
    expected = sum(held[name] for name in names)
    assert held["store"] < held["measured"] - before < expected + memory._SPARE
    build.cache_clear()
