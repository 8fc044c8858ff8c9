"""Tensors in, tensors out. `backend_for(device)` picks the kernels once; `reference` defines what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from refreshkv import selection
from refreshkv.kernels import cpu, cpu_verify, reference


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
CPU = Backend(
    name="cpu",
    attend=cpu.attend,
    attend_and_score=cpu.attend_and_score,
    attend_and_rank=cpu.attend_and_rank,
    attend_at=reference.attend_at,  # its users run on GPUs
    score=cpu.score,
    verify=cpu_verify.verify,
    vote=cpu_verify.vote,
    select=cpu.select,
    gather=cpu.gather,
    insert=cpu.insert,
)

_BY_DEVICE = {"cpu": CPU}


def backend_for(device: torch.device) -> Backend:
    """The fastest kernels for a device; plain torch where there is nothing better."""
    return _BY_DEVICE.get(device.type, REFERENCE)


def available() -> dict[str, str]:
    """The backends that work on this machine and what they serve."""
    found = {
        "cpu": "packed GQA on contiguous heads, for CPU tensors",
        "reference": "plain torch, any device",
    }
    if torch.cuda.is_available():
        found["reference"] += f" (serves {torch.cuda.get_device_name()}; never timed there)"
    return found
