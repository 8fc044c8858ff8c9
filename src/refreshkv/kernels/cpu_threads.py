"""Independent pieces of work on threads of our own, one core each.

For pieces of many operations of a tenth of a millisecond: torch would split each of them over its threads and wait for
the slowest every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")


def in_shares(work: Callable[[Sequence[Item]], None], items: Sequence[Item]) -> None:
    """Calls `work` with a share of the items on each of as many threads as torch would use."""
    threads = torch.get_num_threads()
    # These are settings of a thread, not of the process.
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def task(share: Sequence[Item]) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            work(share)

    shares = [items[i::threads] for i in range(min(threads, len(items)))]
    for _ in _pool(os.getpid(), threads).map(task, shares):
        pass  # raises what a share raised


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """`process`: threads do not survive a fork."""
    pool = ThreadPoolExecutor(threads, "refreshkv")
    started = Barrier(threads)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        started.wait()

    for _ in pool.map(start, range(threads)):
        pass
    # The number is that of the thread which sets it, and of every thread that torch has yet to meet.
    torch.set_num_threads(threads)
    return pool
