"""Decode passes as CUDA graphs, captured by us over the static form of the cache: no compiler, no launches from Python.

A pass of a kind (a partial step, a step that may be full) runs once as it is, watched for anything that waits for the
device; the second one is captured, in well under a second, and from then on each is one replay. Where a pass waits, or
cannot be captured, it stays as it was, and a warning says why. Capture and replay are a `Recorder`, of which CUDA has
one; the tests have another, which replays on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

Call = Callable[[], Any]


class Recorder(Protocol):
    """How a call becomes one that is replayed."""

    def watch(self, call: Call) -> tuple[Any, str | None]:
        """Run a call; its result, and why it cannot be recorded (it waits for the device), or `None`."""

    def record(self, call: Call) -> Call:
        """A call that does again on the device what `call` does, and gives the same tensors, filled anew.

        Recording does nothing else: the first replay is the first time.

        Raises:
            RuntimeError: it cannot be recorded.
        """


class CudaRecorder:
    """CUDA graphs that share their memory, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def watch(self, call: Call) -> tuple[Any, str | None]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = None
        for one in seen:
            if "synchronizing CUDA operation" in str(one.message):
                waits = f"{one.filename}:{one.lineno} waits for the device"
            elif "Synchronization debug mode" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return result, waits

    def record(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        # "relaxed": a kernel that is used for the first time may be loaded meanwhile.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"),
        ):
            result = call()

        def replay() -> Any:
            with torch.cuda.device(self._device):
                graph.replay()
            return result

        return replay


def recorder_for(device: torch.device) -> Recorder | None:
    """What records on a device; `None`: nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Graphs:
    """The graphs of one cache, by what tells them apart.

    Attributes:
        reason: why passes are not captured; `None` as long as they are.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._replays: dict[Hashable, Call | None] = {}  # `None`: it has run once
        self._inputs: dict[Hashable, dict[str, Tensor]] = {}
        self.reason: str | None = None

    def run(
        self, kind: Hashable, call: Callable[..., Any], inputs: dict[str, Tensor] | None = None
    ) -> Any:
        """`call(**inputs)`, as a graph from the second time on.

        Args:
            kind: what decides, beside the shapes of the inputs, which graph it is. All else that the call reads stays
                where it is, or is the same every time.
            call: waits for nothing.
            inputs: tensors; a graph reads them where it has its own copies.

        Returns:
            What the call gives. The next replay of a graph overwrites its tensors.
        """
        inputs = inputs or {}
        if self.reason is not None:
            return call(**inputs)
        shapes = tuple((name, x.shape, x.dtype) for name, x in sorted(inputs.items()))
        key = (kind, shapes)
        if key not in self._replays:
            result, self.reason = self._recorder.watch(lambda: call(**inputs))
            self._replays[key] = None
            if self.reason is not None:
                say_without(self.reason)
            return result
        replay = self._replays[key]
        if replay is None:
            held = self._inputs[key] = {name: x.clone() for name, x in inputs.items()}
            try:
                replay = self._replays[key] = self._recorder.record(lambda: call(**held))
            except RuntimeError as error:
                self.reason = str(error).splitlines()[0]
                say_without(self.reason)
                return call(**inputs)
        for name, x in inputs.items():
            self._inputs[key][name].copy_(x)
        return replay()

    def forget(self) -> None:
        """What the graphs read has moved: each is captured anew, without being watched once more."""
        self._replays = dict.fromkeys(self._replays)
        self._inputs.clear()


def say_without(reason: str) -> None:
    """One warning: passes are not captured, and why."""
    warnings.warn(f"decoding without CUDA graphs: {reason}", stacklevel=4)
