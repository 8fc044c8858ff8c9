"""No number makes a kernel of the CPU read or write elsewhere, raise, or give what the reference does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from refreshkv.kernels.backend import CPU, CPU_TORCH, REFERENCE, Backend
from tests.kernels import hostile
from tests.kernels.comparison import Case

backends = pytest.mark.parametrize("backend", [REFERENCE, CPU_TORCH, CPU], ids=lambda b: b.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@backends
def test_a_selection_is_valid_whatever_the_numbers(backend: Backend) -> None:
    hostile.check_select(backend.select)


@backends
def test_tokens_are_copied_from_places_that_are_there(backend: Backend) -> None:
    hostile.check_gather(backend.gather)


@backends
def test_tokens_enter_the_slots_that_are_there(backend: Backend) -> None:
    hostile.check_insert(lambda store, ring: backend.insert(*store, **ring))


@backends
@dtypes
@pytest.mark.parametrize(("case", "what", "number"), hostile.SPOILED, ids=str)
def test_nan_in_is_nan_out(
    backend: Backend, dtype: torch.dtype, case: Case, what: str, number: float
) -> None:
    lengths = (case.length, 300, 8300) if backend is CPU else (case.length,)
    for length in lengths:
        hostile.check_attention(backend, replace(case, dtype=dtype, length=length), what, number)


@backends
@dtypes
def test_lengths_and_places_are_those_that_are_there(backend: Backend, dtype: torch.dtype) -> None:
    for case in (Case(dtype=dtype), replace(hostile.EVERYTHING, dtype=dtype)):
        hostile.check_lengths(backend, case)
        hostile.check_places(backend, case)
        hostile.check_causal(backend, case)


@backends
@dtypes
def test_shapes_of_nothing(backend: Backend, dtype: torch.dtype) -> None:
    hostile.check_nothing(backend, dtype)
