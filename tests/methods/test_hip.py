"""HiP: long texts, of which the coarse stages leave something out, and what is counted."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_tokens

from .driver import Driver
from .test_sets import LENGTH, PROMPT, check


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("budget", [30, 90])
def test_long_texts_equal_the_slow_ones(budget: int, interval: int) -> None:
    tokens = random_tokens(rows=2, pads=(0, 300), length=700)
    check(Driver(tokens, "hip", 690, budget=budget, interval=interval), "hip")


def test_a_token_is_found_where_its_neighbours_are_like_it() -> None:
    """One stretch of 16 tokens that the queries look for, in 600 others: it is among the 65 that are attended to."""
    tokens = random_tokens(length=640)
    tokens.keys[:, :, 200:216] += 4 * tokens.queries[:, ::2, -1:]
    driver = Driver(tokens, "hip", 639, budget=65)
    for head in driver.run(1)[0][1][0]:
        assert {*range(202, 214)} <= {*head}


def test_the_keys_that_were_looked_at_are_counted() -> None:
    """61 tokens, 4 first, 16 newest: 41 between, in 1 chunk of 256, 2 of 32, 6 of 8, with 16, 10 and 6 keys each."""
    tokens = random_tokens(rows=2, pads=(0, 21), length=LENGTH)
    driver = Driver(tokens, "hip", PROMPT, budget=52, interval=2)
    read = []
    for _ in range(3):
        before = int(driver.stats.row(0).layers[0].read) if driver.stats.layers else 0
        driver.step()
        read.append(int(driver.stats.row(0).layers[0].read) - before)
    # All of the 40 between that are chosen; the last stage looks again in the third step, among 42.
    assert read == [2 * (52 + (16 + 20 + 36) // 2), 2 * 52, 2 * (52 + 36 // 2)]
    assert torch.equal(driver.chosen.sum(-1), torch.tensor([[52, 52], [42, 42]]))
