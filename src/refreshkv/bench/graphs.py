"""CUDA graphs of calls that are timed: the one place where the benchmarks capture anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from refreshkv.hosts.transformers.graphs import recorder_for


def captured(
    call: Callable[[], Any], after: Callable[[], object], device: torch.device
) -> Callable[[], Any] | None:
    """The call as a CUDA graph, which Python cannot slow down; `None` where that cannot be.

    It is run twice, each time with `after`, which is no part of the graph. A replay returns the same tensors each time,
    filled anew.
    """
    recorder = recorder_for(device)
    if recorder is None:
        return None
    call()  # compiles and allocates, which may wait for the device
    after()
    try:  # a capture that fails can leave the process unusable, so calls that wait are found out before
        _, waits = recorder.watch(call)
    finally:
        after()  # of a call that broke off, too
    if waits is not None:
        return None
    graph = recorder.record(call)
    after()
    return graph
