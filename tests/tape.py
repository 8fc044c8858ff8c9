"""What replays a call on a CPU as a CUDA graph would on a GPU: the operators that it ran, on the very same tensors.

As there, nothing of the Python around them happens again: a number, a branch or a tensor that Python made anew is what
it was when the call was recorded. And as there, a call that looks at a tensor cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What asks the device for a number, or for a shape that depends on one.
_LOOKS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "unique_consecutive",
    "_unique2",
}


class Tape:
    """A `Recorder`, see `hosts/transformers/graphs.py`.

    Attributes:
        recorded, replayed: how many calls were.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def watch(self, call: Callable[[], Any]) -> tuple[Any, str | None]:
        watch = _Watch()
        with watch, _lists(watch.see):
            result = call()
        return result, watch.looks

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        recording = _Recording()
        with recording, _lists(recording.see):
            result = call()
        recording.undo()
        self.recorded += 1

        def replay() -> Any:
            self.replayed += 1
            for function, given, named, results in recording.calls:
                found = function(*given, **named)
                for old, new in zip(tree_leaves(results), tree_leaves(found), strict=True):
                    if isinstance(old, Tensor) and old is not new and not _alias(old, new):
                        assert old.shape == new.shape, f"{function} depends on numbers"
                        old.copy_(new)
            return result

        return replay


@contextmanager
def _lists(see: Callable[[str], None]) -> Iterator[None]:
    """`tolist` is no operator on a CPU: `see` is told of it."""
    tolist = torch.Tensor.tolist

    def looked(tensor: Tensor) -> Any:
        see("tolist")
        return tolist(tensor)

    with mock.patch.object(torch.Tensor, "tolist", looked):
        yield


def _alias(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Watch(TorchDispatchMode):
    """Notes what looks at the device."""

    looks: str | None = None

    def see(self, what: str) -> None:
        self.looks = f"{what} waits for the device"

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in _LOOKS:
            self.see(str(function))
        return function(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    """The operators of a call, in order, and what they overwrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in _LOOKS:
            self.see(str(function))
        schema = function._schema.arguments
        named = {
            argument.name: value for argument, value in zip(schema, args, strict=False)
        } | kwargs
        for argument in schema:
            if argument.is_write and isinstance(named.get(argument.name), Tensor):
                self._keep(named[argument.name])
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    def see(self, what: str) -> None:
        raise RuntimeError(f"{what} waits for the device")

    def undo(self) -> None:
        """A graph that is captured has done nothing yet."""
        for whole, content in self._before.values():
            whole.copy_(content)

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = whole, whole.clone()
