"""The C++ kernels of the mixed mode: equal to the reference in every build, and nothing but the numbers counts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.backend import CPU
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.native import build, mixed
from refreshkv.kernels.options import Entries
from tests.helpers import needs_compiler
from tests.kernels import hostile
from tests.kernels.mixed import (
    BROKEN,
    CLOSE,
    EVERYTHING,
    Mixed,
    MixedCase,
    check_broken_numbers,
    check_broken_places,
    check_encode,
    check_mixed,
    counted,
)
from tests.kernels.test_native import BUILDS, CHUNK, built, mutant

pytestmark = needs_compiler

CASES = [
    MixedCase(),
    EVERYTHING,
    *[MixedCase(group=group, rows=3) for group in range(1, 9)],
    *[MixedCase(dim=dim, value_dim=other) for dim, other in ((16, 256), (24, 20), (80, 7), (256, 16))],
    *[MixedCase(bits=bits, value_bits=8 - bits, length=200, kv_heads=1) for bits in range(1, 8)],
    MixedCase(bits=1, value_bits=1, hidden="holes"),
    *[MixedCase(length=length) for length in (1, 63, 64, 65, 128)],
    *[MixedCase(budget=budget, hidden=hidden) for budget in (0, 1, 999) for hidden in ("", "left")],
    *[MixedCase(softcap=3.0, group=3), MixedCase(sinks=True), MixedCase(hidden="left", sinks=True)],
    *[MixedCase(skip=skip, budget=40, kv_heads=3) for skip in (0.9, 5.0)],
    *[MixedCase(layout=layout, rows=3) for layout in ("rows", "pages", "pages rows")],
]  # fmt: skip
# One chunk, and several with a part: each chunk's list and counts are its own.
LONG = [
    MixedCase(length=length, group=2, budget=150, hidden=hidden, dim=32)
    for length, hidden in ((CHUNK + 1, ""), (2 * CHUNK + 77, "left"), (2 * CHUNK + 90, "holes"))
]  # fmt: skip
EVERY_DTYPE = pytest.mark.parametrize("dtype", CLOSE, ids=lambda dtype: str(dtype)[6:])


def on(threads: int) -> Mixed:
    return lambda *given, **named: mixed.run(*given, **named, threads=threads)


def check_everything(dtype: torch.dtype, cases: list[MixedCase]) -> None:
    for case in cases:
        case = replace(case, dtype=dtype)
        (query, entries, codes, options), given = case.mixed()
        assert mixed.serves(query, entries, codes, options, **given)
        check_mixed(mixed.attend_mixed, case, strict=dtype == torch.float32)
        check_encode(mixed.encode, case)


@pytest.mark.parametrize("name", BUILDS)
@EVERY_DTYPE
def test_every_build_equals_the_reference(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = built(name)
    monkeypatch.setattr(mixed, "compiled", lambda: library)
    check_everything(dtype, CASES if name == "this machine" else CASES[::4])


@EVERY_DTYPE
def test_long_texts_are_worked_off_in_chunks(dtype: torch.dtype) -> None:
    check_everything(dtype, LONG)


@EVERY_DTYPE
@pytest.mark.parametrize("case", [EVERYTHING, *LONG], ids=str)
def test_neither_threads_nor_other_rows_change_a_bit(case: MixedCase, dtype: torch.dtype) -> None:
    (query, entries, codes, options), given = replace(case, dtype=dtype).mixed()
    (expected, lse), exact = counted(on(1))(query, entries, codes, options, **given)
    for threads in (2, 3, 8):
        (output, other), count = counted(on(threads))(query, entries, codes, options, **given)
        assert (
            torch.equal(output, expected) and torch.equal(other, lse) and torch.equal(count, exact)
        )
    for row in range(case.rows):
        only = slice(row, row + 1)
        alone = Entries(entries.keys[only], entries.values[only])
        where = (
            codes if codes.blocks is not None else Codes(*(part[only] for part in codes.tensors))
        )
        if codes.blocks is not None:
            where = replace(codes, blocks=codes.blocks[only])
        seen = None if options.visible is None else options.visible[only]
        of_row = replace(options, visible=seen)
        named = {k: x[only] if isinstance(x, Tensor) else x for k, x in given.items()}
        for threads in (1, 2, 8):
            (output, _), count = counted(on(threads))(query[only], alone, where, of_row, **named)
            assert torch.equal(output, expected[only]) and torch.equal(count, exact[only])


@EVERY_DTYPE
def test_where_entries_and_codes_lie_changes_no_bit(dtype: torch.dtype) -> None:
    for case in (MixedCase(dtype=dtype), replace(EVERYTHING, dtype=dtype)):
        dense, given = case.mixed()
        expected, exact = counted(mixed.attend_mixed)(*dense, **given)
        for layout in ("rows", "pages", "pages rows"):
            moved, given = replace(case, layout=layout).mixed()
            output, count = counted(mixed.attend_mixed)(*moved, **given)
            assert all(map(torch.equal, output, expected)) and torch.equal(count, exact)


@EVERY_DTYPE
def test_a_budget_of_everything_is_full_attention(dtype: torch.dtype) -> None:
    """And so is a copy without a block."""
    for case in (MixedCase(budget=999, dtype=dtype), replace(LONG[1], budget=10**6, dtype=dtype)):
        (query, entries, codes, options), given = case.mixed()
        full = CPU.attend(query, entries, options)
        for finished in (given["finished"], given["finished"] * 0):
            named = given | {"finished": finished}
            (output, lse), exact = counted(mixed.attend_mixed)(
                query, entries, codes, options, **named
            )
            torch.testing.assert_close(output, full.output, **hostile.CLOSE[dtype])
            torch.testing.assert_close(lse, full.lse, rtol=1e-3, atol=1e-3)
            assert bool((exact > 0).any()) == bool(finished.any())


def test_lengths_hide_what_lies_beyond() -> None:
    for case in (MixedCase(), EVERYTHING):
        (query, entries, codes, options), given = case.mixed()
        lengths = torch.tensor([[0, 300], [40, 333], [129, 64]])[: case.rows]
        kind = replace(options, lengths=lengths)
        expected, exact = counted(reference.attend_mixed)(query, entries, codes, kind, **given)
        ours, count = counted(mixed.attend_mixed)(query, entries, codes, kind, **given)
        torch.testing.assert_close(ours.output, expected.output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.lse, expected.lse)
        assert torch.equal(count, exact) and not ours.output[0, : case.group].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda entries, codes: (Entries(entries.keys.double(), entries.values.double()), codes),
        lambda entries, codes: (Entries(entries.keys, entries.values.half()), codes),
        lambda entries, codes: (entries, MixedCase(bits=8).room(entries)),
        lambda entries, codes: (Entries(entries.keys.clone().requires_grad_(), entries.values), codes),
    ],
    ids=["float64", "two dtypes", "8 bits", "gradients"],
)  # fmt: skip
def test_what_they_do_not_take_goes_to_the_reference(change: Callable[..., Any]) -> None:
    (query, entries, codes, options), given = MixedCase().mixed()
    assert mixed.serves(query, entries, codes, options, **given)
    assert mixed.serves(entries, codes, **MixedCase().span())
    entries, codes = change(entries, codes)
    query = query.to(entries.keys.dtype)
    assert not mixed.serves(query, entries, codes, options, **given)
    assert not mixed.serves(entries, codes, **MixedCase().span())
    CPU.encode(entries, codes, **MixedCase().span())
    ours, _ = counted(CPU.attend_mixed)(query, entries, codes, options, **given)
    expected, _ = counted(reference.attend_mixed)(query, entries, codes, options, **given)
    assert torch.equal(ours.output, expected.output)


# From here on: what no caller should send, and kernels that are wrong.


@pytest.mark.parametrize("name", BUILDS)
@EVERY_DTYPE
def test_nan_in_is_nan_out_in_every_build(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = built(name)
    monkeypatch.setattr(mixed, "compiled", lambda: library)
    check_broken_numbers(mixed.attend_mixed, mixed.encode, [*BROKEN, LONG[0]], dtype)


def test_no_place_leads_elsewhere() -> None:
    check_broken_places(mixed.attend_mixed, mixed.encode)


def test_without_entries_or_rows_there_is_nothing() -> None:
    (query, entries, codes, options), given = MixedCase().mixed()
    none = Entries(entries.keys[:, :, :0], entries.values[:, :, :0])
    ours, exact = counted(mixed.attend_mixed)(query, none, codes, options, **given)
    assert not ours.output.any() and bool((ours.lse == -torch.inf).all()) and not exact.any()
    empty = Codes.room(entries.keys, (64, 64), 0, 2, 2)
    ours, exact = counted(mixed.attend_mixed)(query, entries, empty, options, **given)
    assert torch.equal(ours.output, CPU.attend(query, entries, options).output) and not exact.any()
    mixed.encode(entries, empty, **MixedCase().span())


FEW = [
    *CASES[:4],
    *CASES[10:14],
    *[case for case in CASES if case.hidden or case.skip or case.sinks],
]


def check_attention() -> None:
    for case in (*FEW, LONG[2], replace(CASES[0], dtype=torch.bfloat16)):
        check_mixed(mixed.attend_mixed, case, strict=case.dtype == torch.float32)
    check_mixed(on(8), LONG[0])


def check_codes() -> None:
    for case in FEW:
        check_encode(mixed.encode, case)


# Each leaves the kernel within its memory: without a bound it would not be there to be noticed.
MUTANTS: list[tuple[str, str, str, Callable[[], None]]] = [
    ("mixed.cpp", "copy_queries<T>(job_, part_, bench_.queries);  // another", "//", check_attention),
    ("mixed.cpp", "start -= middle;", ";", check_attention),
    ("mixed.cpp", "capped(logits, 1, cap)", "logits", check_attention),
    ("mixed.cpp", "(!part_.visible || part_.visible[position])", "true", check_attention),
    ("mixed.cpp", "sheet_.logits_of(i, span_)[position] = -kInfinity;", ";", check_attention),
    ("mixed.cpp", "if (sheet_.marks[k] < within) {", "{", check_attention),
    ("mixed.cpp", "own_.start[i] = -sum(middle);", "own_.start[i] = 0;", check_attention),
    ("mixed.cpp", "!(own_.mass[i] < own_.least[i])", "true", check_attention),
    ("mixed.cpp", "counts[1] += sheet_.blocks[chunk];", ";", check_attention),
    ("mixed.cpp", "merge(job_, result, result_of(chunk));", "merge(job_, result, result_of(0));", check_attention),
    ("mixed.cpp", "load<Floats>(own_.middle + d) * own_.mass[i]", "load<Floats>(own_.middle + d)", check_attention),
    ("mixed.h", "total = total * std::exp2(top - new_top) + sum(mass);", "total += sum(mass);", check_attention),
    ("mixed.cpp", "if (job_.sinks) {", "if (false) {", check_attention),
    ("mixed.cpp", " - own_.against[i], weight);", ", weight);", check_attention),
    ("codes.h", "row * by.row + head_ * by.head", "row * by.row", check_attention),
    ("codes.h", "block %= codes_.each;", "block = 0;", check_attention),
    ("codes.h", "whole |= shifted & places;", "whole |= shifted;", check_attention),
    ("buckets.h", "if (sum > budget)", "if (sum >= budget)", check_attention),
    ("buckets.h", "kSteps = 8;", "kSteps = 4;", check_attention),
    ("rounding.cpp", "least = mean - distance;", "least = mean;", check_codes),
    ("rounding.cpp", "(Ints)reach + (1 << (kStepShift - 1))", "(Ints)reach", check_codes),
    ("rounding.cpp", "if (!bench.seen[t]) continue;", "", check_codes),
    ("rounding.cpp", "if (bench.seen[t]) distance", "distance", check_codes),
    ("rounding.cpp", "bench.seen[t] ? codes : Floats{}", "codes", check_codes),
    ("rounding.cpp", "job.end[row], copy.room()", "copy.room()", check_codes),
    ("rounding.cpp", "std::max<int64_t>(0, begin)", "0", check_codes),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "check"), MUTANTS, ids=[m[1] for m in MUTANTS])
def test_a_broken_kernel_is_noticed(
    file: str,
    old: str,
    new: str,
    check: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, name = ("mixed", "attend_mixed") if check is check_attention else ("rounding", "encode")
    broken: ctypes.CDLL = mutant(file, old, new, f"{source}.cpp", tmp_path, monkeypatch)
    getattr(broken, f"refreshkv_{name}").argtypes = [ctypes.c_void_p]
    monkeypatch.setattr(mixed, "compiled", lambda: broken)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [check_attention, check_codes])
def test_the_checks_pass_unbroken(check: Callable[[], None]) -> None:
    assert build.library() is not None
    check()
