"""The Triton kernels of the partial step equal the reference, and broken ones are noticed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from refreshkv.kernels import reference
from tests.kernels.comparison import (
    TOLERANCE,
    Case,
    check_attend,
    check_attend_and_rank,
    check_attend_at,
    close,
    in_float32,
)
from tests.kernels.interpreted import run_there
from tests.kernels.mutants import Mutant, mutated

triton_common = importlib.import_module("refreshkv.kernels.triton.common")
triton_partial = importlib.import_module("refreshkv.kernels.triton.partial")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter, at log(0)
]
OPS = ("attend", "attend_and_rank", "attend_at")
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])

HEAD = Case(rows=1, kv_heads=1, length=33)
EVERYTHING = Case(rows=1, softcap=2.0, sinks=True, hidden="per head", group=3, length=40)
CASES = [
    *[replace(HEAD, group=group) for group in range(1, 9)],
    *[replace(HEAD, length=length) for length in (1, 2, 128, 300)],
    *[replace(HEAD, dim=dim) for dim in (80, 96, 128, 256)],
    *[replace(HEAD, value_dim=dim) for dim in (48, 128)],
    replace(HEAD, rows=2, hidden="left"),
    EVERYTHING,
]
POSITIONS = Case(rows=3, kv_heads=1, length=20)
LONG = replace(
    HEAD, length=2400
)  # more splits than are merged at once, more entries than are ranked at once


def on(module: Any, op: str) -> Callable[..., Any]:
    return run_there(getattr(module, op))


@pytest.fixture(params=[1, triton_common.FILL], ids=["one split", "many splits"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long splits have several blocks, as on a GPU that is already full."""
    monkeypatch.setattr(triton_common, "FILL", request.param)
    monkeypatch.setattr(triton_common, "WAVES", request.param)


@pytest.mark.parametrize("op", OPS)
def test_signatures_are_those_of_the_reference(op: str) -> None:
    assert inspect.signature(getattr(triton_partial, op)) == inspect.signature(
        getattr(reference, op)
    )


@pytest.mark.parametrize(
    ("heads", "entries", "expected"),
    [
        (8, 1024, 16),  # a partial cache at batch 1: a block each
        (8, 131072, 128),  # a long one: 1024 entries each
        (1, 524288, triton_common.MOST_SPLITS),
        (512, 131072, 4),  # the GPU is full: short waves
        (5000, 100, 1),
    ],
)
def test_how_many_programs_share_a_head(heads: int, entries: int, expected: int) -> None:
    assert triton_common.split_count(heads, entries, block=64) == expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_equals_the_reference(case: Case) -> None:
    check_attend(on(triton_partial, "attend"), case)


@EVERY_DTYPE
@pytest.mark.parametrize("case", [replace(HEAD, length=300), EVERYTHING], ids=str)
def test_attend_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    check_attend(on(triton_partial, "attend"), replace(case, dtype=dtype))


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("op", ["attend", "attend_and_rank"])
def test_a_long_row(op: str) -> None:
    check = {"attend": check_attend, "attend_and_rank": check_attend_and_rank}[op]
    check(on(triton_partial, op), LONG)


@EVERY_DTYPE
@pytest.mark.parametrize(
    "case", [HEAD, replace(HEAD, group=7, length=9), replace(HEAD, length=1), EVERYTHING], ids=str
)
def test_attend_and_rank_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    check_attend_and_rank(on(triton_partial, "attend_and_rank"), replace(case, dtype=dtype))


@pytest.mark.parametrize("length", [5, 1100])
def test_ties_go_to_the_later_slot(length: int) -> None:
    query, keys, values, options = replace(HEAD, length=length).inputs()
    query = torch.zeros_like(query)
    options |= {"newest": torch.tensor([[length - 2]]), "count": 5}
    _, best = on(triton_partial, "attend_and_rank")(query, keys, values, **options)
    assert torch.equal(best, reference.attend_and_rank(query, keys, values, **options)[1])


def check_some_lengths(module: Any) -> None:
    """Lengths of heads and rows; and nothing that does not count is read."""
    case = Case(rows=2, group=2, length=70, hidden="holes", sinks=True)
    query, keys, values, options = case.inputs()
    lengths = torch.tensor([[0, 70], [41, 9]])
    counts = reference.within(lengths, options["visible"], case.length)
    expected = reference.attend(*in_float32(case), **options | {"visible": counts})
    keys.masked_fill_(~counts[..., None], torch.nan)
    values.masked_fill_(~counts[..., None], torch.nan)
    rank = {"newest": torch.zeros(2, 2, dtype=torch.int64), "count": 3}
    for actual in (
        on(module, "attend")(query, keys, values, **options, lengths=lengths),
        on(module, "attend_and_rank")(query, keys, values, **options, lengths=lengths, **rank)[0],
    ):
        close(actual.output, expected.output, case, "output")
        seen = expected.lse.isfinite()
        assert torch.equal(actual.lse.isneginf(), ~seen)
        close(actual.lse[seen], expected.lse[seen], case, "lse")


def test_what_does_not_count_is_not_read() -> None:
    check_some_lengths(triton_partial)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)])
def test_lengths_of_all_rows_or_heads(shape: tuple[int, int]) -> None:
    case = Case(group=1, length=20)
    query, keys, values, options = case.inputs()
    options["lengths"] = torch.tensor([[7, 20]])[:, : max(shape)].reshape(shape)
    actual = on(triton_partial, "attend")(query, keys, values, **options)
    close(actual.output, reference.attend(query, keys, values, **options).output, case, "output")


def test_any_order_of_the_dimensions() -> None:
    """As a store may keep them: tokens before heads, and K beside V."""
    query, keys, values, options = HEAD.inputs()
    both = torch.cat([keys, values], -1).transpose(1, 2).contiguous().transpose(1, 2)
    strided = both[..., : HEAD.dim], both[..., HEAD.dim :]
    actual = on(triton_partial, "attend")(query, *strided, **options)
    close(actual.output, reference.attend(query, keys, values, **options).output, HEAD, "output")


def check_heads(module: Any) -> None:
    query, keys, values, options = EVERYTHING.inputs()
    heads = torch.tensor([[False, True]])
    options |= {"newest": torch.zeros(1, 2, dtype=torch.int64), "count": 2}
    some, ranks = on(module, "attend_and_rank")(query, keys, values, **options, heads=heads)
    every, every_rank = on(module, "attend_and_rank")(query, keys, values, **options)
    wanted = heads.repeat_interleave(EVERYTHING.group, 1)
    assert torch.equal(some.output[wanted], every.output[wanted])
    assert torch.equal(some.lse[wanted], every.lse[wanted])
    assert torch.equal(ranks[heads], every_rank[heads])
    assert bool(some.output[~wanted].isnan().all() and some.lse[~wanted].isnan().all())


def test_the_heads_asked_for_are_right_and_the_others_not_touched() -> None:
    check_heads(triton_partial)


@EVERY_DTYPE
@pytest.mark.parametrize(
    "case", [POSITIONS, replace(POSITIONS, softcap=2.0, sinks=True, group=5, dim=80)], ids=str
)
def test_a_list_of_positions_equals_a_copy(case: Case, dtype: torch.dtype) -> None:
    check_attend_at(on(triton_partial, "attend_at"), replace(case, dtype=dtype))


# From here on: what the lines of the kernels are for.


def check_long_splits(module: Any) -> None:
    """Several blocks in one split."""
    common = importlib.import_module("refreshkv.kernels.triton.common")  # it may be the mutant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "FILL", 1)
        check_attend(on(module, "attend"), replace(HEAD, length=300))


def checks(op: str, check: Callable[..., None], case: Case) -> Callable[[Any], None]:
    return lambda module: check(on(module, op), case)


CHECKS = {
    "attend": checks("attend", check_attend, replace(HEAD, length=200, value_dim=48)),
    "everything": checks("attend", check_attend, EVERYTHING),
    "rank": checks("attend_and_rank", check_attend_and_rank, replace(EVERYTHING, kv_heads=1)),
    "at": checks("attend_at", check_attend_at, POSITIONS),
    "long splits": check_long_splits,
    "lengths": check_some_lengths,
    "heads": check_heads,
}
COMMON, SPLIT, PARTIAL = "triton_common", "triton_split", "triton_partial"
MUTANTS = [
    ("attend", Mutant(COMMON, "products * scale", "products")),
    ("attend", Mutant(COMMON, "mask=every < splits,", "mask=every < splits - 1,")),
    ("attend", Mutant(COMMON, "tl.exp(some_lse - total)", "tl.exp(total - total)")),
    ("attend", Mutant(SPLIT, "inside = places < last", "inside = places <= last")),
    ("attend", Mutant(SPLIT, "places * value_entry", "places * key_entry")),
    ("everything", Mutant(COMMON, "softcap * (2 * tl.sigmoid", "(2 * tl.sigmoid")),
    ("everything", Mutant(COMMON, "sinks_ptr + query // QUERIES", "sinks_ptr")),
    ("everything", Mutant(COMMON, "acc *= beside_sink(", "acc /= beside_sink(")),
    ("everything", Mutant(COMMON, "lse_ptr + place, lse)", "lse_ptr + place, lse + 0.1)")),
    ("everything", Mutant(SPLIT, "seen & tl.load(visible", "seen | tl.load(visible")),
    ("rank", Mutant(COMMON, "sinks_ptr + first + member", "sinks_ptr + first")),
    (
        "rank",
        Mutant(
            COMMON,
            "tl.maximum(reduced, weights, propagate_nan",
            "tl.maximum(weights, weights, propagate_nan",
        ),
    ),
    ("rank", Mutant(PARTIAL, "| slots", "| (slots ^ 1)")),
    ("rank", Mutant(PARTIAL, "entries, keys, _LOWEST)", "entries, keys, 2**62)")),
    ("rank", Mutant(PARTIAL, "(newest_ptr + place), -1.0", "(newest_ptr + place), scores")),
    ("rank", Mutant(PARTIAL, "keys == best, _LOWEST", "keys == best, keys")),
    ("at", Mutant(SPLIT, "(at >= 0)", "(at >= -1)")),
    ("at", Mutant(SPLIT, "at // PAGE", "at // PAGE * 0")),
    ("at", Mutant(SPLIT, "page * value_row", "page * key_entry")),
    ("long splits", Mutant(COMMON, "acc = acc * decay[:, None]", "acc = acc")),
    ("long splits", Mutant(COMMON, "mass * decay", "mass")),
    ("lengths", Mutant(SPLIT, "length_row + head * length_head", "length_row")),
    ("lengths", Mutant(COMMON, "mask=used, other=0.0", "mask=dims[None, :] < DIM")),
    ("heads", Mutant(SPLIT, "if not tl.load(heads_ptr", "if tl.load(heads_ptr")),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_pass_unbroken(name: str) -> None:
    CHECKS[name](triton_partial)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "triton_partial") as broken, pytest.raises(AssertionError):
        CHECKS[name](broken)
