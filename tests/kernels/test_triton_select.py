"""Selection in Triton equals `selection.select` exactly, and broken ones are noticed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.policy import selection
from refreshkv.policy.selection import FREE, Selected
from tests.kernels.comparison import check_select
from tests.kernels.interpreted import run_there
from tests.kernels.launches import counting
from tests.kernels.mutants import Mutant, mutated

triton_select = importlib.import_module("refreshkv.kernels.triton.select")

pytestmark = pytest.mark.usefixtures("poisoned")


@contextmanager
def small_blocks() -> Iterator[None]:
    """So that a short row has several blocks and several sorted chunks."""
    chosen, order = (
        importlib.import_module(f"refreshkv.kernels.triton.{n}") for n in ("select", "order")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen, "CHOOSE", replace(chosen.CHOOSE, block=64))
        patch.setattr(chosen, "SORT", replace(order.SORT, block=16))
        patch.setattr(chosen, "SLOT", replace(chosen.SLOT, block=32))
        yield


def compare(module: Any, scores: Tensor, budget: Tensor, **options: Any) -> Selected:
    heads = options.get("heads")
    wanted = torch.ones(scores.shape[:2], dtype=torch.bool) if heads is None else heads
    with small_blocks():
        chosen = run_there(module.select)(scores, budget, **options)
    expected = selection.select(scores, budget, **options)
    assert chosen.positions.shape == expected.positions.shape
    assert chosen.positions.dtype == torch.int32 and chosen.filled.dtype == torch.int64
    assert torch.equal(chosen.filled[wanted], expected.filled[wanted])
    assert torch.equal(chosen.positions[wanted], expected.positions[wanted])
    return chosen


def some_scores(gen: torch.Generator, length: int, kind: str, heads: int = 2) -> Tensor:
    """Shares of attention: all different over many octaves, or on few levels, or none at all."""
    scores = torch.rand(2, heads, length, generator=gen)
    if kind == "many":
        return (20 * (scores - 1)).exp()
    if kind == "wide":
        return (100 * (scores - 1)).exp()
    return (scores * 4).floor() / 4 if kind == "few" else scores * 0


def some_anchors(gen: torch.Generator, length: int, heads: int = 2) -> Tensor:
    """Different tokens of each head, and `FREE` among them."""
    anchors = torch.rand(2, heads, length, generator=gen).argsort(-1)[..., : length // 3 + 1]
    return anchors.masked_fill(torch.rand(anchors.shape, generator=gen) < 0.3, FREE).int()


def check_random(module: Any, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)

    def one_of(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=gen))]

    length = one_of(1, 20, 64, 150)
    budget = torch.randint(1, length + 4, (2,), generator=gen)
    visible = torch.rand(2, length, generator=gen) < one_of(0.7, 0.02)
    compare(
        module,
        some_scores(gen, length, one_of("many", "wide", "few", "none")),
        budget,
        pool_kernel=one_of(1, 3, 7),
        visible=one_of(None, visible),
        heads=one_of(None, torch.rand(2, 2, generator=gen) < 0.5),
        recent=one_of(0, 5, torch.tensor([0, 3])),
        anchors=one_of(None, some_anchors(gen, length)),
        ends=one_of(None, torch.randint(1, length + 1, (2,), generator=gen)),
        slots=one_of(None, length + 2, int(budget.max())),
    )


@pytest.mark.parametrize("seed", range(12))
def test_select_equals_the_definition(seed: int) -> None:
    check_random(triton_select, seed)


def test_blocks_and_chunks_as_they_are_launched() -> None:
    """A plateau across blocks, cut by the budget; more than one chunk."""
    gen = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 2, 4200, generator=gen)
    scores[0, 1, 2000:] = 0.5
    budget = torch.tensor([1100])
    chosen = run_there(triton_select.select)(scores, budget, slots=1100)
    assert torch.equal(chosen.positions, selection.select(scores, budget).positions)


def check_rules(module: Any) -> None:
    """Every option at once, in rows that differ."""
    gen = torch.Generator().manual_seed(1)
    compare(
        module,
        some_scores(gen, 100, "few", heads=1),
        torch.tensor([40, 27]),
        pool_kernel=3,
        visible=torch.rand(2, 100, generator=gen) < 0.7,
        recent=torch.tensor([9, 4]),
        anchors=some_anchors(gen, 60, heads=1),
        ends=torch.tensor([100, 83]),
        slots=44,
    )


def check_chunk(module: Any) -> None:
    """What one program brings in order."""
    gen = torch.Generator().manual_seed(5)
    compare(module, some_scores(gen, 150, "many"), torch.tensor([16, 13]), slots=16)


def check_ties(module: Any) -> None:
    """At and near the K-th score, over several blocks: plateaus, nothing at all, and scores nobody expects."""
    plateaus = torch.zeros(4, 2, 170)
    plateaus[0, 0, 20:160], plateaus[0, 1, ::2], plateaus[0, 1, 1::2] = 0.5, 0.3, 0.3 + 2**-20
    plateaus[1, 1, 9:150] = 2.0**-40
    plateaus[2, 0, 9:150], plateaus[2, 1, 60:] = 3.0, float("inf")
    plateaus[3] = torch.rand(2, 170, generator=torch.Generator().manual_seed(6))
    budget = torch.tensor([90, 100, 105, 170])
    anchors = torch.arange(110).expand(4, 2, -1).int().clone()
    anchors[0], anchors[1:, 0] = FREE, FREE
    compare(module, plateaus, budget, pool_kernel=1, anchors=anchors)


def check_heads(module: Any) -> None:
    scores = some_scores(torch.Generator().manual_seed(2), 20, "many")
    heads = torch.tensor([[True, False], [False, True]])
    chosen = compare(module, scores, torch.tensor([3, 4]), heads=heads)
    assert bool((chosen.positions[~heads] == FREE).all()) and not chosen.filled[~heads].any()


def check_strides(module: Any) -> None:
    """Scores, mask and heads as views of something else."""
    gen = torch.Generator().manual_seed(3)
    scores = some_scores(gen, 40, "many").transpose(1, 2).contiguous().transpose(1, 2)
    visible = (torch.rand(2, 80, generator=gen) < 0.7)[:, ::2]
    heads = torch.tensor([[True, False], [True, True]]).T
    compare(module, scores, torch.tensor([9, 9]), visible=visible, heads=heads)


def test_the_heads_left_out_are_free() -> None:
    check_heads(triton_select)


def test_select_reads_views() -> None:
    check_strides(triton_select)


def test_select_equals_the_worked_examples() -> None:
    with small_blocks():
        check_select(run_there(triton_select.select))


def test_one_launch_or_three() -> None:
    """Where a head keeps more than one program brings in order, and whatever else is asked."""
    scores = some_scores(torch.Generator().manual_seed(4), 40, "many")
    rules = {"anchors": torch.zeros(2, 2, 3, dtype=torch.int32), "ends": torch.tensor([30, 40])}
    budget = torch.tensor([20]).expand(2)
    with small_blocks():
        for slots, options, names in (
            (16, {"recent": 3}, ["choose_kernel"]),
            (16, rules, ["choose_kernel"]),
            (17, {"recent": budget}, ["choose_kernel", "sort_kernel", "slot_kernel"]),
        ):
            with counting() as launches:
                triton_select.select(scores, budget, slots=slots, **options)
            assert launches.names == names


# From here on: what the lines of the kernels are for.

BREAKABLE: dict[str, Callable[[Any], None]] = {
    "rules": check_rules,
    "chunk": check_chunk,
    "ties": check_ties,
    "heads": check_heads,
    "strides": check_strides,
}
SELECT, ORDER = "select", "order"
MUTANTS = [
    ("rules", Mutant(SELECT, "tokens + (step - POOL // 2)", "tokens + step")),
    ("rules", Mutant(SELECT, "if step == POOL // 2", "if step == 0")),
    ("rules", Mutant(SELECT, "tl.load(visible, mask=shown, other=0) != 0", "shown")),
    ("rules", Mutant(SELECT, "ends_ptr + row * ends_row", "ends_ptr")),
    ("rules", Mutant(SELECT, "tokens >= newest", "tokens > newest")),
    ("rules", Mutant(SELECT, "4.0, pooled", "1.0, pooled")),
    ("rules", Mutant(SELECT, "2.0,\n", "0.25,\n")),
    ("rules", Mutant(SELECT, "budget_ptr + row * budget_row", "budget_ptr")),
    ("ties", Mutant(SELECT, "low += digit << shift", "low += (digit + 1) << shift")),
    ("ties", Mutant(SELECT, "bins > digit, counts", "bins >= digit, counts")),
    ("ties", Mutant(SELECT, "(digit == 0) | ", "")),
    ("ties", Mutant(SELECT, " | (digit == 63)", "")),
    ("ties", Mutant(SELECT, "counted = ((bits - low) >> left) == 0", "counted = bits >= low")),
    ("ties", Mutant(SELECT, "larger += both & 0xFFFF\n        near", "near")),
    ("ties", Mutant(SELECT, "near += both >> 16", "pass")),
    ("ties", Mutant(SELECT, "- left_out, 0)", ", 0)")),
    ("ties", Mutant(SELECT, "equal += both >> 16", "pass")),
    ("ties", Mutant(SELECT, "taken + larger", "taken")),
    ("rules", Mutant(ORDER, "((group >> LEVEL) & 1)", "0")),
    ("rules", Mutant(ORDER, "probe < key", "probe > key")),
    ("rules", Mutant(ORDER, "further <= size", "further < size")),
    ("rules", Mutant(ORDER, "positions_ptr + slot, FREE", "positions_ptr + slot, 0")),
    ("chunk", Mutant(ORDER, "(partner > pairs) ==", "(partner < pairs) ==")),
    ("heads", Mutant(SELECT, "head * heads_head", "0")),
    ("strides", Mutant(SELECT, "near.to(tl.int64) * visible_token", "near")),
]


@pytest.mark.parametrize("name", BREAKABLE)
def test_the_checks_pass_unbroken(name: str) -> None:
    BREAKABLE[name](triton_select)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=lambda value: repr(str(value)))
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "select") as broken, pytest.raises(AssertionError):
        BREAKABLE[name](broken)
