"""No number makes a kernel of the CPU read or write elsewhere, raise, or give what the reference does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from refreshkv.kernels.backend import CPU, REFERENCE, Backend
from tests.kernels import hostile, rings
from tests.kernels.cases import LAYOUTS, WHOLE, Case

backends = pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=lambda b: b.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@backends
def test_a_selection_is_valid_whatever_the_numbers(backend: Backend) -> None:
    hostile.check_select(backend.select)


@backends
@pytest.mark.parametrize("name", rings.WRITERS)
def test_rings_are_kept_in_the_slots_that_are_there(backend: Backend, name: str) -> None:
    rings.check_writer(name, getattr(backend, name), count=48)


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
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("what", ["keys", "hidden"])
def test_nan_in_is_nan_out_wherever_it_lies(backend: Backend, what: str, layout: str) -> None:
    case = replace(hostile.EVERYTHING, dtype=torch.bfloat16, layout=layout, length=300)
    hostile.check_attention(backend, case, what, hostile.NAN)


@backends
@dtypes
def test_only_what_is_there_is_read(backend: Backend, dtype: torch.dtype) -> None:
    for case in (Case(dtype=dtype), replace(hostile.EVERYTHING, dtype=dtype)):
        hostile.check_indices(backend, case)
        for layout in LAYOUTS:
            hostile.check_lengths(backend, replace(case, layout=layout))
        for layout in WHOLE:
            hostile.check_causal(backend, replace(case, layout=layout))


@backends
@dtypes
def test_shapes_of_nothing(backend: Backend, dtype: torch.dtype) -> None:
    hostile.check_nothing(backend, dtype)
