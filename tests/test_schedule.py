"""Triggers on hand-made queries, and the `after` seam with a trigger that this file brings along."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.kernels import reference
from refreshkv.schedule import FixedStride, QueryComparison, Trigger, trigger_for
from refreshkv.step import Attention
from tests.helpers import Decoder, Tokens, random_tokens

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
    ("config", "expected"),
    [
        (RefreshConfig(stride=None), Trigger()),
        (RefreshConfig(stride=3, threshold=None), FixedStride(3)),
        (RefreshConfig(stride=3, threshold=0.9), QueryComparison(3, 0.9, "layer")),
        (RefreshConfig(stride=3, threshold=0.9, decide="head"), QueryComparison(3, 0.9, "head")),
    ],
)
def test_the_configuration_names_its_trigger(config: RefreshConfig, expected: Trigger) -> None:
    trigger = trigger_for(config)
    assert type(trigger) is type(expected)
    assert vars(trigger) == vars(expected)


def test_the_base_never_fires() -> None:
    assert fires(Trigger(), -QUERY, QUERY, steps(1, 1000)) == [[False, False]]
    assert Trigger().after(steps(), LSE, torch.empty(1, KV_HEADS, 0)) is None


def test_a_fixed_stride_counts_per_head() -> None:
    counts = torch.tensor([[1, 3], [6, 8], [9, 2]])
    same = QUERY.expand(3, -1, -1)
    decisions = fires(FixedStride(3), same, same, counts)
    assert decisions == [[False, True], [True, False], [True, False]]


@pytest.mark.parametrize("decide", ["layer", "head"])
def test_threshold_one_fires_whenever_due(decide: str) -> None:
    trigger = QueryComparison(5, 1.0, decide)  # type: ignore[arg-type]
    # Rounding makes the cosine of some vectors with themselves exceed 1.
    for seed in range(50):
        query = torch.randn(1, HEADS, 64, generator=torch.Generator().manual_seed(seed))
        assert fires(trigger, query, query, steps(5)) == [[True, True]]
        assert fires(trigger, query, query, steps(4)) == [[False, False]]


def test_threshold_minus_one_practically_never_fires() -> None:
    for seed in range(50):
        now, then = torch.randn(2, 1, HEADS, 8, generator=torch.Generator().manual_seed(seed))
        assert fires(QueryComparison(1, -1.0), now, then, steps(1)) == [[False, False]]


@pytest.mark.parametrize(
    ("threshold", "fired"), [(0.59, False), (0.601, True), (0.0, False), (1.0, True)]
)
def test_the_threshold_is_the_cosine(threshold: float, fired: bool) -> None:
    then = torch.tensor([1.0, 0.0]).expand(1, HEADS, 2)
    now = torch.tensor([0.6, 0.8]).expand(1, HEADS, 2)  # cosine 0.6
    assert fires(QueryComparison(1, threshold), now, then, steps(1)) == [[fired, fired]]


def test_a_layer_decides_for_all_its_heads_and_heads_for_themselves() -> None:
    # The second KV head looks the other way, so that the mean over the layer vanishes: cosine 0.
    now = turned(QUERY, 2, 3)
    assert fires(QueryComparison(5, 0.5, "layer"), now, QUERY, steps()) == [[True, True]]
    assert fires(QueryComparison(5, 0.5, "head"), now, QUERY, steps()) == [[False, True]]
    # One query head of four turns: the layer's mean keeps its direction, the second group's vanishes.
    now = turned(QUERY, 3)
    assert fires(QueryComparison(5, 0.5, "layer"), now, QUERY, steps()) == [[False, False]]
    assert fires(QueryComparison(5, 0.5, "head"), now, QUERY, steps()) == [[False, True]]


@pytest.mark.parametrize("decide", ["layer", "head"])
def test_each_row_and_each_due_head_decides_alone(decide: str) -> None:
    trigger = QueryComparison(5, 0.5, decide)  # type: ignore[arg-type]
    now, then = torch.cat([QUERY, -QUERY]), QUERY.expand(2, -1, -1)
    assert fires(trigger, now, then, steps(rows=2)) == [[False, False], [True, True]]
    assert fires(trigger, now, then, steps(10, 9, rows=2)) == [[False, False], [True, False]]


class LogSumExpDrop(Trigger):
    """Full where a query head's log-sum-exp falls `nats` below what it was at the last full step."""

    def __init__(self, nats: float) -> None:
        self.nats = nats
        self.fired: list[Tensor] = []

    def reference(self, query: Tensor, lse: Tensor, kv_heads: int) -> Tensor:
        return lse.unflatten(1, (kv_heads, -1))

    def after(self, step: Tensor, lse: Tensor, reference: Tensor) -> Tensor:
        self.fired.append((lse.view_as(reference) < reference - self.nats).any(-1))
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
    trigger = LogSumExpDrop(2.0)
    decoder = Decoder(tokens, config, prompt, trigger=trigger, attention=Attention(1.0))
    step = decoder.step()

    assert trigger.fired[0].tolist() == [[False, True]]
    first, second = step.held[0]
    assert len([p for p in first if p < half]) == budget - 1
    assert prompt in first  # the new token entered this ring
    assert all(p >= half for p in second)  # and this one was rebuilt
    assert torch.equal(decoder.cache.partial.pushed, torch.tensor([[1, 0]]))
    torch.testing.assert_close(step.output[:, 2:], step.full[:, 2:])
    assert float((step.output[:, :2] - step.full[:, :2]).abs().max()) > 0.01


def test_a_fired_head_gives_full_attention_and_the_others_partial() -> None:
    tokens = random_tokens(rows=3, kv_heads=2, group=2, length=60, pads=(0, 7, 3))
    trigger = LogSumExpDrop(2.0)
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
                    tokens.keys[row : row + 1, head : head + 1, ring],
                    tokens.values[row : row + 1, head : head + 1, ring],
                    scale=decoder.attention.scale,
                ).output[0]
            torch.testing.assert_close(step.output[row, queries], expected)
    share = torch.stack(trigger.fired).float().mean()
    assert 0.2 < share < 0.8  # both cases were seen
