"""The Triton kernel that makes codes equals the reference bit for bit, and broken ones are noticed."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import each_tensor, there  # isort: skip  # before any kernel
from tests.kernels.mixed import CLOSE, EVERYTHING, Encode, MixedCase, check_encode

triton_encode = importlib.import_module("refreshkv.kernels.triton.encode")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
EVERY_DTYPE = pytest.mark.parametrize("dtype", CLOSE, ids=lambda dtype: str(dtype)[6:])
HEAD = MixedCase(rows=1, kv_heads=1, group=1, length=200)
CASES = [
    MixedCase(),
    EVERYTHING,
    *[replace(HEAD, dim=dim, value_dim=other) for dim, other in ((16, 256), (24, 20), (80, 7), (256, 16))],
    *[replace(HEAD, bits=bits, value_bits=7 - bits) for bits in range(1, 7)],
    *[replace(HEAD, length=length) for length in (1, 63, 64, 65, 128)],
    MixedCase(bits=1, value_bits=1, hidden="holes"),
    MixedCase(hidden="left"),
    *[MixedCase(layout=layout, rows=3) for layout in ("rows", "pages", "pages rows")],
]  # fmt: skip


def encode_there(module: Any = triton_encode) -> Encode:
    """`encode` of a module on the device, with tensors of the CPU; what is written is copied back."""

    def run(entries: Any, codes: Any, **named: Any) -> None:
        moved = each_tensor(there, (entries, codes, named))
        module.encode(*moved[:2], **moved[2])
        for ours, theirs in zip(codes.tensors, moved[1].tensors, strict=True):
            ours.copy_(theirs)

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
@EVERY_DTYPE
def test_it_equals_the_reference_bit_for_bit(case: MixedCase, dtype: torch.dtype) -> None:
    check_encode(encode_there(), replace(case, dtype=dtype))
