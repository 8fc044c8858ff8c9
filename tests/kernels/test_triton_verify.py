"""The Triton kernels for several queries of a row equal the reference, and broken ones are noticed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from refreshkv.kernels import reference
from tests.kernels.comparison import TOLERANCE, Case, check_verify, check_vote, close
from tests.kernels.interpreted import run_there
from tests.kernels.mutants import Mutant, mutated

triton_verify = importlib.import_module("refreshkv.kernels.triton.verify")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter, at log(0)
]
CHECKS = {"verify": check_verify, "vote": check_vote}
EVERY_OP = pytest.mark.parametrize("op", CHECKS)

HEAD = Case(rows=1, kv_heads=1, length=40)
EVERYTHING = Case(softcap=2.0, sinks=True, hidden="per head", group=3, length=40)
CASES = [
    *[replace(HEAD, group=group) for group in (1, 3, 8)],
    *[replace(HEAD, length=length) for length in (1, 2, 131)],
    *[replace(HEAD, dim=dim) for dim in (80, 96, 128, 256)],
    replace(HEAD, value_dim=48),
    replace(HEAD, rows=2, hidden="left"),
    EVERYTHING,
]


def check(op: str, case: Case, module: Any = triton_verify) -> None:
    CHECKS[op](run_there(getattr(module, op)), case)


@EVERY_OP
def test_signatures_are_those_of_the_reference(op: str) -> None:
    ours, theirs = getattr(triton_verify, op), getattr(reference, op)
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_verify_equals_the_reference(case: Case) -> None:
    check("verify", case)


@pytest.mark.parametrize("case", [HEAD, replace(HEAD, rows=3, group=6), EVERYTHING], ids=str)
def test_vote_equals_the_reference(case: Case) -> None:
    check("vote", case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [EVERYTHING, replace(HEAD, length=131, dim=128)], ids=str)
def test_verify_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    check("verify", replace(case, dtype=dtype))


def check_many_queries(module: Any, queries: int, group: int) -> None:
    """More than one tile of them, and tiles that are not full."""
    case = replace(HEAD, group=group)
    _, keys, values, options = case.inputs()
    gen = torch.Generator().manual_seed(queries)
    query = torch.randn(1, group, queries, case.dim, generator=gen)
    options |= {"starts": torch.tensor([case.length - queries]), "window": 23}
    expected, expected_scored = reference.verify(query, keys, values, **options)
    attended, scored = run_there(module.verify)(query, keys, values, **options)
    close(attended.output, expected.output, case, "output")
    close(attended.lse, expected.lse, case, "lse")
    close(scored.scores, expected_scored.scores, case, "scores")


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("queries", [1, 2, 9, 17, 33])
def test_any_number_of_queries(queries: int, group: int) -> None:
    check_many_queries(triton_verify, queries, group)


@pytest.mark.parametrize("programs", [1, 64], ids=["one split", "many splits"])
def test_a_long_row(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One split is a program with several blocks, as on a GPU that is already full."""
    common = importlib.import_module("refreshkv.kernels.triton.common")
    monkeypatch.setattr(common, "FILL", programs)
    check("verify", replace(HEAD, length=300, group=2))


def check_what_is_read(module: Any) -> None:
    """Nothing hidden, and nothing after the last query."""
    case = replace(EVERYTHING, hidden="holes", rows=3)
    query, keys, values, options = case.several()
    counts = torch.tensor([5, 0, 2])
    expected = reference.verify(
        query.float(), keys.float(), values.float(), **options, counts=counts
    )
    last = options["starts"] + query.shape[2] - 1
    unread = (torch.arange(case.length) > last[:, None])[:, None] | ~options["visible"]
    unread[1] = True  # this row sits out
    for entries in (keys, values):
        entries.masked_fill_(unread[..., None], torch.nan)
    attended, scored = run_there(module.verify)(query, keys, values, **options, counts=counts)
    close(attended.output[::2], expected[0].output[::2], case, "output")
    assert bool(attended.lse[1].isneginf().all())
    close(scored.scores, expected[1].scores, case, "scores")


def test_what_is_not_seen_is_not_read() -> None:
    check_what_is_read(triton_verify)


def test_any_order_of_the_dimensions() -> None:
    """As a store may keep them: tokens before heads, K beside V; and queries as a model makes them."""
    case = replace(HEAD, kv_heads=2)
    query, keys, values, options = case.several()
    expected, expected_scored = reference.verify(query, keys, values, **options)
    both = torch.cat([keys, values], -1).transpose(1, 2).contiguous().transpose(1, 2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    strided = both[..., : case.dim], both[..., case.dim :]
    attended, scored = run_there(triton_verify.verify)(query, *strided, **options)
    close(attended.output, expected.output, case, "output")
    close(scored.scores, expected_scored.scores, case, "scores")


# From here on: what the lines of the kernels are for.


def of(op: str, case: Case) -> Callable[[Any], None]:
    return lambda module: check(op, case, module)


BREAKABLE: dict[str, Callable[[Any], None]] = {
    "plain": of("verify", replace(HEAD, rows=2, group=3)),
    "everything": of("verify", EVERYTHING),
    "tiles": lambda module: check_many_queries(module, queries=17, group=5),
    "read": check_what_is_read,
}
VERIFY, CAUSAL = "triton_verify", "triton_causal"
MUTANTS = [
    ("plain", Mutant(CAUSAL, "places <= last", "places < last")),
    ("plain", Mutant(CAUSAL, "places > last - window", "places >= last - window")),
    ("plain", Mutant(CAUSAL, "start - window + 1", "start - window + 2")),
    ("plain", Mutant(CAUSAL, "start + queries, length", "start + queries - 1, length")),
    ("plain", Mutant(CAUSAL, "member // QUERIES", "member % GROUP")),
    ("plain", Mutant(CAUSAL, "acc / mass[:, None]", "acc")),
    ("plain", Mutant(CAUSAL, "last = start + member % QUERIES", "last = start + QUERIES - 1")),
    ("plain", Mutant(VERIFY, "query < voting", "query <= voting")),
    ("plain", Mutant(VERIFY, "member % GROUP_PAD < GROUP)", "member >= 0)")),
    ("plain", Mutant(VERIFY, "tl.sum(weights, 1) / GROUP", "tl.sum(weights, 1) / GROUP_PAD")),
    ("plain", Mutant(VERIFY, "tl.max(by_query, 2)", "tl.sum(by_query, 2)")),
    ("plain", Mutant(VERIFY, "votes / voting", "votes / QUERIES")),
    ("plain", Mutant(VERIFY, "(voting == 0) | ", "")),
    ("everything", Mutant(VERIFY, "weights *= share", "weights /= share")),
    ("everything", Mutant(VERIFY, "sinks_ptr + own_head", "sinks_ptr + own_head * 0")),
    ("everything", Mutant(CAUSAL, "shown_ptr + places * visible_place", "shown_ptr + places * 0")),
    ("tiles", Mutant(CAUSAL, "% TILES * TILE", "% TILES * 1")),
    ("tiles", Mutant(VERIFY, "member = tile * TILE", "member = 0 * TILE")),
    ("read", Mutant(CAUSAL, "mask=shown[:, None] &", "mask=(places >= 0)[:, None] &")),
    ("read", Mutant(CAUSAL, "> 0, end, begin)", "> -1, end, begin)")),
]


@pytest.mark.parametrize("name", BREAKABLE)
def test_the_checks_pass_unbroken(name: str) -> None:
    BREAKABLE[name](triton_verify)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "triton_verify") as broken, pytest.raises(AssertionError):
        BREAKABLE[name](broken)
