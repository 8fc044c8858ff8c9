"""Votes from a guess of each log-sum-exp equal the reference, and broken kernels are noticed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import reference
from tests.kernels import hostile
from tests.kernels.cases import WHOLE, Case
from tests.kernels.comparison import TOLERANCE, check_votes, close, counted
from tests.kernels.interpreted import run_there
from tests.kernels.mutants import Mutant, mutated

triton_verify = importlib.import_module("refreshkv.kernels.triton.verify")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter, at log(0)
]
NAN, INF = hostile.NAN, hostile.INF
HEAD = Case(rows=1, kv_heads=1, length=40)
PAGES = Case(rows=3, group=2, length=20, value_dim=48)
EVERYTHING = Case(softcap=2.0, sinks=True, hidden="per head", group=3, length=40)
CASES = [
    *[replace(HEAD, length=length) for length in (1, 2, 131)],
    *[replace(HEAD, dim=dim) for dim in (80, 128, 256)],
    replace(HEAD, rows=2, hidden="left"),
    replace(HEAD, group=3),
    replace(HEAD, group=32),  # more heads than a tensor core takes rows
    EVERYTHING,
]


def off(lse: Tensor, by: float = 3.0) -> Tensor:
    """A guess of `lse`, by some nats too much or too little."""
    gen = torch.Generator().manual_seed(lse.numel())
    return lse + by * torch.randn(lse.shape, generator=gen)


def check(module: Any, case: Case, by: float = 3.0) -> None:
    """Output and log-sum-exp do not depend on the guess."""
    _, entries, options = case.inputs()
    query, starts = case.several()
    _, wide, shown = case.wide()
    everyone, some = counted(case)
    verify = run_there(module.verify)
    for reduction, counts, window in (("max", some, None), ("mean", everyone, 7)):
        given = {"starts": starts, "counts": None if counts is everyone else counts}
        given["window"] = window
        kind = replace(options, reduction=reduction)
        expected = off(reference.verify(query.float(), wide, kind, **given)[0].lse, by)
        attended, scored = verify(query, entries, kind, **given, expected=expected)
        exact, exact_scored = verify(query, entries, kind, **given)
        voting = counts > 0
        close(attended.output[voting], exact.output[voting].float(), case, "output")
        close(attended.lse[voting], exact.lse[voting], case, "lse")
        wanted = reference.verify(
            query.float(), wide, replace(shown, reduction=reduction), **given, expected=expected
        )[1]
        check_votes(scored, wanted, case, counts)
        if by and case.length > 9:
            assert not torch.allclose(scored.scores, exact_scored.scores, rtol=0.1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_votes_equal_the_reference(case: Case) -> None:
    check(triton_verify, case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [EVERYTHING, replace(HEAD, length=131, dim=128)], ids=str)
def test_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    check(triton_verify, replace(case, dtype=dtype))


@pytest.mark.parametrize("layout", WHOLE[1:])
def test_wherever_entries_lie(layout: str) -> None:
    check(triton_verify, replace(PAGES, layout=layout))
    everything = {"softcap": 2.0, "sinks": True, "hidden": "holes", "dim": 80}
    check(triton_verify, replace(PAGES, layout=layout, **everything))


@pytest.mark.parametrize("case", [HEAD, EVERYTHING], ids=str)
def test_a_guess_that_is_right_gives_the_exact_votes(case: Case) -> None:
    query, starts = case.several()
    _, entries, options = case.inputs()
    verify = run_there(triton_verify.verify)
    attended, exact = verify(query, entries, options, starts=starts)
    _, scored = verify(query, entries, options, starts=starts, expected=attended.lse)
    close(scored.scores, exact.scores, case, "scores")


def check_many_queries(module: Any, queries: int, group: int) -> None:
    """Any tile, and several; a single split or many."""
    case = replace(HEAD, group=group)
    _, entries, options = case.inputs()
    gen = torch.Generator().manual_seed(queries)
    query = torch.randn(1, group, queries, case.dim, generator=gen)
    for reduction, given in (
        ("max", {"starts": torch.tensor([case.length - queries]), "window": 23}),
        ("mean", {"starts": torch.tensor([3])}),
    ):
        kind = replace(options, reduction=reduction)
        expected = off(reference.verify(query, entries, kind, **given)[0].lse)
        wanted = reference.verify(query, entries, kind, **given, expected=expected)[1]
        _, scored = run_there(module.verify)(query, entries, kind, **given, expected=expected)
        close(scored.scores, wanted.scores, case, "scores")


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("queries", [1, 2, 8, 9, 17])
def test_any_number_of_queries(queries: int, group: int) -> None:
    check_many_queries(triton_verify, queries, group)


def check_long_splits(module: Any) -> None:
    """One split is a program with several blocks, as on a GPU that is already full."""
    common = importlib.import_module("refreshkv.kernels.triton.common")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "FILL", 1)
        check(module, replace(HEAD, length=300, group=2))


def test_long_splits() -> None:
    check_long_splits(triton_verify)


def check_no_guess(module: Any) -> None:
    """Nor a vote, which the other queries and heads still give; whatever the guess of the padding would be."""
    case = replace(EVERYTHING, group=2)
    query, starts = case.several()
    _, entries, options = case.inputs()
    verify = run_there(module.verify)
    options.sinks[1], options.sinks[2] = NAN, -INF
    for reduction, sinks in (("max", options.sinks), ("mean", options.sinks), ("mean", None)):
        kind = replace(options, reduction=reduction, sinks=sinks)
        expected = off(reference.verify(query, entries, kind, starts=starts)[0].lse)
        expected[:, :, 0], expected[:, 2, 1], expected[:, 3, 2:4] = NAN, INF, -INF
        given = {"starts": starts, "expected": expected}
        wanted = reference.verify(query, entries, kind, **given)[1].scores
        assert bool(wanted.any())
        close(verify(query, entries, kind, **given)[1].scores, wanted, case, "scores")
        given["expected"] = torch.full_like(expected, NAN)
        assert not verify(query, entries, kind, **given)[1].scores.any()


def test_a_query_without_a_guess_gives_no_votes() -> None:
    check_no_guess(triton_verify)


def check_hostile(module: Any) -> None:
    """Any start, count, length and guess; the votes are never more than 1, nor NaN."""
    case = replace(EVERYTHING, group=2, rows=3)
    query, _ = case.several()
    _, entries, options = case.inputs()
    shape = (case.rows, case.kv_heads)
    for seed in range(8):
        gen = torch.Generator().manual_seed(seed)
        given = {"starts": hostile.integers((3,), case.length, gen)}
        given["counts"] = hostile.integers((3,), 5, gen)
        given["counts"][seed % 3] = 3 - 2**32  # 3 in 32 bits
        given["window"] = None if seed % 2 else 5
        kind = replace(options, lengths=hostile.integers(shape, case.length, gen))
        expected = hostile.any_scores(tuple(query.shape[:-1]), gen)
        wanted = reference.verify(query, entries, kind, **given, expected=expected)[1].scores
        _, scored = run_there(module.verify)(query, entries, kind, **given, expected=expected)
        hostile.close(scored.scores, wanted, case.dtype)
        assert bool((wanted >= 0).all() and (wanted <= 1).all())


def test_any_number_is_a_guess() -> None:
    check_hostile(triton_verify)


def check_spoiled(module: Any, case: Case, what: str, number: float) -> None:
    query, entries, options, starts = hostile.spoiled(case, what, number)
    for reduction in ("max", "mean"):
        kind = replace(options, reduction=reduction)
        given = {"starts": starts, "expected": torch.zeros(query.shape[:-1])}
        attended, scored = run_there(module.verify)(query, entries, kind, **given)
        wanted, wanted_scored = reference.verify(query, entries, kind, **given)
        hostile.close(attended.output, wanted.output, case.dtype)
        hostile.close(scored.scores, wanted_scored.scores, case.dtype)
        assert bool(wanted_scored.scores.isfinite().all())


@pytest.mark.parametrize(("case", "what", "number"), hostile.SPOILED, ids=str)
def test_a_number_that_is_none_gives_no_votes(case: Case, what: str, number: float) -> None:
    check_spoiled(triton_verify, replace(case, group=2, length=40), what, number)


def check_heads(module: Any) -> None:
    """Of a head that nobody asks for nothing is written, of the others all."""
    query, starts = EVERYTHING.several()
    _, entries, options = EVERYTHING.inputs()
    heads = torch.tensor([[False, True], [True, False]])
    given = {"starts": starts, "expected": torch.zeros(query.shape[:-1])}
    verify = run_there(module.verify)
    scores = verify(query, entries, replace(options, heads=heads), **given)[1].scores
    assert torch.equal(scores[heads], verify(query, entries, options, **given)[1].scores[heads])
    assert bool(scores[~heads].isnan().all())


def test_the_heads_asked_for_are_right_and_the_others_not_touched() -> None:
    check_heads(triton_verify)


def of(case: Case) -> Callable[[Any], None]:
    return lambda module: check(module, case)


BREAKABLE: dict[str, Callable[[Any], None]] = {
    "plain": of(replace(HEAD, rows=2, group=3)),
    "everything": of(EVERYTHING),
    "tiles": lambda module: check_many_queries(module, queries=17, group=5),
    "splits": check_long_splits,
    "no guess": check_no_guess,
    "hostile": check_hostile,
    "spoiled": lambda module: check_spoiled(module, replace(HEAD, group=2), "keys", NAN),
    "heads": check_heads,
}
SPLIT, VERIFY = "split", "verify"
MUTANTS = [
    ("plain", Mutant(SPLIT, "slot // side % HEADS", "slot % HEADS")),
    ("plain", Mutant(SPLIT, "(side * HEADS) * side + slot % side", "(side * HEADS) * side")),
    ("plain", Mutant(SPLIT, "weights.shape[1]]), 1)", "weights.shape[1]]), 2)")),
    ("plain", Mutant(SPLIT, "tl.minimum(power, most[:, None])", "power")),
    ("plain", Mutant(SPLIT, "guess * LOG2_E - most", "guess - most")),
    ("plain", Mutant(SPLIT, "own & (token < voting)", "own")),
    ("plain", Mutant(SPLIT, "voting if HEADS else voting * GROUP", "voting")),
    ("plain", Mutant(SPLIT, "voting if HEADS else voting * GROUP", "QUERIES if HEADS else GROUP")),
    ("plain", Mutant(SPLIT, "tl.zeros([BLOCK], tl.float32)", "tl.full([BLOCK], 1, tl.float32)")),
    ("plain", Mutant(SPLIT, "before, after = tl.minimum(stop, begin)", "before, after = first")),
    ("plain", Mutant(SPLIT, "tl.maximum(first, end)", "stop")),
    ("everything", Mutant(SPLIT, "share *= beside_sink(", "share /= beside_sink(")),
    ("everything", Mutant(SPLIT, "sinks_ptr + heads", "sinks_ptr + heads * 0")),
    ("tiles", Mutant(SPLIT, "token = tile * (TILE // HEADS)", "token = 0 * (TILE // HEADS)")),
    ("tiles", Mutant(SPLIT, "votes.sum(2)", "votes[:, :, 0]")),
    ("everything", Mutant(SPLIT, "index, votes, mask=inside", "index, votes, mask=seen")),
    ("no guess", Mutant(SPLIT, 'tl.abs(guess) < float("inf")', "guess == guess")),
    ("no guess", Mutant(SPLIT, "tl.log2(share), float", "0.0, float")),
    (
        "hostile",
        Mutant(SPLIT, "tl.maximum(tl.load(counts_ptr + row), 0)", "tl.load(counts_ptr + row)"),
    ),
    ("spoiled", Mutant(SPLIT, "power == power, ", "power == 0 or True, ")),
    ("heads", Mutant(SPLIT, "if not asked_for(", "if asked_for(")),
    (
        "plain",
        Mutant(
            VERIFY, "expected=expected,", "expected=None if expected is None else expected * 0,"
        ),
    ),
]


@pytest.mark.parametrize("name", BREAKABLE)
def test_the_checks_pass_unbroken(name: str) -> None:
    BREAKABLE[name](triton_verify)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "verify") as broken, pytest.raises(AssertionError):
        BREAKABLE[name](broken)
