"""The Triton kernels of one query token equal the reference, and broken ones are noticed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from refreshkv.kernels import reference
from refreshkv.kernels.options import Entries
from tests.kernels.cases import LAYOUTS, Case
from tests.kernels.comparison import (
    ATTENTION_CHECKS,
    TOLERANCE,
    check_attend,
    check_attended,
    check_lengths,
    check_scored,
)
from tests.kernels.interpreted import run_there
from tests.kernels.mutants import Mutant, mutated

triton_common = importlib.import_module("refreshkv.kernels.triton.common")
triton_step = importlib.import_module("refreshkv.kernels.triton.step")

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter, at log(0)
]
EVERY_OPERATION = pytest.mark.parametrize(
    "op", ["attend", "score", "attend_and_score", "attend_and_rank"]
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])

HEAD = Case(rows=1, kv_heads=1, length=33)
EVERYTHING = Case(rows=1, softcap=2.0, sinks=True, hidden="per head", group=3, length=40)
PAGES = Case(rows=3, kv_heads=2, group=2, length=20, value_dim=48)
CASES = [
    *[replace(HEAD, group=group) for group in range(1, 9)],
    *[replace(HEAD, length=length) for length in (1, 2, 128, 300)],
    *[replace(HEAD, dim=dim) for dim in (80, 96, 128, 256)],
    *[replace(HEAD, value_dim=dim) for dim in (48, 128)],
    replace(HEAD, rows=2, hidden="left"),
    EVERYTHING,
]
LONG = replace(
    HEAD, length=2400
)  # more splits than are merged, and more entries than are scored at once


def check(op: str, case: Case, module: Any = triton_step) -> None:
    ATTENTION_CHECKS[op](run_there(getattr(module, op)), case)


class There:
    """The operations of modules, with tensors of the CPU."""

    def __init__(self, *modules: Any) -> None:
        self.modules = modules

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return run_there(next(getattr(m, op) for m in self.modules if hasattr(m, op)))


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
def test_attend_and_score_equals_the_reference(case: Case) -> None:
    check("attend_and_score", case)


@EVERY_OPERATION
@EVERY_DTYPE
@pytest.mark.parametrize(
    "case", [HEAD, replace(HEAD, group=7, length=9), replace(HEAD, length=1), EVERYTHING], ids=str
)
def test_every_operation_in_every_dtype(op: str, case: Case, dtype: torch.dtype) -> None:
    check(op, replace(case, dtype=dtype))


@EVERY_OPERATION
@pytest.mark.parametrize("most", [1, triton_common.FILL], ids=["one split", "many splits"])
def test_a_long_row(op: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long splits have several blocks, as on a GPU that is already full."""
    monkeypatch.setattr(triton_common, "FILL", most)
    monkeypatch.setattr(triton_common, "WAVES", most)
    check(op, LONG)


@EVERY_OPERATION
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_wherever_entries_lie(op: str, layout: str) -> None:
    for case in (
        replace(PAGES, layout=layout),
        replace(PAGES, layout=layout, softcap=2.0, sinks=True, hidden="holes", dim=80),
        replace(PAGES, layout=layout, dtype=torch.bfloat16, length=64),
    ):
        check(op, case)
    if "list" in layout:
        check(op, replace(PAGES, layout=layout, hidden="free"))


def test_positions_of_another_type() -> None:
    query, entries, options = replace(PAGES, layout="list pages rows").inputs()
    indices = {x: getattr(entries, x).long() for x in ("blocks", "positions", "rows")}
    attend = run_there(triton_step.attend)
    actual = attend(query, replace(entries, **indices), options)
    assert torch.equal(actual.output, attend(query, entries, options).output)


@pytest.mark.parametrize("length", [5, 1100])
def test_ties_go_to_the_later_entry(length: int) -> None:
    query, entries, options = replace(HEAD, length=length).inputs()
    given = torch.zeros_like(query), entries, options
    rank = {"newest": torch.tensor([[length - 2]]), "count": 5}
    _, best = run_there(triton_step.attend_and_rank)(*given, **rank)
    assert torch.equal(best, reference.attend_and_rank(*given, **rank)[1])


def check_some_lengths(module: Any) -> None:
    """Lengths of heads and rows; nothing that does not count is read, and its score is 0."""
    case = Case(rows=2, group=2, length=70, hidden="holes", sinks=True)
    query, entries, options = case.inputs()
    lengths = torch.tensor([[0, 70], [41, 9]])
    counts = (torch.arange(case.length) < lengths[..., None]) & options.visible
    wide, dense, shown = case.wide()
    expected, scored = reference.attend_and_score(wide, dense, replace(shown, visible=counts))
    for tensor in (entries.keys, entries.values):
        tensor.masked_fill_(~counts[..., None], torch.nan)
    given = query, entries, replace(options, lengths=lengths)
    newest = torch.zeros(2, 2, dtype=torch.int64)
    there = There(module)
    attended, ours = there.attend_and_score(*given)
    for actual in (
        attended,
        there.attend(*given),
        there.attend_and_rank(*given, newest=newest, count=3)[0],
    ):
        check_attended(actual, expected, case)
    for actual in (ours, there.score(*given)):
        check_scored(actual, scored, case)
        assert not actual.scores[~counts.expand_as(actual.scores)].any()


def test_what_does_not_count_is_not_read_and_scores_nothing() -> None:
    check_some_lengths(triton_step)


@pytest.mark.parametrize("layout", ["", "list pages rows"])
def test_lengths_of_all_rows_or_heads(layout: str) -> None:
    verify = importlib.import_module("refreshkv.kernels.triton.verify")
    check_lengths(There(triton_step, verify), Case(group=1, length=20, layout=layout))


def test_any_order_of_the_dimensions() -> None:
    """As a store may keep them: tokens before heads, and K beside V."""
    query, entries, options = HEAD.inputs()
    both = torch.cat([entries.keys, entries.values], -1)
    both = both.transpose(1, 2).contiguous().transpose(1, 2)
    strided = Entries(both[..., : HEAD.dim], both[..., HEAD.dim :])
    attended, scored = run_there(triton_step.attend_and_score)(query, strided, options)
    expected, expected_scored = reference.attend_and_score(query, entries, options)
    check_attended(attended, expected, HEAD)
    check_scored(scored, expected_scored, HEAD)


def check_heads(module: Any) -> None:
    query, entries, options = EVERYTHING.inputs()
    heads, there = torch.tensor([[False, True]]), There(module)
    wanted = heads.repeat_interleave(EVERYTHING.group, 1)
    some = query, entries, replace(options, heads=heads)
    rank = {"newest": torch.zeros(1, 2, dtype=torch.int64), "count": 2}
    attended, ranks = there.attend_and_rank(*some, **rank)
    every, every_rank = there.attend_and_rank(query, entries, options, **rank)
    assert torch.equal(attended.output[wanted], every.output[wanted])
    assert torch.equal(attended.lse[wanted], every.lse[wanted])
    assert torch.equal(ranks[heads], every_rank[heads])
    assert bool(attended.output[~wanted].isnan().all() and attended.lse[~wanted].isnan().all())
    every_scored = there.score(query, entries, options)
    for given in (there.attend_and_score(*some)[1], there.score(*some)):
        assert torch.equal(given.lse[wanted], every.lse[wanted])
        assert torch.equal(given.scores[heads], every_scored.scores[heads])
        assert bool(given.lse[~wanted].isnan().all() and given.scores[~heads].isnan().all())


def test_the_heads_asked_for_are_right_and_the_others_not_touched() -> None:
    check_heads(triton_step)


# From here on: what the lines of the kernels are for.


def check_long_splits(module: Any) -> None:
    """Several blocks in one split."""
    common = importlib.import_module("refreshkv.kernels.triton.common")  # it may be the mutant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "FILL", 1)
        check_attend(run_there(module.attend), replace(HEAD, length=300))


def check_blocks(module: Any) -> None:
    """A ring of which a program ranks a part at a time; as many ties as there are entries, and none."""
    case = replace(HEAD, kv_heads=2, group=2, length=75, sinks=True)
    query, entries, options = case.inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RANKED_AT_ONCE", 16)
        rank = run_there(module.attend_and_rank)
        for given in (query, torch.zeros_like(query)):
            for newest, count in ((torch.tensor([[74, 3]]), 1), (torch.tensor([[-1, 40]]), 5)):
                named = {"newest": newest, "count": count}
                expected = reference.attend_and_rank(given, entries, options, **named)[1]
                assert torch.equal(rank(given, entries, options, **named)[1], expected)


def test_a_ring_of_several_blocks() -> None:
    check_blocks(triton_step)


def of(op: str, case: Case) -> Callable[[Any], None]:
    return lambda module: check(op, case, module)


CHECKS: dict[str, Callable[[Any], None]] = {
    "attend": of("attend", replace(HEAD, length=200, value_dim=48)),
    "everything": of("attend", EVERYTHING),
    "both": of("attend_and_score", EVERYTHING),
    "score": of("score", EVERYTHING),
    "long": of("score", replace(HEAD, length=1100)),
    "rank": of("attend_and_rank", replace(EVERYTHING, kv_heads=1)),
    "blocks": check_blocks,
    "rows": of("attend", replace(PAGES, layout="rows")),
    "list": of("attend", replace(PAGES, layout="list", hidden="free")),
    "laid out": of("attend", replace(PAGES, layout="list pages rows")),
    "long splits": check_long_splits,
    "lengths": check_some_lengths,
    "heads": check_heads,
}
COMMON, LAYOUT, SPLIT, STEP = "common", "layout", "split", "step"
MUTANTS = [
    ("attend", Mutant(COMMON, "products * scale", "products")),
    ("attend", Mutant(COMMON, "mask=every < splits,", "mask=every < splits - 1,")),
    ("attend", Mutant(COMMON, "tl.exp(some_lse - total)", "tl.exp(total - total)")),
    ("lengths", Mutant(SPLIT, "inside = index < begin + stop", "inside = index <= begin + stop")),
    ("attend", Mutant(LAYOUT, "entry * store.value_entry", "entry * store.key_entry")),
    ("everything", Mutant(COMMON, "softcap * (2 * tl.sigmoid", "(2 * tl.sigmoid")),
    ("everything", Mutant(COMMON, "sinks_ptr + query // QUERIES", "sinks_ptr")),
    ("everything", Mutant(COMMON, "acc *= beside_sink(", "acc /= beside_sink(")),
    ("everything", Mutant(COMMON, "lse_ptr + own, lse)", "lse_ptr + own, lse + 0.1)")),
    ("everything", Mutant(LAYOUT, "inside & tl.load(visible", "inside | tl.load(visible")),
    ("everything", Mutant(LAYOUT, "head * how.visible_head", "0")),
    ("both", Mutant(SPLIT, "tl.where(counted, logits", "tl.where(inside[None, :], logits")),
    ("both", Mutant(STEP, "(group + member) * entries", "group * entries")),
    ("both", Mutant(STEP, "how.sinks_ptr + head * GROUP", "how.sinks_ptr")),
    ("both", Mutant(STEP, "(row * tl.num_programs(1) + head) * GROUP", "row * GROUP")),
    (
        "both",
        Mutant(
            STEP, 'MEAN=options.reduction == "mean",\n        BLOCK', "MEAN=False,\n        BLOCK"
        ),
    ),
    ("score", Mutant(STEP, "tl.exp(logits - tl.where(nothing", "tl.exp(logits + tl.where(nothing")),
    ("score", Mutant(STEP, "weights *= beside_sink(", "weights /= beside_sink(")),
    ("score", Mutant(SPLIT, "top + tl.log(mass)", "tl.log(mass)")),
    ("score", Mutant(SPLIT, "logits_ptr + queries[:, None]", "logits_ptr + 0 * queries[:, None]")),
    ("score", Mutant(STEP, "weights / GROUP", "weights")),
    ("long", Mutant(STEP, "index = tl.program_id(0).to(tl.int64) * BLOCK", "index = 0")),
    (
        "rank",
        Mutant(
            STEP,
            "beside_sink(lse, tl.load(how.sinks_ptr + head * GROUP + member",
            "beside_sink(lse, tl.load(how.sinks_ptr + head * GROUP",
        ),
    ),
    ("rank", Mutant(STEP, "tl.maximum(reduced, weights, ", "tl.maximum(weights, weights, ")),
    ("rank", Mutant(STEP, "| index", "| (index ^ 1)")),
    ("rank", Mutant(STEP, "entries, keys, _LOWEST)", "entries, keys, 2**62)")),
    ("rank", Mutant(STEP, "index == newest, -1.0", "index == newest, scores")),
    ("rank", Mutant(STEP, "keys == top, _LOWEST", "keys == top, keys")),
    ("blocks", Mutant(STEP, "before == top, _LOWEST", "before == top, before")),
    ("blocks", Mutant(STEP, "tl.maximum(tl.max(keys, 0), tl.max(before, 0))", "tl.max(keys, 0)")),
    ("blocks", Mutant(STEP, "index = first + tl.arange", "index = tl.arange")),
    ("blocks", Mutant(STEP, "best & 0xFFFFFFFF", "best")),
    ("rows", Mutant(LAYOUT, "tl.load(rows_ptr + row)", "tl.load(rows_ptr)")),
    ("rows", Mutant(LAYOUT, "page, entry = kept, position", "page, entry = row, position")),
    ("list", Mutant(LAYOUT, "(position >= 0)", "(position >= -1)")),
    ("list", Mutant(LAYOUT, "head * store.position_head", "0")),
    ("laid out", Mutant(LAYOUT, "kept * store.position_row", "row * store.position_row")),
    ("laid out", Mutant(LAYOUT, "position // PAGE", "position // PAGE * 0")),
    ("laid out", Mutant(LAYOUT, "position % PAGE", "position")),
    ("laid out", Mutant(LAYOUT, "row * store.block_row", "kept * store.block_row")),
    ("laid out", Mutant(LAYOUT, "page * store.value_row", "page * store.key_entry")),
    ("long splits", Mutant(COMMON, "acc = acc * decay[:, None]", "acc = acc")),
    ("long splits", Mutant(COMMON, "mass * decay", "mass")),
    (
        "lengths",
        Mutant(LAYOUT, "row * how.length_row + head * how.length_head", "row * how.length_row"),
    ),
    ("lengths", Mutant(COMMON, "mask=used, other=0.0", "mask=dims[None, :] < DIM")),
    ("lengths", Mutant(COMMON, "mass = mass * decay +", "mass = 1 + mass * decay +")),
    ("lengths", Mutant(STEP, "tl.where(nothing, 0, length)", "entries")),
    ("heads", Mutant(LAYOUT, "asked = tl.load(heads_ptr", "asked = not tl.load(heads_ptr")),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_pass_unbroken(name: str) -> None:
    CHECKS[name](triton_step)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "step") as broken, pytest.raises(AssertionError):
        CHECKS[name](broken)
