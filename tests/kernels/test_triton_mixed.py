"""The Triton kernels of a mixed step equal the reference, and broken ones are noticed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import run_there, written_there  # isort: skip  # before any kernel
from refreshkv.kernels import reference
from refreshkv.kernels.options import Entries
from tests.kernels import hostile
from tests.kernels.mixed import (
    BROKEN,
    CLOSE,
    EVERYTHING,
    Mixed,
    MixedCase,
    check_broken_numbers,
    check_broken_places,
    check_mixed,
    counted,
)
from tests.kernels.mutants import Mutant, mutated
from tests.kernels.test_triton_encode import encode_there

triton_common = importlib.import_module("refreshkv.kernels.triton.common")
triton_mixed = importlib.import_module("refreshkv.kernels.triton.mixed")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter, at log(0)
]
EVERY_DTYPE = pytest.mark.parametrize("dtype", CLOSE, ids=lambda dtype: str(dtype)[6:])
HEAD = MixedCase(rows=1, kv_heads=1, group=2, length=200)
CASES = [
    MixedCase(),
    EVERYTHING,
    *[replace(HEAD, group=group) for group in range(1, 9)],
    *[replace(HEAD, dim=dim, value_dim=other) for dim, other in ((16, 256), (24, 20), (80, 7), (256, 16))],
    *[replace(HEAD, bits=bits, value_bits=7 - bits) for bits in range(1, 7)],
    *[replace(HEAD, length=length) for length in (1, 63, 64, 65, 128)],
    *[replace(HEAD, rows=2, budget=budget, hidden=hidden) for budget in (0, 1, 999) for hidden in ("", "left")],
    *[MixedCase(softcap=3.0, group=3), MixedCase(sinks=True), MixedCase(hidden="left", sinks=True)],
    *[MixedCase(skip=skip, budget=40, kv_heads=3) for skip in (0.9, 5.0)],
    *[MixedCase(layout=layout, rows=3) for layout in ("rows", "pages", "pages rows")],
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@EVERY_DTYPE
def test_it_equals_the_reference(case: MixedCase, dtype: torch.dtype) -> None:
    check_mixed(
        written_there(triton_mixed.attend_mixed),
        replace(case, dtype=dtype),
        strict=dtype == torch.float32,
    )


@EVERY_DTYPE
def test_nan_in_is_nan_out(dtype: torch.dtype) -> None:
    check_broken_numbers(
        written_there(triton_mixed.attend_mixed), reference.encode, BROKEN, dtype
    )


def test_no_place_leads_elsewhere() -> None:
    check_broken_places(written_there(triton_mixed.attend_mixed), encode_there(), count=12)
