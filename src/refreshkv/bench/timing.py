"""How long a call takes, with what a GPU asks for: events, CUDA graphs, operands that are in no cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from refreshkv.bench.graphs import captured
from refreshkv.bench.job import WARM_UP

_BLOCK = 1 << 28  # float32 numbers, one GiB: more than the last cache of a server holds
_CPU_CACHE = 128 << 20  # bytes; torch does not know, and neighbours on the machine use it too
_MOST_COPIES = 64
_MOST_BYTES = 4 << 30  # of all copies
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


def _nothing() -> None:
    pass


@dataclass
class Timed:
    """A call that is timed in so many `turns`; what comes `before` and `after` each of them is not."""

    call: Callable[[], Any]
    turns: int = 0
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing

    def once(self) -> Any:
        """What the call gives, with `after`."""
        found = self.call()
        self.after()
        return found

    def capture(self, device: torch.device) -> bool:
        """Whether the call is a CUDA graph from here on; see `graphs.captured`."""
        graph = captured(self.call, self.after, device)
        self.call = graph or self.call
        return graph is not None


def forget(name: str, error: Exception, notes: dict[str, str], device: torch.device) -> None:
    """What cannot run is left out: why, in `notes`; what it held is free for others."""
    notes[name] = f"left out: {type(error).__name__}: {error}".splitlines()[0]
    if device.type == "cuda":
        torch.cuda.empty_cache()


def take_turns(
    timed: Mapping[str, Timed],
    device: torch.device,
    progress: bool = False,
    failed: Callable[[str, Exception], object] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each turn of each call. They go round, so that a drift of the machine's speed hits all alike.

    `failed` is told of a call that finds no memory, which takes no further turn and has no times; without it that is an
    error.
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    turns = range(-WARM_UP, max((one.turns for one in timed.values()), default=0))
    for turn in tqdm(turns, desc="turns", disable=not progress, leave=False):
        for name in [name for name in times if turn < timed[name].turns]:
            one = timed[name]
            try:
                one.before()
                taken = milliseconds(one.call, device)
                one.after()
            except OUT_OF_MEMORY as error:
                if failed is None:
                    raise
                one.after()
                failed(name, error)
                del times[name]
            else:
                times[name] += [taken] if turn >= 0 else []
    return times


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes on the device, the gaps included in which it waits for Python."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def copies_for(size: int, each: int, device: torch.device) -> int:
    """How many sets of operands to take in turn, so that one has left the caches when it comes again.

    A call reads `size` bytes of a set, which takes `each` bytes of memory.
    """
    cache = _CPU_CACHE
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = 1 + -(-2 * cache // size)
    return min(wanted, _MOST_COPIES, max(2, _MOST_BYTES // each))


def read_bandwidth(device: torch.device, numbers: int = _BLOCK) -> float:
    """Bytes per second of reading a block that is in no cache, best of five."""
    block = torch.ones(numbers, dtype=torch.float32, device=device)
    best = min(milliseconds(block.sum, device) for _ in range(5))
    return block.numel() * 4 / (best * 1e-3)
