"""What the kernels become on a GPU: compiled ahead of time as a launch would, without one; their registers and memory.

`resources` runs this file in a process of its own, because a kernel is either interpreted or compiled. There the
operations of `OPERATIONS` are called on empty CPU tensors, and each launch inside them stops after compilation, so
the constants, the types and the alignment of the pointers are those of a real launch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# The modules of kernels and their operations, with the signatures of `reference`: `arguments` fills them in by name.
OPERATIONS = {
    "triton_partial": ("attend", "attend_and_rank", "attend_at"),
    "triton_full": ("attend_and_score", "score"),
    "triton_verify": ("verify", "vote"),
    "triton_select": ("select", "gather"),
    "triton_insert": ("insert",),
}
TARGETS = (80, 90)  # Ampere and Hopper
DIMS = (64, 80, 128, 256)
ROWS, KV_HEADS, GROUP, LENGTH, SLOTS, PAGE, QUERIES = 2, 8, 4, 4096, 512, 16, 9


@dataclass(frozen=True)
class Compiled:
    """A kernel as a launch would have it. Registers a thread; bytes of stack and spills a thread, shared a program."""

    operation: str
    kernel: str
    target: int
    dim: int
    dtype: str
    options: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int


def resources(target: int, dtype: torch.dtype, dims: tuple[int, ...] = DIMS) -> list[Compiled]:
    """Every kernel of `OPERATIONS` for one architecture and dtype."""
    wanted = [str(target), str(dtype).removeprefix("torch."), *map(str, dims)]
    command = [sys.executable, "-m", __name__, *wanted]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [Compiled(**json.loads(line)) for line in run.stdout.splitlines()]


def arguments(operation: Any, dim: int, dtype: torch.dtype, plain: bool) -> dict[str, Any]:
    """A typical call: what a CUDA graph passes when `plain`; else also a mask, a cap, sinks."""
    heads = KV_HEADS * GROUP

    def cache() -> torch.Tensor:
        return torch.empty(ROWS, KV_HEADS, LENGTH, dim, dtype=dtype)

    per_head = torch.zeros(ROWS, KV_HEADS, dtype=torch.int64)
    wanted = inspect.signature(operation).parameters
    several = (QUERIES,) if "starts" in wanted else ()
    typical = {
        "query": torch.empty(ROWS, heads, *several, dim, dtype=dtype),
        "keys": cache(),
        "values": cache(),
        "positions": torch.zeros(ROWS, KV_HEADS, SLOTS, dtype=torch.int64),
        "scale": dim**-0.5,
        "lengths": per_head,
        "heads": torch.ones(ROWS, KV_HEADS, dtype=torch.bool),
        "newest": per_head,
        "count": 4,
        "starts": per_head[:, 0],
        "counts": per_head[:, 0],
        "source": cache(),
        "out": cache(),
        "scores": torch.empty(ROWS, KV_HEADS, LENGTH),
        "budget": torch.full((ROWS,), SLOTS),
        "slots": SLOTS,
        "ends": per_head[:, 0],
        "wanted": torch.zeros(ROWS, KV_HEADS, 4, dtype=torch.int64),
        "ring_keys": cache(),
        "ring_values": cache(),
        "ring_positions": torch.zeros(ROWS, KV_HEADS, LENGTH, dtype=torch.int64),
        "filled": per_head,
        "pushed": per_head,
    }
    if not plain:
        typical |= {
            "softcap": 50.0,
            "sinks": torch.empty(heads, dtype=dtype),
            "reduction": "mean",
            "window": 1024,
            "recent": 8,
            "anchors": torch.zeros(ROWS, KV_HEADS, 4, dtype=torch.int64),
        }
        pages = ROWS * LENGTH // PAGE
        if "blocks" in wanted:  # K beside V, as vLLM keeps them
            both = torch.empty(pages, KV_HEADS, PAGE, 2 * dim, dtype=dtype)
            typical |= {"keys": both[..., :dim], "values": both[..., dim:]}
            typical["blocks"] = torch.zeros(ROWS, LENGTH // PAGE, dtype=torch.int32)
        mask = torch.ones(ROWS, 1, LENGTH, dtype=torch.bool)
        typical["visible"] = mask[:, 0] if "budget" in wanted else mask
    return {name: value for name, value in typical.items() if name in wanted}


def _compile_only(target: int) -> list[tuple[Any, Any]]:
    """From here on launches compile for `target` and stop; the list collects (function, kernel)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target, 32)

    driver.set_active(NoDevice())  # type: ignore[arg-type]
    launched = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append((self, launch(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = run  # type: ignore[method-assign]
    return launched


def _usage(cubin: bytes) -> dict[str, int]:
    """What the assembler says about a kernel: REG, STACK, LOCAL."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _compiled(target: int, dtype: torch.dtype, dims: tuple[int, ...]) -> Iterator[Compiled]:
    launched = _compile_only(target)
    seen = set()
    for module, names in OPERATIONS.items():
        for name in names:
            operation = getattr(importlib.import_module(f"refreshkv.kernels.{module}"), name)
            for dim, plain in [(dim, plain) for dim in dims for plain in (True, False)]:
                operation(**arguments(operation, dim, dtype, plain))
                for function, kernel in launched:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        usage = _usage(kernel.asm["cubin"])
                        yield Compiled(
                            operation=name,
                            kernel=function.__name__,
                            target=target,
                            dim=dim,
                            dtype=str(dtype).removeprefix("torch."),
                            options="plain" if plain else "everything",
                            warps=kernel.metadata.num_warps,
                            registers=usage["REG"],
                            stack=usage["STACK"],
                            local=usage["LOCAL"],
                            shared=kernel.metadata.shared,
                        )
                launched.clear()


if __name__ == "__main__":
    _target, _dtype, *_dims = sys.argv[1:]
    for _each in _compiled(int(_target), getattr(torch, _dtype), tuple(map(int, _dims))):
        print(json.dumps(asdict(_each)))
