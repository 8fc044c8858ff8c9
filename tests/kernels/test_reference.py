"""The reference is the textbook: softmax in float64, head by head, over the visible tokens only."""

from __future__ import annotations

import pytest
import torch

from refreshkv.kernels.backend import CPU, REFERENCE, Backend, reference
from refreshkv.step import Attention
from tests.kernels.comparison import (
    ATTENTION_CHECKS,
    CASES,
    EVERYTHING,
    PER_HEAD,
    PLAIN,
    Case,
    check_attend_at,
    check_gather,
    check_lengths,
    check_select,
)
from tests.slow import slow_logits, slow_weights

both = pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=lambda backend: backend.name)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, Case(hidden="left", group=1)], ids=str)
def test_equals_the_textbook(case: Case, reduction: str) -> None:
    query, keys, values, options = case.inputs()
    attention = Attention(options["scale"], options["softcap"], options["sinks"])
    visible = options["visible"]
    attended, scored = reference.attend_and_score(
        query, keys, values, **options, reduction=reduction
    )
    assert torch.equal(attended.lse, scored.lse)
    for row, head in [(row, head) for row in range(case.rows) for head in range(case.kv_heads)]:
        members = list(range(head * case.group, (head + 1) * case.group))
        shown = torch.ones(case.length).bool() if visible is None else visible[row, 0]
        queries, seen = query[row, members], keys[row, head, shown]
        weights = slow_weights(queries, seen, attention, members)
        lse = slow_logits(queries, seen, attention).logsumexp(-1)
        output = weights @ values[row, head, shown].double()
        score = weights.amax(0) if reduction == "max" else weights.mean(0)
        torch.testing.assert_close(attended.output[row, members], output.float())
        torch.testing.assert_close(attended.lse[row, members], lse.float())
        torch.testing.assert_close(scored.scores[row, head, shown], score.float())
        assert bool((scored.scores[row, head, ~shown] == 0).all())


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
    query, keys, _, options = Case(group=group, sinks=True, hidden=hidden).inputs()
    with_sinks = backend.score(query, keys, **options, reduction=reduction).scores
    options["sinks"] = None
    without = backend.score(query, keys, **options, reduction=reduction).scores
    torch.testing.assert_close(without.sum(-1), torch.ones(2, 2))
    assert bool((with_sinks.sum(-1) < 1).all())
    if hidden:
        assert bool((without[~options["visible"].expand_as(without)] == 0).all())


@both
def test_the_heads_asked_for_are_right(backend: Backend) -> None:
    query, keys, values, options = EVERYTHING.inputs()
    heads = torch.tensor([[True, False], [False, True]])
    wanted = heads.repeat_interleave(EVERYTHING.group, 1)
    some, some_scored = backend.attend_and_score(query, keys, values, **options, heads=heads)
    every, every_scored = backend.attend_and_score(query, keys, values, **options)
    assert torch.equal(some.output[wanted], every.output[wanted])
    assert torch.equal(some.lse[wanted], every.lse[wanted])
    assert torch.equal(some_scored.scores[heads], every_scored.scores[heads])


def test_gather_writes_the_filled_slots_and_nothing_else() -> None:
    check_gather(REFERENCE.gather)


def test_select_equals_the_worked_examples() -> None:
    check_select(REFERENCE.select)


@both
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, Case(length=33), Case(group=1)], ids=str)
def test_entries_beyond_a_length_count_for_nothing(backend: Backend, case: Case) -> None:
    check_lengths(backend, case)


@pytest.mark.parametrize("case", [PLAIN, Case(softcap=2.0, sinks=True), Case(length=9)], ids=str)
def test_a_list_of_positions_equals_a_copy(case: Case) -> None:
    check_attend_at(reference.attend_at, case)


def test_slots_beyond_the_budget_stay_free() -> None:
    scores = torch.rand(1, 2, 9, generator=torch.Generator().manual_seed(0))
    for select in (CPU.select, REFERENCE.select):
        wide = select(scores, torch.tensor([3]), slots=5)
        assert torch.equal(wide.positions[..., :3], select(scores, torch.tensor([3])).positions)
        assert bool((wide.positions[..., 3:] == -1).all()) and wide.filled.tolist() == [[3, 3]]
