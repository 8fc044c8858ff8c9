"""`Backend`: one implementation of each operation. `backend_for(device)` picks them once.

An operation is defined by its reference, which its twins in `native` and `triton` equal, and one line in `Backend`;
what a twin does not take (`serves` of its module) goes to the reference.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.native import attention as native_attention
from refreshkv.kernels.native import mixed as native_mixed
from refreshkv.kernels.native import rings as native_rings
from refreshkv.kernels.native import selection as native_selection
from refreshkv.kernels.native.build import library
from refreshkv.kernels.options import Attended, Scored
from refreshkv.policy.selection import Selected


@dataclass(frozen=True)
class Backend:
    """One implementation of each operation; signatures as in `reference`."""

    name: str
    attend: Callable[..., Attended]
    attend_and_score: Callable[..., tuple[Attended, Scored]]
    attend_and_rank: Callable[..., tuple[Attended, Tensor]]
    attend_mixed: Callable[..., Attended]
    score: Callable[..., Scored]
    verify: Callable[..., tuple[Attended, Scored]]
    vote: Callable[..., Scored]
    select: Callable[..., Selected]
    write: Callable[..., None]
    push: Callable[..., None]
    fetch: Callable[..., None]
    refresh: Callable[..., None]
    drift: Callable[..., tuple[Tensor, Tensor]]
    encode: Callable[..., None]

    @classmethod
    def of(cls, name: str, *modules: ModuleType) -> Backend:
        """The operations that `modules` define, each in the first that has it."""
        homes = {
            operation: next(module for module in modules if operation in vars(module))
            for operation in OPERATIONS
        }
        return cls(
            name, **{operation: _served(home, operation) for operation, home in homes.items()}
        )


OPERATIONS = tuple(field.name for field in fields(Backend) if field.name != "name")


def _served(module: ModuleType, operation: str) -> Callable[..., Any]:
    """The operation of a module, or the reference for arguments that the module does not serve."""
    kernel, serves = getattr(module, operation), getattr(module, "serves", None)
    if serves is None:
        return kernel
    plain = getattr(reference, operation)

    @functools.wraps(plain)
    def run(*given: Any, **named: Any) -> Any:
        return (kernel if serves(*given, **named) else plain)(*given, **named)

    return run


REFERENCE = Backend.of("reference", reference)
CPU = Backend.of("cpu", native_attention, native_mixed, native_rings, native_selection, reference)


def backend_for(device: torch.device) -> Backend:
    """The fastest kernels for a device; plain torch where there is nothing better."""
    if device.type == "cpu":
        return CPU
    if device.type == "cuda" and _has_triton():
        return triton_backend()
    return REFERENCE


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_backend() -> Backend:
    """The Triton kernels. Triton is imported here and nowhere else, so that the package works without it."""
    from refreshkv.kernels.triton import begin, encode, mixed, rings, select, step, verify

    return Backend.of("triton", step, verify, select, begin, rings, mixed, encode)


def available() -> dict[str, str]:
    """The backends that work on this machine and what they serve."""
    names = {"reference": "plain torch, any device"}
    if library() is not None:
        names["cpu"] = (
            f"heads shared over threads, for CPU tensors; {language(torch.device('cpu'))}"
        )
    if torch.cuda.is_available() and _has_triton():
        names["triton"] = (
            f"split-K attention, radix selection and codes, for {torch.cuda.get_device_name()}"
        )
    return names


def language(device: torch.device) -> str:
    """What the kernels of a device are written in; for C++, what it multiplies with."""
    if device.type == "cpu":
        compiled = library()
        if compiled is not None:
            return f"C++, {compiled.refreshkv_products().decode()}"
        return "torch"
    return "Triton" if backend_for(device) is not REFERENCE else "torch"
