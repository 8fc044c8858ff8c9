"""The Triton kernels of a mixed step equal the reference, and broken ones are noticed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import written_there  # isort: skip  # before any kernel
from refreshkv.kernels import reference
from refreshkv.kernels.backend import triton_backend
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Entries
from tests.kernels import hostile
from tests.kernels.mixed import (
    BROKEN,
    EVERYTHING,
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
HEAD = MixedCase(rows=1, kv_heads=1, group=2, length=200)
SEVERAL = [
    MixedCase(),
    EVERYTHING,
    MixedCase(skip=0.9, budget=40, kv_heads=3),
    replace(HEAD, group=7, dim=80, value_dim=24),
    replace(HEAD, bits=6, value_bits=5),
    replace(HEAD, bits=1, value_bits=1, budget=999),
]
CASES = [
    *SEVERAL,
    *[replace(HEAD, group=group) for group in (*range(1, 9), 16)],
    *[replace(HEAD, dim=dim, value_dim=other) for dim, other in ((16, 256), (24, 20), (80, 7), (256, 16))],
    *[replace(HEAD, bits=bits, value_bits=7 - bits) for bits in range(1, 7)],
    *[replace(HEAD, length=length) for length in (1, 63, 64, 65, 128)],
    *[replace(HEAD, rows=2, budget=budget, hidden=hidden) for budget in (0, 1, 999) for hidden in ("", "left")],
    *[MixedCase(softcap=3.0, group=3), MixedCase(sinks=True), MixedCase(hidden="left", sinks=True)],
    MixedCase(skip=5.0, budget=40),
    *[MixedCase(layout=layout, rows=3) for layout in ("rows", "pages", "pages rows")],
]  # fmt: skip


def check(case: MixedCase, module: Any = triton_mixed) -> None:
    """In 16 bits sums are over codes and a large number, 1024 in float16: a log-sum-exp is off by some 2^-12."""
    strict = case.dtype == torch.float32
    check_mixed(written_there(module.attend_mixed), case, strict, off_by=0 if strict else 4e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_reference(case: MixedCase) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_in_16_bits_too(case: MixedCase, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("most", [1, triton_common.FILL], ids=["one split", "many splits"])
def test_a_long_row(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than one program counts; and with one split several blocks in it, as on a GPU that is full."""
    monkeypatch.setattr(triton_common, "FILL", most)
    monkeypatch.setattr(triton_common, "WAVES", most)
    check(replace(HEAD, rows=2, length=1500, budget=100, skip=0.5, hidden="holes"))


def check_lengths(module: Any) -> None:
    """What lies behind a length is not read."""
    for case in (MixedCase(), EVERYTHING):
        (query, entries, codes, options), given = case.mixed()
        lengths = torch.tensor([[0, 300], [40, 333], [129, 64]])[: case.rows]
        kind = replace(options, lengths=lengths)
        expected, exact = counted(reference.attend_mixed)(query, entries, codes, kind, **given)
        behind = torch.arange(case.length) >= lengths[..., None]
        for tensor in (entries.keys, entries.values):
            tensor.masked_fill_(behind[..., None], torch.nan)
        attend = counted(written_there(module.attend_mixed))
        ours, count = attend(query, entries, codes, kind, **given)
        torch.testing.assert_close(ours.output, expected.output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.lse, expected.lse)
        assert torch.equal(count, exact) and not ours.output[0, : case.group].any()


def test_lengths_hide_what_lies_beyond() -> None:
    check_lengths(triton_mixed)


def check_heads(module: Any) -> None:
    (query, entries, codes, options), given = EVERYTHING.mixed()
    heads = torch.tensor([[True, False], [False, True], [True, True]])
    attend, wanted = counted(written_there(module.attend_mixed)), heads.repeat_interleave(4, 1)
    some = replace(options, heads=heads)
    ours, exact = attend(query, entries, codes, some, **given)
    every, every_exact = attend(query, entries, codes, options, **given)
    assert torch.equal(ours.output[wanted], every.output[wanted])
    assert torch.equal(ours.lse[wanted], every.lse[wanted])
    assert bool(ours.output[~wanted].isnan().all() and ours.lse[~wanted].isnan().all())
    assert torch.equal(exact, every_exact * heads[..., None])
    _, expected = counted(reference.attend_mixed)(query, entries, codes, some, **given)
    assert torch.equal(exact, expected)


def test_the_heads_asked_for_are_right_and_the_others_not_touched() -> None:
    check_heads(triton_mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_nan_in_is_nan_out(dtype: torch.dtype) -> None:
    attend = written_there(triton_mixed.attend_mixed)
    check_broken_numbers(attend, reference.encode, BROKEN[-1:], dtype)


def test_no_place_leads_elsewhere() -> None:
    check_broken_places(written_there(triton_mixed.attend_mixed), encode_there(), count=4)


def test_without_entries_rows_or_codes() -> None:
    (query, entries, codes, options), given = MixedCase().mixed()
    attend = counted(written_there(triton_mixed.attend_mixed))
    none = Entries(entries.keys[:, :, :0], entries.values[:, :, :0])
    empty = Codes.room(entries.keys, (64, 64), 0, 2, 2)
    for entries_or_none, some in ((none, codes), (entries, empty), (none, empty)):
        expected, exact = counted(reference.attend_mixed)(
            query, entries_or_none, some, options, **given
        )
        ours, count = attend(query, entries_or_none, some, options, **given)
        hostile.close(ours.output, expected.output, torch.float32)
        hostile.close(ours.lse, expected.lse, torch.float32)
        assert torch.equal(count, exact)


def test_what_it_does_not_take_goes_to_the_reference() -> None:
    for case in (replace(HEAD, dim=272, group=1), replace(HEAD, group=17)):
        (query, entries, codes, options), given = case.mixed()
        assert not triton_mixed.serves(query, entries, codes, options, **given)
        check_mixed(written_there(triton_backend().attend_mixed), case)
    (query, entries, codes, options), given = HEAD.mixed()
    assert triton_mixed.serves(query, entries, codes, options, **given)
    listed = replace(entries, positions=torch.zeros(1, 1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="every position"):
        triton_mixed.attend_mixed(query, listed, codes, options, **given, tally=torch.zeros(1))


# From here on: what the lines of the kernels are for.


def check_long_splits(module: Any) -> None:
    """Several blocks in one split."""
    with few_programs():
        check(replace(HEAD, length=300, budget=30), module)


def check_few_programs(module: Any) -> None:
    """Several pieces of a row for one program that counts."""
    with few_programs():
        check_budgets(module, [30, 120, 300], length=2200)


@contextmanager
def few_programs() -> Iterator[None]:
    common = importlib.import_module("refreshkv.kernels.triton.common")  # it may be the mutant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "FILL", 1)
        yield


def check_budgets(module: Any, budgets: Sequence[int] = (0, 90), length: int = 333) -> None:
    """Rows that read nothing exactly, and much."""
    case = replace(MixedCase(), rows=len(budgets), length=length)
    (query, entries, codes, options), given = case.mixed()
    given["budget"] = torch.tensor(budgets)
    _, exact = counted(written_there(module.attend_mixed))(query, entries, codes, options, **given)
    _, expected = counted(reference.attend_mixed)(query, entries, codes, options, **given)
    assert torch.equal(exact, expected)


def of(case: MixedCase) -> Callable[[Any], None]:
    return lambda module: check(case, module)


CHECKS: dict[str, Callable[[Any], None]] = {
    "plain": of(MixedCase()),
    "everything": of(EVERYTHING),
    "skip": of(SEVERAL[2]),
    "exact": of(replace(HEAD, budget=999)),
    "half": of(replace(HEAD, dtype=torch.float16)),
    "bfloat16": of(replace(HEAD, dtype=torch.bfloat16)),
    "rows": of(MixedCase(layout="rows", rows=3)),
    "long": of(replace(HEAD, length=2000, budget=100)),
    "budgets": check_budgets,
    "long splits": check_long_splits,
    "few programs": check_few_programs,
    "lengths": check_lengths,
    "heads": check_heads,
}
CODES, ROUGH, MIXED = "codes", "rough", "mixed"
MUTANTS = [
    ("plain", Mutant(CODES, "pairs >> 16", "pairs")),
    ("plain", Mutant(CODES, "tl.join(word, word >> 8)", "tl.join(word, word >> 9)")),
    ("plain", Mutant(CODES, "& 0x00010001) << bit", "& 0x00010001) << 0")),
    ("plain", Mutant(CODES, "across[:, None] // SHORT", "0 * across[:, None]")),
    ("plain", Mutant(CODES, "(2**BITS - 1) * 0.5), step", "(2**BITS - 1) * 0.25), step")),
    ("half", Mutant(CODES, "offset = middle + 1024", "offset = middle + 1023")),
    ("bfloat16", Mutant(CODES, "offset = middle + 128", "offset = middle + 127")),
    ("plain", Mutant(CODES, "(block >= 0) & (block < end)", "(block >= 1) & (block < end)")),
    ("everything", Mutant(CODES, "index = block % EACH", "index = block * 0")),
    ("everything", Mutant(CODES, "row * copy.block_row", "0")),
    ("rows", Mutant(CODES, "kept_row(copy.rows_ptr, row, coded)", "row")),
    ("plain", Mutant(ROUGH, "(-first - ahead) // BLOCK", "-first // BLOCK")),
    ("plain", Mutant(ROUGH, "wide * middle[None, :]", "0 * wide * middle[None, :]")),
    ("plain", Mutant(ROUGH, "tl.where(seen[:, None], logits", "tl.where(seen[:, None] | True, logits")),
    ("plain", Mutant(ROUGH, "tl.maximum(depth, 0.0), BUCKETS - 1)", "tl.maximum(depth, 0.0), 20.0)")),
    ("plain", Mutant(ROUGH, "(page >= 0) & (index < stop", "(index < stop")),
    ("plain", Mutant(ROUGH, "tl.store(counts_ptr + own * BUCKETS", "tl.store(counts_ptr + 0 * BUCKETS")),
    ("everything", Mutant(ROUGH, "head * GROUP + member, mask=real, other=0.0)", "member, mask=real, other=0.0)")),
    ("everything", Mutant(ROUGH, "total = add_exponentials(", "add_exponentials(")),
    ("few programs", Mutant(ROUGH, "tl.range(part * AT_ONCE, stop", "tl.range(0, stop")),
    ("few programs", Mutant(ROUGH, "count += tl.histogram", "count = tl.histogram")),
    ("few programs", Mutant(ROUGH, "stop, parts * AT_ONCE)", "part * AT_ONCE + 1, parts * AT_ONCE)")),
    ("long splits", Mutant(ROUGH, "mass * tl.exp(top - origin) +", "")),
    ("plain", Mutant(MIXED, "depth_of(logits, total) < fit", "depth_of(logits, total) <= fit")),
    ("budgets", Mutant(MIXED, "<= tl.load(budget_ptr + row)", "<= tl.load(budget_ptr)")),
    ("plain", Mutant(MIXED, "rounded & (wanted[:, None] == 0)", "rounded")),
    ("plain", Mutant(MIXED, "tl.sum(short.to(tl.float32), 0) * offset", "tl.sum(short.to(tl.float32), 0) * 0")),
    ("plain", Mutant(MIXED, "middle[:, None] * mass[None, :] +", "")),
    ("long splits", Mutant(MIXED, "                rounded_mass += mass", "                rounded_mass = mass")),
    ("plain", Mutant(MIXED, "exact_acc * of_exact[None, :]", "exact_acc")),
    ("plain", Mutant(MIXED, "exact += chosen", "exact += 1")),
    ("plain", Mutant(MIXED, "read.to(tl.int64) * value_bytes", "read.to(tl.int64)")),
    ("plain", Mutant(MIXED, "tl.maximum(block_0 + finished * BLOCK, 0)", "finished * BLOCK")),
    ("plain", Mutant(MIXED, "finished.to(tl.int64) * key_bytes", "finished.to(tl.int64)")),
    ("half", Mutant(MIXED, "(sums / LIFT)", "sums")),
    ("skip", Mutant(MIXED, "(most >= least)", "(most > 0)")),
    ("skip", Mutant(MIXED, "skip / blocks", "skip")),
    ("long splits", Mutant(MIXED, "exact_mass * decay +", "")),
    ("long splits", Mutant(MIXED, "exact_acc * decay[None, :]", "exact_acc")),
    ("plain", Mutant(MIXED, "wanted & (position >= 0)", "(position >= 0)")),
    ("heads", Mutant(MIXED, "if not asked_for(how.heads_ptr, row, head, kv_heads):", "if kept < -9:")),
    ("everything", Mutant(MIXED, "mass * beside,", "mass * 0,")),
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_pass_unbroken(name: str) -> None:
    CHECKS[name](triton_mixed)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "mixed") as broken, pytest.raises(AssertionError):
        CHECKS[name](broken)
