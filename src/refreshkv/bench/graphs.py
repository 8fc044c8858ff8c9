"""CUDA graphs of calls that are timed: the one place where the benchmarks capture anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(
    call: Callable[[], Any], after: Callable[[], object], device: torch.device
) -> Callable[[], Any] | None:
    """The call as a CUDA graph, which Python cannot slow down; `None` where that cannot be.

    It is run a few times, each with `after`, which is no part of the graph. A replay returns what the last of them did:
    the same tensors, filled anew.
    """
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()  # compiles and allocates, which may wait for the device
        after()
        # A capture that fails can leave the process unusable, so calls that would wait are found out before.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.synchronize(device)
            after()  # of a call that broke off, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    after()
    return lambda: (graph.replay(), found)[1]
