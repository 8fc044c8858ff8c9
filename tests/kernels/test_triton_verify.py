"""The Triton kernels for several queries of a row equal the reference, and broken ones are noticed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from refreshkv.kernels import reference
from refreshkv.kernels.options import Entries
from tests.kernels.cases import LAYOUTS, WHOLE, Case
from tests.kernels.comparison import (
    TOLERANCE,
    check_attended,
    check_scored,
    check_verify,
    check_vote,
    close,
)
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
PAGES = Case(rows=3, group=2, length=20, value_dim=48)
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


@EVERY_OP
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_wherever_entries_lie(op: str, layout: str) -> None:
    """A list of positions is refused."""
    check(op, replace(PAGES, layout=layout))
    if layout in WHOLE:
        check(op, replace(PAGES, layout=layout, softcap=2.0, sinks=True, hidden="holes", dim=80))


def check_many_queries(module: Any, queries: int, group: int) -> None:
    """More than one tile of them, and tiles that are not full."""
    case = replace(HEAD, group=group)
    _, entries, options = case.inputs()
    gen = torch.Generator().manual_seed(queries)
    query = torch.randn(1, group, queries, case.dim, generator=gen)
    given = {"starts": torch.tensor([case.length - queries]), "window": 23}
    expected, expected_scored = reference.verify(query, entries, options, **given)
    attended, scored = run_there(module.verify)(query, entries, options, **given)
    check_attended(attended, expected, case)
    check_scored(scored, expected_scored, case)


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
    """Nothing hidden, nothing beyond a length, and nothing after the last query."""
    case = replace(EVERYTHING, hidden="holes", rows=3)
    query, starts = case.several()
    _, entries, options = case.inputs()
    lengths = torch.tensor([[31, 40], [40, 40], [9, 3]])
    options = replace(options, lengths=lengths, reduction="mean")  # a maximum may drop a NaN
    given = {"starts": starts, "counts": torch.tensor([5, 0, 2])}
    expected, expected_scored = reference.verify(query, entries, options, **given)
    last = starts + query.shape[2] - 1
    unread = (torch.arange(case.length) > last[:, None])[:, None] | ~options.visible
    unread = unread | (torch.arange(case.length) >= lengths[..., None])
    unread[1] = True  # this row sits out
    for tensor in (entries.keys, entries.values):
        tensor.masked_fill_(unread[..., None], torch.nan)
    attended, scored = run_there(module.verify)(query, entries, options, **given)
    close(attended.output[::2], expected.output[::2], case, "output")
    assert bool(attended.lse[1].isneginf().all())
    close(scored.scores, expected_scored.scores, case, "scores")


def test_what_is_not_seen_is_not_read() -> None:
    check_what_is_read(triton_verify)


def check_heads(module: Any) -> None:
    query, starts = EVERYTHING.several()
    _, entries, options = EVERYTHING.inputs()
    heads = torch.tensor([[False, True], [True, False]])
    wanted = heads.repeat_interleave(EVERYTHING.group, 1)
    verify = run_there(module.verify)
    attended, scored = verify(query, entries, replace(options, heads=heads), starts=starts)
    every, every_scored = verify(query, entries, options, starts=starts)
    assert torch.equal(attended.output[wanted], every.output[wanted])
    assert torch.equal(attended.lse[wanted], every.lse[wanted])
    assert torch.equal(scored.scores[heads], every_scored.scores[heads])
    for tensor, own in ((attended.output, wanted), (attended.lse, wanted), (scored.scores, heads)):
        assert bool(tensor[~own].isnan().all())


def test_the_heads_asked_for_are_right_and_the_others_not_touched() -> None:
    check_heads(triton_verify)


def test_any_order_of_the_dimensions() -> None:
    """As a store may keep them: tokens before heads, K beside V; and queries as a model makes them."""
    case = replace(HEAD, kv_heads=2)
    query, starts = case.several()
    _, entries, options = case.inputs()
    expected, expected_scored = reference.verify(query, entries, options, starts=starts)
    both = torch.cat([entries.keys, entries.values], -1)
    both = both.transpose(1, 2).contiguous().transpose(1, 2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    strided = Entries(both[..., : case.dim], both[..., case.dim :])
    attended, scored = run_there(triton_verify.verify)(query, strided, options, starts=starts)
    check_attended(attended, expected, case)
    check_scored(scored, expected_scored, case)


# From here on: what the lines of the kernels are for.


def of(op: str, case: Case) -> Callable[[Any], None]:
    return lambda module: check(op, case, module)


BREAKABLE: dict[str, Callable[[Any], None]] = {
    "plain": of("verify", replace(HEAD, rows=2, group=3)),
    "everything": of("verify", EVERYTHING),
    "pages": of("verify", replace(PAGES, layout="pages")),
    "rows": of("vote", replace(PAGES, layout="rows")),
    "tiles": lambda module: check_many_queries(module, queries=17, group=5),
    "read": check_what_is_read,
    "heads": check_heads,
}
VERIFY, SPLIT, LAYOUT = "verify", "split", "layout"
MUTANTS = [
    ("plain", Mutant(SPLIT, "positions <= last", "positions < last")),
    ("plain", Mutant(SPLIT, "positions > last - window", "positions >= last - window")),
    ("plain", Mutant(SPLIT, "start - window + 1", "start - window + 2")),
    ("plain", Mutant(SPLIT, "start + queries, length", "start + queries - 1, length")),
    (
        "plain",
        Mutant(SPLIT, "member // QUERIES, member % QUERIES", "member // GROUP, member % QUERIES"),
    ),
    ("plain", Mutant(SPLIT, "acc /= ", "acc = acc + 0 / ")),
    ("plain", Mutant(SPLIT, "last = start + token", "last = start + QUERIES - 1")),
    ("plain", Mutant(VERIFY, "query < voting", "query <= voting")),
    ("plain", Mutant(VERIFY, "member % GROUP_PAD < GROUP)", "member >= 0)")),
    ("plain", Mutant(VERIFY, "tl.sum(weights, 1) / GROUP", "tl.sum(weights, 1) / GROUP_PAD")),
    ("plain", Mutant(VERIFY, "tl.max(by_query, 2)", "tl.sum(by_query, 2)")),
    ("plain", Mutant(VERIFY, "votes / voting", "votes / QUERIES")),
    ("plain", Mutant(VERIFY, "(voting == 0) | ", "")),
    ("everything", Mutant(VERIFY, "weights *= share", "weights /= share")),
    ("everything", Mutant(VERIFY, "sinks_ptr + own_head", "sinks_ptr + own_head * 0")),
    ("everything", Mutant(LAYOUT, "tl.load(visible + index", "tl.load(visible + index * 0")),
    ("pages", Mutant(LAYOUT, "row * store.block_row", "0")),
    ("pages", Mutant(LAYOUT, "position // PAGE", "position // PAGE * 0")),
    ("rows", Mutant(VERIFY, "kept = kept_row(store.rows_ptr, row, kept)", "kept = row")),
    ("tiles", Mutant(SPLIT, "member = tile * TILE", "member = tile * 1")),
    ("tiles", Mutant(VERIFY, "member = tile * TILE", "member = 0 * TILE")),
    (
        "read",
        Mutant(
            SPLIT,
            "value_dims[None, :],\n                mask=seen[:, None]",
            "value_dims[None, :],\n                mask=inside[:, None]",
        ),
    ),
    ("read", Mutant(SPLIT, "> 0, end, begin)", "> -1, end, begin)")),
    ("read", Mutant(SPLIT, "end = tl.minimum(end, reached)", "end = reached")),
    ("read", Mutant(VERIFY, "tl.minimum(end, own_length(how, row, head, entries))", "end")),
    ("heads", Mutant(VERIFY, "if not asked_for(", "if asked_for(")),
]


@pytest.mark.parametrize("name", BREAKABLE)
def test_the_checks_pass_unbroken(name: str) -> None:
    BREAKABLE[name](triton_verify)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "verify") as broken, pytest.raises(AssertionError):
        BREAKABLE[name](broken)
