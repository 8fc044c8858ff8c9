"""Squeezed Attention: its clusters and its threshold, what is counted, and what follows a crop."""

from __future__ import annotations

import pytest
import torch

from refreshkv.methods.squeezed import SqueezedAttention, k_means
from tests.helpers import left_padding, random_tokens

from .driver import Driver
from .test_sets import LENGTH, PROMPT, check

SETTINGS = {"window": 8, "clusters": 0.2}


@pytest.mark.parametrize("budget", [9, 20, 35, 55, 61])
@pytest.mark.parametrize("group", [1, 3])
def test_many_clusters_equal_the_slow_ones(budget: int, group: int) -> None:
    tokens = random_tokens(rows=3, pads=(0, 47, 18), group=group, length=LENGTH)
    check(Driver(tokens, "squeezed", PROMPT, budget=budget, **SETTINGS), "squeezed")


def test_k_means_finds_clusters_that_lie_apart() -> None:
    """Wherever the padding is, and with as many clusters as each row has."""
    gen = torch.Generator().manual_seed(0)
    corners = torch.eye(4)[torch.arange(40) // 10]
    points = corners + 0.01 * torch.randn(2, 3, 40, 4, generator=gen)
    seen = left_padding((0, 6), 40)
    labels = k_means(points, seen, torch.tensor([4, 4]))
    for row, pad in ((0, 0), (1, 6)):
        for head in labels[row]:
            assert torch.equal(head[pad:], torch.arange(pad, 40) // 10)
    alone = k_means(points[1:, :, 6:], seen[1:, 6:], torch.tensor([4]))
    assert torch.equal(labels[1:, :, 6:], alone)


@pytest.mark.parametrize("budget", [15, 30, 50])
def test_the_last_prompt_queries_read_the_budget_in_the_mean(budget: int) -> None:
    tokens = random_tokens(rows=2, pads=(0, 10), length=LENGTH)
    driver = Driver(tokens, "squeezed", PROMPT, budget=budget, **SETTINGS)
    driver.step()
    method = driver.algorithm
    assert isinstance(method, SqueezedAttention) and method.threshold is not None
    queries = tokens.queries[:, :, PROMPT - 8 : PROMPT]
    near = method.weights(queries, driver.options) >= method.threshold[:, None, None, None]
    read = (near * method.sizes[:, :, None]).sum(-1).mean((1, 2)) + 8 + 1
    for found, prefix in zip(read.tolist(), (52, 42), strict=True):
        # One more cluster, of one of 16 queries and heads, would be too much.
        assert budget - 3 < min(found, budget) <= budget or found == prefix + 9


def test_the_centres_are_counted() -> None:
    """Prefixes of 52 and 31 tokens: 11 and 7 clusters, of which a centre is half an entry."""
    tokens = random_tokens(rows=2, pads=(0, 21), length=LENGTH)
    driver = Driver(tokens, "squeezed", PROMPT, budget=20, **SETTINGS)
    held = [driver.run(1)[0][1] for _ in range(2)]
    for row, centres in ((0, 6), (1, 4)):
        expected = sum(len(head) + centres for step in held for head in step[row])
        assert int(driver.stats.row(row).layers[0].read) == expected


def test_a_prefix_that_was_cropped_is_no_prefix() -> None:
    tokens = random_tokens(rows=2, pads=(0, 9), length=LENGTH)
    driver = Driver(tokens, "squeezed", PROMPT, budget=20, **SETTINGS)
    few = driver.run(1)[0][1]
    driver.crop(PROMPT)
    assert driver.run(1)[0][1] == few
    driver.crop(PROMPT - 9)
    assert driver.run(1)[0][1] == [[[*range(pad, PROMPT - 8)]] * 2 for pad in (0, 9)]
