"""Every kernel compiles for Ampere and Hopper as it is launched; in 16 bits none spills and two programs fit an SM."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.kernels.compiled import OPERATIONS, TARGETS, calls, resources
from tests.kernels.interpreted import each_tensor

REGISTERS = 65536  # of an SM, on both
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of an SM
# Bytes a thread: on Ampere a tile of several queries under a mask, a cap and a window takes all 255 registers.
SPILLED = {(80, torch.bfloat16): 24}
RESERVED = 1024  # of them for each program
TYPICAL, OTHERS = (128,), (64, 80, 256)

LAUNCHES = {  # at most
    "attend": 2,
    "attend_and_score": 3,
    "attend_and_rank": 3,
    "score": 3,
    "verify": 3,
    "verify guess": 2,
    "vote": 3,
    "select": 3,
    "write": 1,
    "drift": 1,
    "push": 1,
    "fetch": 1,
    "refresh": 1,
    "attend_mixed": 4,
    "encode": 1,
}

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "module, name", [(module, name) for module, names in OPERATIONS.items() for name in names]
)
def test_no_operation_asks_the_device(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph does not allow it, and a tensor without data raises. A launch costs more than most kernels."""
    kernel = importlib.import_module("refreshkv.kernels.triton.common").merge_kernel
    launched = []
    monkeypatch.setattr(type(kernel), "run", lambda kernel, *_, **__: launched.append(kernel))
    operation = getattr(importlib.import_module(f"refreshkv.kernels.triton.{module}"), name)
    for kind, given in calls(operation, 64, torch.bfloat16):
        operation(**each_tensor(lambda tensor: tensor.to("meta"), given))
        most = LAUNCHES[f"{name} guess" if "guess" in kind else name]
        assert 0 < len(launched) <= most, kind
        launched.clear()


@pytest.mark.parametrize(
    "target, dtype, dims",
    [
        (90, torch.bfloat16, TYPICAL),
        pytest.param(90, torch.bfloat16, OTHERS, marks=slow),
        pytest.param(80, torch.bfloat16, TYPICAL + OTHERS, marks=slow),
        pytest.param(90, torch.float32, TYPICAL + OTHERS, marks=slow),
        pytest.param(80, torch.float32, TYPICAL + OTHERS, marks=slow),
    ],
    ids=str,
)
def test_what_is_launched_fits(target: int, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    """float16 becomes the same code as bfloat16. What one operation shares with another is compiled once."""
    assert target in TARGETS
    # Hopper is what they are set for; float32 is there to check with.
    tuned = target == 90 and dtype.itemsize == 2
    kernels = resources(target, dtype, dims)
    found = {kernel.operation for kernel in kernels}
    assert found == {name for names in OPERATIONS.values() for name in names}
    for kernel in kernels:
        programs = 2 if tuned and kernel.warps < 16 else 1  # more warps keep an SM busy
        assert kernel.stack <= SPILLED.get((target, dtype), 0), f"spills: {kernel}"
        assert kernel.local == 0, f"local memory: {kernel}"
        registers = -(-kernel.registers // 8) * 8 * 32 * kernel.warps  # given out by eights
        # A step completes a block in one of 64: codes of 256 dims may have an SM for themselves.
        alone = kernel.kernel == "encode_kernel" and kernel.dim == 256
        assert (1 if alone else programs) * registers <= REGISTERS, f"registers: {kernel}"
        assert programs * (kernel.shared + RESERVED) <= SHARED[target], f"shared memory: {kernel}"
