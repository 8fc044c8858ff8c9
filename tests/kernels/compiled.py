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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy.rounding import BLOCK

# The modules of kernels and their operations, with the signatures of `reference`: `arguments` fills them in by name.
OPERATIONS = {
    "step": ("attend", "attend_and_score", "attend_and_rank", "score"),
    "verify": ("verify", "vote"),
    "select": ("select",),
    "begin": ("write", "drift"),
    "rings": ("push", "fetch", "refresh"),
    "mixed": ("attend_mixed",),
    "encode": ("encode",),
}
TARGETS = (80, 90)  # Ampere and Hopper
DIMS = (64, 80, 128, 256)
ROWS, KV_HEADS, GROUP, LENGTH, SLOTS, PAGE, QUERIES, BITS = 2, 8, 4, 4096, 512, 16, 9, 2


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


def calls(operation: Any, dim: int, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a CUDA graph passes, plainly; and with all that there is, where entries lie in every way that is served."""
    yield "plain", arguments(operation, dim, dtype, "", plain=True)
    wanted = inspect.signature(operation).parameters
    ways = [""]
    if "entries" in wanted:
        ways = ["rows", "pages"]
    if "entries" in wanted and not {"starts", "ring_keys", "codes"} & {*wanted}:
        ways += ["list rows", "list pages rows"]
    for way in ways:
        yield f"everything {way}".strip(), arguments(operation, dim, dtype, way, plain=False)
    if "expected" in wanted:
        yield "plain guess", with_guess(arguments(operation, dim, dtype, "", plain=True))
        for way in ways:
            given = with_guess(arguments(operation, dim, dtype, way, plain=False))
            yield f"everything {way} guess", given
    if "slots" in wanted:
        for slots in (LENGTH, 2 * LENGTH):  # one chunk, several
            scores = torch.empty(ROWS, KV_HEADS, 4 * LENGTH)
            given = arguments(operation, dim, dtype, "", plain=False)
            visible = torch.ones(ROWS, 4 * LENGTH, dtype=torch.bool)
            yield f"{slots} slots", given | {"scores": scores, "slots": slots, "visible": visible}


def with_guess(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `verify` with a guess of each log-sum-exp; the maximum over the heads is what takes most."""
    options = replace(given["options"], reduction="max")
    return given | {"options": options, "expected": torch.empty(given["query"].shape[:-1])}


def arguments(
    operation: Any, dim: int, dtype: torch.dtype, layout: str, plain: bool
) -> dict[str, Any]:
    """A typical call: with lengths, and unless `plain` also with a mask, a cap, sinks."""
    heads = KV_HEADS * GROUP

    def cache(
        rows: int = ROWS, entries: int = LENGTH
    ) -> torch.Tensor:  # K beside V, as vLLM keeps them
        return torch.empty(rows, KV_HEADS, entries, 2 * dim, dtype=dtype)

    def room(rows: int, blocks: int) -> Codes:
        return Codes.room(cache(rows, 0), (dim, dim), blocks, BITS, BITS)

    both = cache(ROWS * LENGTH // PAGE, PAGE) if "pages" in layout else cache()
    listed = torch.zeros(ROWS, KV_HEADS, SLOTS, dtype=torch.int32) if "list" in layout else None
    entries = Entries(
        *both.chunk(2, -1),
        torch.zeros(ROWS, LENGTH // PAGE, dtype=torch.int32) if "pages" in layout else None,
        listed,
        torch.zeros(ROWS, dtype=torch.int32) if "rows" in layout else None,
    )
    per_head = torch.zeros(ROWS, KV_HEADS, dtype=torch.int64)
    ring_keys, ring_values = cache().chunk(2, -1)
    wanted = inspect.signature(operation).parameters
    several = (QUERIES,) if "starts" in wanted else ()
    options = AttendOptions(
        scale=dim**-0.5, lengths=per_head, heads=torch.ones(ROWS, KV_HEADS, dtype=torch.bool)
    )
    typical = {
        "query": torch.empty(ROWS, heads, *several, dim, dtype=dtype),
        "entries": entries,
        "options": options,
        "heads": options.heads,
        "newest": per_head,
        "count": 4,
        "starts": per_head[:, 0],
        "counts": per_head[:, 0],
        "scores": torch.empty(ROWS, KV_HEADS, LENGTH),
        "budget": torch.full((ROWS,), SLOTS),
        "slots": SLOTS,
        "ends": per_head[:, 0],
        "wanted": torch.zeros(ROWS, KV_HEADS, 4, dtype=torch.int32),
        "ring_keys": ring_keys,
        "ring_values": ring_values,
        "ring_positions": torch.zeros(ROWS, KV_HEADS, LENGTH, dtype=torch.int32),
        "filled": per_head,
        "state": torch.zeros(6, ROWS, KV_HEADS, dtype=torch.int64),
        "tally": torch.zeros(ROWS, KV_HEADS, 5, dtype=torch.int64)[
            ..., -2 if "codes" in wanted else 0 :
        ],
        "hidden": per_head[:, 0],
        "at": per_head[:, 0],
        "back": 1,
        "best": torch.zeros(ROWS, KV_HEADS, 4, dtype=torch.int64),
        "full": True if "new_keys" in wanted else options.heads,
        "new_keys": torch.empty(ROWS, KV_HEADS, 1, dim, dtype=dtype),
        "new_values": torch.empty(ROWS, KV_HEADS, 1, dim, dtype=dtype),
        "reference": torch.empty(ROWS, KV_HEADS, dim),
        "summary": torch.empty(ROWS, KV_HEADS, dim),
        "stride": 10,
        "threshold": 0.85,
        "per_head": True,
        "codes": room(ROWS, LENGTH // BLOCK),
        **dict.fromkeys(("first", "finished", "begin", "end"), per_head[:, 0]),
        "most": 1,
        "skip": 0.02,
    }
    if not plain:
        mask = torch.ones(ROWS, 1, entries.count, dtype=torch.bool)
        typical["options"] = replace(
            options,
            softcap=50.0,
            sinks=torch.empty(heads, dtype=dtype),
            reduction="mean",
            visible=mask,
        )
        typical |= {
            "window": 1024,
            "visible": mask[:, 0],
            "recent": 8,
            "per_head": False,
            "counted": torch.ones(ROWS, dtype=torch.bool),
            "new_keys": torch.empty(ROWS, KV_HEADS, LENGTH, dim, dtype=dtype),
            "new_values": torch.empty(ROWS, KV_HEADS, LENGTH, dim, dtype=dtype),
            "anchors": torch.zeros(ROWS, KV_HEADS, 4, dtype=torch.int32),
        }
    if "pages" in layout:
        table = torch.zeros(ROWS, LENGTH // BLOCK // 2, dtype=torch.int32)
        typical["codes"] = replace(room(table.numel(), 2), blocks=table)
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
    every = [
        (module, name, dim) for module in OPERATIONS for name in OPERATIONS[module] for dim in dims
    ]
    for module, name, dim in every:
        operation = getattr(importlib.import_module(f"refreshkv.kernels.triton.{module}"), name)
        for kind, given in calls(operation, dim, dtype):
            operation(**given)
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
                        options=kind,
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
