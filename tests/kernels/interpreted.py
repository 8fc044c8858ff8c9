"""Where the Triton kernels run in these tests: on the GPU, or in Triton's interpreter on CPU tensors (`tests`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import AttendOptions, Entries

pytest.importorskip("triton", reason="needs triton, which is installed with torch on Linux")


def _widen_bfloat16() -> None:
    """The interpreter keeps bfloat16 as bits and would multiply those in a `tl.dot`: give it their float32 values."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def widened_dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        wide = [
            self.cast_impl(side, float32) if side.dtype.scalar == bfloat16 else side
            for side in (left, right)
        ]
        return dot(self, *wide, *others)

    InterpreterBuilder.create_dot = widened_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    _widen_bfloat16()


def device() -> torch.device:
    """Where inputs have to be."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def there(tensor: Tensor) -> Tensor:
    """`tensor` on that device as the view it is: same strides, same memory around it."""
    if tensor.device == device():
        return tensor
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return whole.to(device()).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def run_there(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`operation` on the device, with tensors of the CPU in and out."""

    def run(*tensors: Any, **options: Any) -> Any:
        moved, named = each_tensor(there, tensors), each_tensor(there, options)
        return each_tensor(lambda tensor: tensor.cpu(), operation(*moved, **named))

    return run


def written_there(operation: Callable[..., Any]) -> Callable[..., Any]:
    """As `run_there`; what is written into the tensors given by name is copied back."""

    def run(*tensors: Any, **named: Any) -> Any:
        moved = each_tensor(there, named)
        result = run_there(operation)(*tensors, **moved)
        for name, given in named.items():
            pairs = [(given, moved[name])]
            if isinstance(given, Entries):
                pairs = [(x, getattr(moved[name], field)) for field, x in vars(given).items()]
            for tensor, written in pairs:
                if isinstance(tensor, Tensor) and tensor is not written:
                    tensor.copy_(written)
        return result

    return run


def each_tensor(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same nest of tuples, dictionaries, `Entries`, `Codes` and `AttendOptions` with every tensor in it changed."""

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Entries | AttendOptions | Codes):
            return type(leaf)(**tree_map(changed, vars(leaf)))
        return change(leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map(changed, tree)
