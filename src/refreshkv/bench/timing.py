"""How long a call takes, with what a GPU asks for: events, CUDA graphs, operands that are in no cache."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_BLOCK = 1 << 28  # float32 numbers, one GiB: more than the last cache of a server holds
_CPU_CACHE = 128 << 20  # bytes; torch does not know, and neighbours on the machine use it too
_MOST_COPIES = 64
_MOST_BYTES = 4 << 30  # of all copies


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes on the device, the gaps included in which it waits for Python."""
    wait_for(device)
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """The kernels of `call` as a CUDA graph, which Python cannot slow down; `None` where that is not possible.

    The call is run a few times. A replay repeats it with the same tensors and at the same places.
    """
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()  # compiles and allocates, which may wait for the device
        # A capture that fails can leave the process unusable, so calls that would wait are found out before.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(before)
            wait_for(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
