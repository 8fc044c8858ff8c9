"""Triggers on hand-made queries, and within decode steps the one that looks after the partial step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.config import RefreshConfig, Schedule
from refreshkv.kernels import reference
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy.triggers import FixedStride, LseDrop, Never, QueryDrift, Trigger, trigger_for
from tests.helpers import Decoder, Step, Tokens, random_tokens

KV_HEADS, GROUP, DIM = 2, 2, 4
HEADS = KV_HEADS * GROUP
LSE = torch.zeros(1, HEADS)


def steps(*counts: int, rows: int = 1) -> Tensor:
    return torch.tensor(counts or (5,)).expand(rows, KV_HEADS)


def fires(trigger: Trigger, now: Tensor, then: Tensor, step: Tensor) -> list[list[bool]]:
    """What `trigger` says to the queries `now` after a full step with the queries `then`."""
    remembered = trigger.reference(then, LSE.expand(len(then), -1), KV_HEADS)
    assert remembered.shape[:2] == (len(then), KV_HEADS)
    decision = trigger.before(step, now, remembered)
    assert decision.dtype == torch.bool
    return decision.tolist()


def turned(query: Tensor, *heads: int) -> Tensor:
    """`query` with some of its heads turned around."""
    return torch.stack([-q if i in heads else q for i, q in enumerate(query[0])])[None]


QUERY = torch.tensor([[[1.0, 2.0, 0.0, 1.0]] * HEADS])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(stride=None), Never()),
        (Schedule(stride=3, threshold=None), FixedStride(3)),
        (Schedule(stride=3, threshold=0.9), QueryDrift(3, 0.9, "layer")),
        (RefreshConfig(stride=3, threshold=0.9, decide="head"), QueryDrift(3, 0.9, "head")),
        (RefreshConfig(trigger="lse-drop", drop=6, stride=None), LseDrop(6)),
        (RefreshConfig(trigger="lse-drop", stride=9), LseDrop(4.0, 9)),
    ],
)
def test_the_schedule_names_its_trigger(schedule: Schedule, expected: Trigger) -> None:
    trigger = trigger_for(schedule)
    assert type(trigger) is type(expected)
    assert vars(trigger) == vars(expected)


def test_never_never_fires() -> None:
    assert fires(Never(), -QUERY, QUERY, steps(1, 1000)) == [[False, False]]
    assert Never().after(steps(), LSE, torch.empty(1, KV_HEADS, 0)) is None


@pytest.mark.parametrize(
    "trigger",
    [Never(), FixedStride(3), QueryDrift(3, 0.9, "head"), LseDrop(4.0), LseDrop(4.0, 3)],
)
def test_what_is_not_due_is_not_full(trigger: Trigger) -> None:
    """The query is not looked at where nothing is due."""
    for count in range(1, 8):
        due = trigger.due(steps(count))
        assert due.dtype == torch.bool and due.shape == (1, KV_HEADS)
        assert fires(trigger, -QUERY, QUERY, steps(count)) == due.tolist()  # the query has turned


def test_a_fixed_stride_counts_per_head() -> None:
    counts = torch.tensor([[1, 3], [6, 8], [9, 2]])
    same = QUERY.expand(3, -1, -1)
    decisions = fires(FixedStride(3), same, same, counts)
    assert decisions == [[False, True], [True, False], [True, False]]


@pytest.mark.parametrize("decide", ["layer", "head"])
def test_threshold_one_fires_whenever_due(decide: str) -> None:
    trigger = QueryDrift(5, 1.0, decide)  # type: ignore[arg-type]
    # Rounding makes the cosine of some vectors with themselves exceed 1.
    for seed in range(50):
        query = torch.randn(1, HEADS, 64, generator=torch.Generator().manual_seed(seed))
        assert fires(trigger, query, query, steps(5)) == [[True, True]]
        assert fires(trigger, query, query, steps(4)) == [[False, False]]


def test_threshold_minus_one_practically_never_fires() -> None:
    for seed in range(50):
        now, then = torch.randn(2, 1, HEADS, 8, generator=torch.Generator().manual_seed(seed))
        assert fires(QueryDrift(1, -1.0), now, then, steps(1)) == [[False, False]]


@pytest.mark.parametrize(
    ("threshold", "fired"), [(0.59, False), (0.601, True), (0.0, False), (1.0, True)]
)
def test_the_threshold_is_the_cosine(threshold: float, fired: bool) -> None:
    then = torch.tensor([1.0, 0.0]).expand(1, HEADS, 2)
    now = torch.tensor([0.6, 0.8]).expand(1, HEADS, 2)  # cosine 0.6
    assert fires(QueryDrift(1, threshold), now, then, steps(1)) == [[fired, fired]]


def test_a_layer_decides_for_all_its_heads_and_heads_for_themselves() -> None:
    # The second KV head looks the other way, so that the mean over the layer vanishes: cosine 0.
    now = turned(QUERY, 2, 3)
    assert fires(QueryDrift(5, 0.5, "layer"), now, QUERY, steps()) == [[True, True]]
    assert fires(QueryDrift(5, 0.5, "head"), now, QUERY, steps()) == [[False, True]]
    # One query head of four turns: the layer's mean keeps its direction, the second group's vanishes.
    now = turned(QUERY, 3)
    assert fires(QueryDrift(5, 0.5, "layer"), now, QUERY, steps()) == [[False, False]]
    assert fires(QueryDrift(5, 0.5, "head"), now, QUERY, steps()) == [[False, True]]


@pytest.mark.parametrize("decide", ["layer", "head"])
def test_each_row_and_each_due_head_decides_alone(decide: str) -> None:
    trigger = QueryDrift(5, 0.5, decide)  # type: ignore[arg-type]
    now, then = torch.cat([QUERY, -QUERY]), QUERY.expand(2, -1, -1)
    assert fires(trigger, now, then, steps(rows=2)) == [[False, False], [True, True]]
    assert fires(trigger, now, then, steps(10, 9, rows=2)) == [[False, False], [True, False]]


REMEMBERED = torch.tensor([[[5.0, 1.0], [0.0, 9.0]]])  # [B, Hkv, G]


@pytest.mark.parametrize(
    ("lse", "fired"),
    [
        ([5.0, 1.0, 0.0, 9.0], [False, False]),
        ([3.1, -0.9, -1.9, 7.1], [False, False]),
        ([3.0, 1.0, 0.0, 9.0], [False, False]),  # by exactly the drop: not more
        ([2.9, 1.0, 0.0, 9.0], [True, False]),
        ([5.0, 1.0, 9.9, 6.9], [False, True]),  # one head of the group is enough, another may rise
        ([0.0, 0.0, -9.0, 0.0], [True, True]),
        ([99.0, 99.0, 99.0, 99.0], [False, False]),
    ],
)
def test_a_drop_fires_where_one_head_of_the_group_fell_further(
    lse: list[float], fired: list[bool]
) -> None:
    decision = LseDrop(2.0).after(steps(), torch.tensor([lse]), REMEMBERED)
    assert decision.tolist() == [fired]
    rows = LseDrop(2.0).after(
        steps(rows=2), torch.tensor([lse, [5.0, 1.0, 0.0, 9.0]]), REMEMBERED.expand(2, -1, -1)
    )
    assert rows.tolist() == [fired, [False, False]]


def test_a_drop_remembers_the_log_sum_exp_of_every_query_head() -> None:
    lse = torch.arange(8.0).view(2, HEADS)
    remembered = LseDrop(1.0).reference(torch.zeros(2, HEADS, DIM), lse, KV_HEADS)
    assert remembered.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize(
    ("stride", "fired"), [(None, [False, False]), (7, [False, True]), (6, [True, True])]
)
def test_a_stride_caps_the_steps_without_a_refresh(stride: int | None, fired: list[bool]) -> None:
    decision = LseDrop(2.0, stride).before(steps(6, 8), QUERY, REMEMBERED)
    assert decision.tolist() == [fired]


class Watched(LseDrop):
    """Remembers which heads fired."""

    def __init__(self, drop: float) -> None:
        super().__init__(drop)
        self.__dict__["fired"] = []  # the class is frozen

    def after(self, step: Tensor, lse: Tensor, reference: Tensor) -> Tensor:
        self.fired.append(super().after(step, lse, reference))
        return self.fired[-1]


def two_topics(length: int, half: int) -> Tokens:
    """Keys of tokens before `half` point along the first axis, later ones along the second; queries the first."""
    tokens = random_tokens(length=length, dim=8)
    tokens.keys.mul_(0.1)
    tokens.keys[:, :, :half, 0] += 4
    tokens.keys[:, :, half:, 1] += 4
    tokens.queries.zero_()
    tokens.queries[..., 0] = 3
    return tokens


def test_only_the_heads_that_fire_after_the_partial_step_refresh() -> None:
    prompt, half, budget = 20, 6, 4
    tokens = two_topics(24, half)
    tokens.queries[:, 2:, prompt] = torch.eye(8)[1] * 3  # the second KV head changes its topic
    tokens.keys[:, :, prompt] = 0  # and the new token speaks of neither
    config = RefreshConfig(budget=budget, pool_kernel=1)
    trigger = Watched(2.0)
    decoder = Decoder(tokens, config, prompt, trigger=trigger, options=AttendOptions(scale=1.0))
    step = decoder.step()

    assert trigger.fired[0].tolist() == [[False, True]]
    first, second = step.held[0]
    assert len([p for p in first if p < half]) == budget - 1
    assert prompt in first  # the new token entered this ring
    assert all(p >= half for p in second)  # and this one was rebuilt
    assert torch.equal(decoder.cache.ring.pushed, torch.tensor([[1, 0]]))
    torch.testing.assert_close(step.output[:, 2:], step.full[:, 2:])
    assert float((step.output[:, :2] - step.full[:, :2]).abs().max()) > 0.01


def test_a_fired_head_gives_full_attention_and_the_others_partial() -> None:
    tokens = random_tokens(rows=3, kv_heads=2, group=2, length=60, pads=(0, 7, 3))
    trigger = Watched(2.0)
    decoder = Decoder(tokens, RefreshConfig(budget=6), 30, trigger=trigger)
    for now in range(30, 60):
        step = decoder.step()
        for row, head in [(row, head) for row in range(3) for head in range(2)]:
            queries = slice(2 * head, 2 * head + 2)
            if trigger.fired[-1][row, head]:
                expected = step.full[row, queries]
            else:
                ring = step.held[row][head]
                expected = reference.attend(
                    tokens.queries[row : row + 1, queries, now],
                    Entries(
                        tokens.keys[row : row + 1, head : head + 1, ring],
                        tokens.values[row : row + 1, head : head + 1, ring],
                    ),
                    decoder.options,
                ).output[0]
            torch.testing.assert_close(step.output[row, queries], expected)
    share = torch.stack(trigger.fired).float().mean()
    assert 0.2 < share < 0.8  # both cases were seen


def test_only_a_head_that_fires_remembers_anew() -> None:
    tokens = random_tokens(rows=2, pads=(0, 7), length=60)
    decoder = Decoder(tokens, RefreshConfig(budget=6), 30, trigger=(trigger := Watched(2.0)))
    cache, mixed = decoder.cache, 0
    decoder.step()
    for now in range(31, 60):
        before = cache.reference.clone()
        decoder.step()
        fired = trigger.fired[-1]
        options = decoder.options.over(tokens.visible[:, None, : now + 1])
        entries = Entries(tokens.keys[:, :, : now + 1], tokens.values[:, :, : now + 1])
        full = reference.attend(tokens.queries[:, :, now], entries, options).lse
        torch.testing.assert_close(cache.reference[fired], full.view_as(before)[fired])
        assert torch.equal(cache.reference[~fired], before[~fired])
        mixed += bool(fired.any()) and not bool(fired.all())
    assert mixed > 5


def drop_run(**settings: Any) -> tuple[Decoder, list[Step]]:
    tokens = random_tokens(rows=2, pads=(0, 7), length=60)
    decoder = Decoder(tokens, RefreshConfig(budget=6, **settings), 30)
    return decoder, decoder.run(30)


def test_a_huge_drop_never_fires_and_a_tiny_one_nearly_always() -> None:
    _, never = drop_run(stride=None)
    decoder, huge = drop_run(stride=None, trigger="lse-drop", drop=1e9)
    assert decoder.cache.stats.full_share == 0.0
    for ours, plain in zip(huge, never, strict=True):
        assert ours.held == plain.held and torch.equal(ours.output, plain.output)
    decoder, _ = drop_run(stride=None, trigger="lse-drop", drop=1e-9)
    assert decoder.cache.stats.full_share > 0.9


def test_a_huge_drop_with_a_stride_is_that_fixed_stride() -> None:
    _, fixed = drop_run(stride=4, threshold=None)
    _, capped = drop_run(stride=4, trigger="lse-drop", drop=1e9)
    for ours, plain in zip(capped, fixed, strict=True):
        assert ours.held == plain.held and torch.equal(ours.output, plain.output)


def test_a_stride_counts_from_the_refresh_that_a_drop_asked_for() -> None:
    tokens = two_topics(30, 6)
    tokens.queries[:, :, 22:] = torch.eye(8)[1] * 3  # the third step looks for the other topic
    tokens.keys[:, :, 20:] = 0
    config = RefreshConfig(budget=6, pool_kernel=1, trigger="lse-drop", drop=2.0, stride=4)
    decoder = Decoder(tokens, config, 20, options=AttendOptions(scale=1.0))
    since = []
    for _ in range(9):
        decoder.step()
        since.append(int(decoder.cache.ring.steps[0, 0]))
    assert since == [1, 2, 0, 1, 2, 3, 0, 1, 2]
