"""The Triton kernels of the full step equal the reference, and broken ones are noticed."""

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
    check_attend_and_score,
    check_score,
    check_scored,
    close,
    in_float32,
)
from tests.kernels.interpreted import run_there
from tests.kernels.mutants import Mutant, mutated

triton_common = importlib.import_module("refreshkv.kernels.triton.common")
triton_full = importlib.import_module("refreshkv.kernels.triton.full")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter, at log(0)
]
OPERATIONS = {"attend_and_score": check_attend_and_score, "score": check_score}
EVERY_OPERATION = pytest.mark.parametrize("op", OPERATIONS)

HEAD = Case(rows=1, kv_heads=1, length=33)
EVERYTHING = Case(rows=1, softcap=2.0, sinks=True, hidden="per head", group=3, length=40)
CASES = [
    *[replace(HEAD, group=group) for group in range(1, 9)],
    *[replace(HEAD, length=length) for length in (1, 2, 128, 300)],
    *[replace(HEAD, dim=dim) for dim in (80, 96, 128, 256)],
    replace(HEAD, value_dim=48),
    replace(HEAD, rows=2, hidden="left"),
    EVERYTHING,
]
LONG = replace(HEAD, length=2400)  # more splits than are merged at once, several blocks of scores


def on(module: Any, op: str) -> Callable[..., Any]:
    return run_there(getattr(module, op))


@EVERY_OPERATION
def test_signatures_are_those_of_the_reference(op: str) -> None:
    assert inspect.signature(getattr(triton_full, op)) == inspect.signature(getattr(reference, op))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_and_score_equals_the_reference(case: Case) -> None:
    check_attend_and_score(on(triton_full, "attend_and_score"), case)


@pytest.mark.parametrize("case", [HEAD, replace(HEAD, dim=80), EVERYTHING], ids=str)
def test_score_equals_the_reference(case: Case) -> None:
    check_score(on(triton_full, "score"), case)


@EVERY_OPERATION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [HEAD, EVERYTHING], ids=str)
def test_sixteen_bits(op: str, case: Case, dtype: torch.dtype) -> None:
    assert dtype in TOLERANCE
    OPERATIONS[op](on(triton_full, op), replace(case, dtype=dtype))


@EVERY_OPERATION
@pytest.mark.parametrize("most", [1, triton_common.FILL], ids=["one split", "many splits"])
def test_a_long_row(op: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long splits have several blocks, as on a GPU that is already full."""
    monkeypatch.setattr(triton_common, "FILL", most)
    OPERATIONS[op](on(triton_full, op), LONG)


def check_lengths(module: Any) -> None:
    """Lengths of heads and rows: nothing that does not count is read, and its score is 0."""
    case = Case(rows=2, group=2, length=70, hidden="holes", sinks=True)
    query, keys, values, options = case.inputs()
    lengths = torch.tensor([[0, 70], [41, 9]])
    counts = reference.within(lengths, options["visible"], case.length)
    hidden = {**options, "visible": counts}
    expected, expected_scored = reference.attend_and_score(*in_float32(case), **hidden)
    seen = expected.lse.isfinite()
    keys.masked_fill_(~counts[..., None], torch.nan)
    values.masked_fill_(~counts[..., None], torch.nan)
    options["lengths"] = lengths
    actual, scored = on(module, "attend_and_score")(query, keys, values, **options)
    close(actual.output, expected.output, case, "output")
    for given in (scored, on(module, "score")(query, keys, **options)):
        assert torch.equal(given.lse.isneginf(), ~seen)
        close(given.lse[seen], expected.lse[seen], case, "lse")
        close(given.scores, expected_scored.scores, case, "scores")
        assert not given.scores[~counts.expand_as(given.scores)].any()


def test_what_does_not_count_is_not_read_and_scores_nothing() -> None:
    check_lengths(triton_full)


def check_heads(module: Any) -> None:
    query, keys, values, options = EVERYTHING.inputs()
    heads = torch.tensor([[False, True]])
    wanted = heads.repeat_interleave(EVERYTHING.group, 1)
    every, every_scored = on(module, "attend_and_score")(query, keys, values, **options)
    options["heads"] = heads
    some, scored = on(module, "attend_and_score")(query, keys, values, **options)
    assert torch.equal(some.output[wanted], every.output[wanted])
    for given in (scored, on(module, "score")(query, keys, **options)):
        assert torch.equal(given.lse[wanted], every.lse[wanted])
        assert torch.equal(given.scores[heads], every_scored.scores[heads])
        assert bool(given.lse[~wanted].isnan().all() and given.scores[~heads].isnan().all())


def test_the_heads_asked_for_are_right_and_the_others_not_touched() -> None:
    check_heads(triton_full)


def test_any_order_of_the_dimensions() -> None:
    """As a store may keep them: tokens before heads, and K beside V."""
    query, keys, values, options = HEAD.inputs()
    both = torch.cat([keys, values], -1).transpose(1, 2).contiguous().transpose(1, 2)
    strided = both[..., : HEAD.dim], both[..., HEAD.dim :]
    expected, expected_scored = reference.attend_and_score(query, keys, values, **options)
    actual, scored = on(triton_full, "attend_and_score")(query, *strided, **options)
    close(actual.output, expected.output, HEAD, "output")
    check_scored(scored, expected_scored, HEAD)


# From here on: what the lines of the kernels are for. Those of a split are the same in a partial step.


CHECKS = {
    "both": lambda module: check_attend_and_score(on(module, "attend_and_score"), EVERYTHING),
    "score": lambda module: check_score(on(module, "score"), EVERYTHING),
    "long": lambda module: check_score(on(module, "score"), replace(HEAD, length=1100)),
    "lengths": check_lengths,
    "heads": check_heads,
}
COMMON, SPLIT, FULL = "triton_common", "triton_split", "triton_full"
MUTANTS = [
    ("both", Mutant(SPLIT, "logits = tl.where(seen[None, :]", "logits = tl.where(inside[None, :]")),
    ("both", Mutant(COMMON, "row = logits_ptr + member * ", "row = logits_ptr + 0 * ")),
    ("both", Mutant(FULL, "        head * GROUP,", "        0,")),
    ("both", Mutant(FULL, "lse_ptr + place * GROUP", "lse_ptr + place")),
    ("both", Mutant(FULL, 'reduction == "mean"', 'reduction == "max"')),
    ("score", Mutant(COMMON, "tl.exp(logits - tl.where(lse ==", "tl.exp(logits + tl.where(lse ==")),
    ("score", Mutant(COMMON, "weights *= beside_sink(", "weights /= beside_sink(")),
    ("score", Mutant(SPLIT, "top + tl.log(mass)", "tl.log(mass)")),
    ("score", Mutant(SPLIT, "logits_ptr + queries[:, None]", "logits_ptr + 0 * queries[:, None]")),
    ("score", Mutant(COMMON, "weights / GROUP", "weights")),
    ("long", Mutant(FULL, "to(tl.int64) * BLOCK", "to(tl.int64) * BLOCK * 2")),
    ("lengths", Mutant(FULL, "places < length", "places < entries")),
    ("lengths", Mutant(COMMON, "mass = mass * decay +", "mass = 1 + mass * decay +")),
    ("heads", Mutant(FULL, "if not tl.load(heads_ptr", "if tl.load(heads_ptr")),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_pass_unbroken(name: str) -> None:
    CHECKS[name](triton_full)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "triton_full") as broken, pytest.raises(AssertionError):
        CHECKS[name](broken)
