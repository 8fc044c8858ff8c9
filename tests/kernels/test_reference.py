"""The reference is the textbook: softmax in float64, head by head, over the visible tokens only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.backend import CPU, REFERENCE, Backend
from refreshkv.kernels.options import Entries
from tests.kernels.cases import CASES, EVERYTHING, LAYOUTS, PER_HEAD, PLAIN, Case, laid_out
from tests.kernels.comparison import (
    ATTENTION_CHECKS,
    check_lengths,
    check_refresh,
    check_select,
)
from tests.slow import slow_logits, slow_weights

both = pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=lambda backend: backend.name)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, Case(hidden="left", group=1)], ids=str)
def test_equals_the_textbook(case: Case, reduction: str) -> None:
    query, entries, options = case.inputs()
    keys, values, visible = entries.keys, entries.values, options.visible
    options = replace(options, reduction=reduction)
    attended, scored = reference.attend_and_score(query, entries, options)
    assert torch.equal(attended.lse, scored.lse)
    for row, head in [(row, head) for row in range(case.rows) for head in range(case.kv_heads)]:
        members = list(range(head * case.group, (head + 1) * case.group))
        shown = torch.ones(case.length).bool() if visible is None else visible[row, 0]
        queries, seen = query[row, members], keys[row, head, shown]
        weights = slow_weights(queries, seen, options, members)
        lse = slow_logits(queries, seen, options).logsumexp(-1)
        output = weights @ values[row, head, shown].double()
        score = weights.amax(0) if reduction == "max" else weights.mean(0)
        torch.testing.assert_close(attended.output[row, members], output.float())
        torch.testing.assert_close(attended.lse[row, members], lse.float())
        torch.testing.assert_close(scored.scores[row, head, shown], score.float())
        assert bool((scored.scores[row, head, ~shown] == 0).all())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_where_entries_lie_does_not_matter(layout: str) -> None:
    """They are read as from one piece: whatever the layout, the same tensors."""
    query, dense, options = replace(EVERYTHING, value_dim=48).inputs()
    keys, values, _ = reference_entries(laid_out(dense, layout), len(query))
    visible = options.visible.expand(-1, dense.kv_heads, -1)
    assert torch.equal(keys[visible], dense.keys[visible])
    assert torch.equal(values[visible], dense.values[visible])


def reference_entries(entries: Entries, rows: int) -> tuple[Tensor, ...]:
    return reference.attention.laid_out(entries, rows)


@pytest.mark.parametrize("case", [c for c in CASES + PER_HEAD if c.length < 5000], ids=str)
@pytest.mark.parametrize("op", ["attend_and_rank", "vote", "verify"])
def test_several_queries_equal_the_textbook_one_by_one(op: str, case: Case) -> None:
    ATTENTION_CHECKS[op](getattr(REFERENCE, op), case)


@both
@pytest.mark.parametrize(("group", "reduction"), [(1, "max"), (1, "mean"), (4, "mean")])
@pytest.mark.parametrize("hidden", ["", "left", "holes"])
def test_scores_are_shares_of_one_attention(
    backend: Backend, group: int, reduction: str, hidden: str
) -> None:
    query, entries, options = Case(group=group, sinks=True, hidden=hidden).inputs()
    options = replace(options, reduction=reduction)
    with_sinks = backend.score(query, entries, options).scores
    without = backend.score(query, entries, replace(options, sinks=None)).scores
    torch.testing.assert_close(without.sum(-1), torch.ones(2, 2))
    assert bool((with_sinks.sum(-1) < 1).all())
    if hidden:
        assert bool((without[~options.visible.expand_as(without)] == 0).all())


@both
def test_the_heads_asked_for_are_right(backend: Backend) -> None:
    query, entries, options = EVERYTHING.inputs()
    heads = torch.tensor([[True, False], [False, True]])
    wanted = heads.repeat_interleave(EVERYTHING.group, 1)
    some, some_scored = backend.attend_and_score(query, entries, replace(options, heads=heads))
    every, every_scored = backend.attend_and_score(query, entries, options)
    assert torch.equal(some.output[wanted], every.output[wanted])
    assert torch.equal(some.lse[wanted], every.lse[wanted])
    assert torch.equal(some_scored.scores[heads], every_scored.scores[heads])


@both
def test_a_refresh_writes_what_is_wanted_and_nothing_else(backend: Backend) -> None:
    check_refresh(backend.refresh)


def test_select_equals_the_worked_examples() -> None:
    check_select(REFERENCE.select)


@both
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, Case(length=33), Case(group=1)], ids=str)
def test_entries_beyond_a_length_count_for_nothing(backend: Backend, case: Case) -> None:
    check_lengths(backend, case)


def test_slots_beyond_the_budget_stay_free() -> None:
    scores = torch.rand(1, 2, 9, generator=torch.Generator().manual_seed(0))
    for select in (CPU.select, REFERENCE.select):
        wide = select(scores, torch.tensor([3]), slots=5)
        assert torch.equal(wide.positions[..., :3], select(scores, torch.tensor([3])).positions)
        assert bool((wide.positions[..., 3:] == -1).all()) and wide.filled.tolist() == [[3, 3]]
