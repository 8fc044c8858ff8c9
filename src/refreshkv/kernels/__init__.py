"""Tensors in, tensors out. `backend_for(device)` picks the kernels once; `reference` defines what they compute."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import cpu, cpu_verify, reference
from refreshkv.kernels.native import attention
from refreshkv.kernels.native import selection as native_selection
from refreshkv.kernels.native.build import library
from refreshkv.policy import selection


@dataclass(frozen=True)
class Backend:
    """One implementation of each operation; signatures as in `reference` and `selection.select`."""

    name: str
    attend: Callable[..., reference.Attended]
    attend_and_score: Callable[..., tuple[reference.Attended, reference.Scored]]
    attend_and_rank: Callable[..., tuple[reference.Attended, Tensor]]
    attend_at: Callable[..., tuple[reference.Attended, Tensor]]
    score: Callable[..., reference.Scored]
    verify: Callable[..., tuple[reference.Attended, reference.Scored]]
    vote: Callable[..., reference.Scored]
    select: Callable[..., selection.Selection]
    gather: Callable[..., None]
    insert: Callable[..., Tensor]


REFERENCE = Backend(
    name="reference",
    attend=reference.attend,
    attend_and_score=reference.attend_and_score,
    attend_and_rank=reference.attend_and_rank,
    attend_at=reference.attend_at,
    score=reference.score,
    verify=reference.verify,
    vote=reference.vote,
    select=selection.select,
    gather=reference.gather,
    insert=reference.insert,
)
CPU_TORCH = Backend(
    name="cpu-torch",
    attend=cpu.attend,
    attend_and_score=cpu.attend_and_score,
    attend_and_rank=cpu.attend_and_rank,
    attend_at=reference.attend_at,
    score=cpu.score,
    verify=cpu_verify.verify,
    vote=cpu_verify.vote,
    select=cpu.select,
    gather=cpu.gather,
    insert=cpu.insert,
)


def _native_first(module: ModuleType, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled twin of `kernel` in `module`, or `kernel` for what that module does not take."""
    twin, serves = getattr(module, kernel.__name__), module.serves
    known = inspect.signature(kernel).parameters.keys()

    @functools.wraps(kernel)
    def run(*given: Any, **named: Any) -> Any:
        # The twins of attention share their options: what is not one of this kernel is refused by the kernel itself.
        served = named.keys() <= known and serves(*given, **named)
        return (twin if served else kernel)(*given, **named)

    return run


CPU = replace(
    CPU_TORCH,
    name="cpu",
    attend=_native_first(attention, cpu.attend),
    attend_and_score=_native_first(attention, cpu.attend_and_score),
    attend_and_rank=_native_first(attention, cpu.attend_and_rank),
    attend_at=_native_first(attention, reference.attend_at),
    score=_native_first(attention, cpu.score),
    verify=_native_first(attention, cpu_verify.verify),
    vote=_native_first(attention, cpu_verify.vote),
    select=_native_first(native_selection, cpu.select),
    gather=_native_first(native_selection, cpu.gather),
    insert=_native_first(native_selection, cpu.insert),
)

_WIDEST = 256  # head dim that the Triton kernels have settings for


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
    from refreshkv.kernels import (
        triton_full,
        triton_insert,
        triton_partial,
        triton_select,
        triton_verify,
    )

    return Backend(
        name="triton",
        attend=_not_too_wide(triton_partial.attend),
        attend_and_score=_not_too_wide(triton_full.attend_and_score),
        attend_and_rank=_not_too_wide(triton_partial.attend_and_rank),
        attend_at=_not_too_wide(triton_partial.attend_at),
        score=_not_too_wide(triton_full.score),
        verify=_not_too_wide(triton_verify.verify),
        vote=_not_too_wide(triton_verify.vote),
        select=triton_select.select,
        gather=triton_select.gather,
        insert=triton_insert.insert,
    )


def _not_too_wide(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, or the reference for heads that it was not written for."""

    @functools.wraps(kernel)
    def run(*given: Any, **named: Any) -> Any:
        heads = (*given[:3], *(named[name] for name in ("keys", "values") if name in named))
        plain = any(tensor.shape[-1] > _WIDEST for tensor in heads)
        return (getattr(reference, kernel.__name__) if plain else kernel)(*given, **named)

    return run


def available() -> dict[str, str]:
    """The backends that work on this machine and what they serve."""
    found = {
        "cpu": f"packed GQA, heads shared over threads, for CPU tensors; {language(torch.device('cpu'))}",
        "reference": "plain torch, any device",
    }
    if torch.cuda.is_available() and _has_triton():
        found["triton"] = (
            f"split-K attention and radix selection, for {torch.cuda.get_device_name()}"
        )
    return found


def language(device: torch.device) -> str:
    """What the kernels of a device are written in; for C++, what it multiplies with."""
    if device.type == "cpu":
        compiled = library()
        if compiled is not None:
            return f"C++, {compiled.refreshkv_products().decode()}"
        return "torch"
    return "Triton" if backend_for(device) is not REFERENCE else "torch"
