"""The Triton kernel that makes codes equals the reference bit for bit, and broken ones are noticed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import each_tensor, there  # isort: skip  # before any kernel
from refreshkv.kernels import reference
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Entries
from refreshkv.policy.rounding import BLOCK
from tests.kernels.mixed import EVERYTHING, Encode, MixedCase, check_encode
from tests.kernels.mutants import Mutant, mutated

triton_encode = importlib.import_module("refreshkv.kernels.triton.encode")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
HEAD = MixedCase(rows=1, kv_heads=1, group=1, length=200)
ONE_BIT = MixedCase(bits=1, value_bits=1, hidden="holes")
CASES = [
    MixedCase(),
    EVERYTHING,
    *[replace(HEAD, dim=dim, value_dim=other) for dim, other in ((16, 256), (24, 20), (80, 7), (256, 16))],
    *[replace(HEAD, bits=bits, value_bits=7 - bits) for bits in range(1, 7)],
    *[replace(HEAD, length=length) for length in (1, 63, 64, 65, 128)],
    ONE_BIT,
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


def check(case: MixedCase, module: Any = triton_encode) -> None:
    check_encode(encode_there(module), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_reference_bit_for_bit(case: MixedCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [EVERYTHING, ONE_BIT], ids=str)
def test_in_16_bits_too(case: MixedCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


def check_numbers(bits: int, module: Any = triton_encode) -> None:
    """Grids far from 0, steps of any size, ties between two codes, channels of one number, and of none that is one."""
    gen = torch.Generator().manual_seed(bits)
    numbers = torch.randn(1, 1, BLOCK, 64, generator=gen)
    numbers *= 10.0 ** torch.linspace(-12, 12, 64)
    numbers[..., ::4] += numbers[:, :, :1, ::4] * 300
    numbers[..., 1::8] = torch.arange(BLOCK)[:, None] % (2 * 2**bits - 1) / 2  # half a step
    numbers[..., 2], numbers[..., 3], numbers[..., 5] = 0.0, 7.0, -1e-30
    numbers[0, 0, 9, 6], numbers[0, 0, 8, 7], numbers[0, 0, 7, 10] = (
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    entries = Entries(numbers, numbers.flip(-1))
    ours, theirs = (Codes.room(numbers, (64, 64), 1, bits, bits) for _ in range(2))
    none = torch.tensor([0])
    for codes, encode in ((ours, encode_there(module)), (theirs, reference.encode)):
        encode(entries, codes, first=none, begin=none, end=none + 1, most=1)
    assert all(map(torch.equal, ours.tensors, theirs.tensors))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_whatever_numbers_a_channel_has(bits: int) -> None:
    check_numbers(bits)


def test_nothing_is_written_where_there_is_nothing_to_encode() -> None:
    """Neither without blocks, as in most steps, nor without room."""
    case = MixedCase(rows=3)
    _, entries, _ = case.inputs()
    codes = case.room(entries)
    for part in codes.tensors:
        part.fill_(0x1234)
    begin = torch.tensor([2, 0, 9])
    encode_there()(entries, codes, first=begin * 0, begin=begin, end=begin - 1, most=2)
    encode_there()(entries, codes, first=begin * 0, begin=begin, end=begin + 1, most=0)
    assert all(bool((part == 0x1234).all()) for part in codes.tensors)
    empty = Codes.room(entries.keys, (64, 64), 0, 2, 2)
    encode_there()(entries, empty, first=begin * 0, begin=begin * 0, end=begin, most=2)


# From here on: what the lines of the kernel are for.

CHECKS: dict[str, Callable[[Any], None]] = {
    "plain": lambda module: check(HEAD, module),
    "everything": lambda module: check(EVERYTHING, module),
    "one bit": lambda module: check(ONE_BIT, module),
    "numbers": lambda module: check_numbers(2, module),
    "rows": lambda module: check(MixedCase(layout="rows", rows=3), module),
}
MUTANTS = [
    ("plain", Mutant("encode", "tl.maximum(tl.load(end_ptr + row), 0)", "room")),
    ("plain", Mutant("encode", "block * BLOCK + tl", "tl")),
    ("plain", Mutant("encode", "high - low,", "high,")),
    ("numbers", Mutant("encode", "tl.abs(low) * _REACH", "tl.abs(low) * 0")),
    ("plain", Mutant("encode", "+ _HALF) >>", ") >>")),
    ("plain", Mutant("encode", "(numbers + _ROUND) - _ROUND", "numbers")),
    ("plain", Mutant("encode", "tl.trans(codes), BLOCK", "codes, BLOCK")),
    ("plain", Mutant("encode", "(quarters << STEP_BITS) | kept", "quarters << STEP_BITS")),
    ("plain", Mutant("encode", "number // 2 + number % 2 * 16", "number")),
    ("plain", Mutant("codes", "tiles * BITS * SHORT", "tiles * SHORT")),
    ("everything", Mutant("encode", "seen & tl.load(visible_ptr", "seen | tl.load(visible_ptr")),
    ("everything", Mutant("encode", "tl.where(counted, numbers, float(\"inf\"))", "numbers")),
    ("everything", Mutant("encode", "tl.where(nothing, 0.0, low)", "low")),
    ("everything", Mutant("encode", "counted & (low == low)", "(low == low)")),
    ("one bit", Mutant("encode", "center - distance, distance", "center, distance")),
    ("one bit", Mutant("encode", "away = tl.where(counted,", "away = tl.where(counted | True,")),
    ("rows", Mutant("codes", "kept_row(copy.rows_ptr, row, coded)", "row")),
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_pass_unbroken(name: str) -> None:
    CHECKS[name](triton_encode)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "encode") as broken, pytest.raises(AssertionError):
        CHECKS[name](broken)
