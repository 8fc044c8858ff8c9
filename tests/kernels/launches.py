"""How often an operation would start something on a GPU, counted without one: Triton kernels and operators of torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from refreshkv.kernels.backend import triton_backend

# Besides views: what gives memory and leaves it as it is.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass
class Launches:
    """One name a launch, in order: of a Triton kernel ("merge_kernel") or of an operator ("aten::fill_")."""

    names: list[str] = field(default_factory=list)


class _Operators(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operator = function.overloadpacket.__name__
        launches = function.namespace == "aten" and not function.is_view
        if launches and operator.lstrip("_") not in _ALLOCATIONS | {"unsafe_view"}:
            self.launches.names.append(f"aten::{operator}")
        # An operator of ours starts nothing itself, but what it is made of is looked at as well.
        ours = function.namespace == "refreshkv"
        with self if ours else nullcontext():
            if ours:
                key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return function.redispatch(key, *args, **(kwargs or {}))
            return function(*args, **(kwargs or {}))


def run_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run the Triton kernels, over tensors of whatever device."""
    for module in ("operators", "schema"):
        name = f"refreshkv.kernels.{module}.backend_for"
        monkeypatch.setattr(name, lambda device: triton_backend())


@contextmanager
def counting() -> Iterator[Launches]:
    """Collects what is launched inside the `with`. Whatever an interpreted kernel does counts as the kernel alone.

    `item` counts too, as "aten::_local_scalar_dense": on a GPU it waits for all that was launched.
    """
    launches = Launches()
    kernel = importlib.import_module("refreshkv.kernels.triton.common").merge_kernel
    launch: Callable[..., Any] = type(kernel).run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        launches.names.append(self.__name__)
        with _disable_current_modes():
            return launch(self, *args, **options)

    with mock.patch.object(type(kernel), "run", run), _Operators(launches):
        yield launches
