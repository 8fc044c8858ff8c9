"""The reference is the textbook: softmax in float64, head by head, over the visible tokens only."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.backend import CPU, REFERENCE, Backend
from refreshkv.kernels.options import Entries, verify_queries
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


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING], ids=str)
def test_votes_by_a_guess_are_what_the_guess_makes_of_the_logits(
    case: Case, reduction: str
) -> None:
    """Head by head and query by query, in float64; a query without a guess gives nothing."""
    query, starts = case.several()
    _, entries, options = case.inputs()
    options, count = replace(options, reduction=reduction), 3
    counts = torch.full((case.rows,), count)
    expected = torch.randn(query.shape[:3], generator=torch.Generator().manual_seed(9)) + 4
    expected[:, 1, 0], expected[0, 2, 1], expected[1, 3, 1] = torch.nan, torch.inf, -torch.inf
    given = {"starts": starts, "counts": counts, "expected": expected}
    _, scored = reference.verify(query, entries, options, **given)
    exact = reference.verify(query, entries, options, starts=starts, counts=counts)
    attended = reference.verify(query, entries, options, **given)[0]
    assert all(map(torch.equal, attended, exact[0]))
    for row, head in [(row, head) for row in range(case.rows) for head in range(case.kv_heads)]:
        votes = torch.zeros(case.length, dtype=torch.float64)
        for index in range(count):
            seen = torch.arange(case.length) <= starts[row] + index
            if options.visible is not None:
                seen &= options.visible[row, 0]
            weights = torch.zeros(case.group, case.length, dtype=torch.float64)
            for member in range(case.group):
                own = head * case.group + member
                guess = float(expected[row, own, index])
                if math.isfinite(guess):
                    logits = slow_logits(query[row, [own], index], entries.keys[row, head], options)
                    sink = 0.0 if options.sinks is None else math.exp(float(options.sinks[own]))
                    share = math.exp(guess) / (math.exp(guess) + sink)
                    weights[member] = (logits[0] - guess).exp().clamp(max=1) * share * seen
            votes += (weights.amax(0) if reduction == "max" else weights.mean(0)) / count
        torch.testing.assert_close(scored.scores[row, head], votes.float())


@pytest.mark.parametrize(
    ("group", "most", "expected"),
    [(4, 9, 8), (4, 8, 8), (4, 17, 16), (4, 5, 4), (4, 3, 3), (1, 9, 9), (7, 9, 8), (8, 3, 2)],
)
def test_how_many_queries_fill_the_rows_of_a_product(group: int, most: int, expected: int) -> None:
    assert verify_queries(group, most) == expected


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
