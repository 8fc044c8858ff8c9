"""CritiPrefill: what the prompt gets, against loops over its queries, and which pairs are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.methods.critiprefill import most_product
from tests.helpers import Tokens, random_tokens
from tests.slow import slow_weights

from .driver import Driver, close
from .slow import best
from .test_sets import ATTENTIONS

LENGTH = 120


def slow(tokens: Tokens, first: int, budget: int, driver: Driver) -> tuple[Tensor, int]:
    """What the tokens from `first` on get, `[Hq, T, D]`, query by query, and how many pairs that takes."""
    size, block = max(1, budget // 2), max(1, budget // 32)
    length, group, pairs = tokens.keys.shape[2], tokens.group, 0
    output = torch.zeros(*tokens.queries.shape[1:3], tokens.values.shape[-1], dtype=torch.float64)
    for head, (keys, values) in enumerate(
        zip(tokens.keys[0].double(), tokens.values[0].double(), strict=True)
    ):
        members = list(range(head * group, (head + 1) * group))

        def before(start: int, keys: Tensor = keys, members: list[int] = members) -> list[int]:
            """What the queries of a segment may attend to of what comes before it."""
            if start < 4 * budget or start + size >= length:
                return list(range(start))
            asked = tokens.queries[0, members, max(start, first) : start + size].double()
            ends = asked.amin(1), asked.amax(1)
            bound = {}
            for number in range(start // block):
                some = keys[number * block : (number + 1) * block]
                products = [q * k for q in ends for k in (some.amin(0), some.amax(0))]
                bound[number] = float(torch.stack(products).amax(0).sum(-1).max())
            chosen = {*best(bound, budget // block)}
            return [p for p in range(start) if p // block in {*chosen, start // block}]

        for start in range(first // size * size, length, size):
            older = before(start)
            for now in range(max(start, first), min(start + size, length)):
                over = [*older, *range(start, now + 1)]
                pairs += len(over)
                weights = slow_weights(
                    tokens.queries[0, members, now], keys[over], driver.options, members
                )
                output[members, now] = weights @ values[over]
    return output[:, first:], pairs


def compare(length: int, budget: int | float, chunk: int | None, attention: str) -> None:
    pads = (0, 47, 18)
    tokens = random_tokens(rows=3, pads=pads, length=length)
    options = ATTENTIONS[attention]
    driver = Driver(tokens, "critiprefill", length, budget=budget, chunk=chunk, options=options)
    begin = 0 if chunk is None else length // chunk * chunk
    for row, pad in enumerate(pads):
        k = driver.config.resolve_budget(length - pad)
        expected, pairs = slow(tokens.alone(row), max(0, begin - pad), k, driver)
        close(driver.observed[row, :, max(0, pad - begin) :], expected)
        if chunk is None:
            counts = driver.stats.row(row).prompts
            assert int(counts.read) == pairs
            assert int(counts.available) == (length - pad) * (length - pad + 1)  # of two KV heads


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("budget", [1, 8, 9, 0.1, 300])
def test_equals_the_slow_prompt(budget: int | float, attention: str) -> None:
    compare(LENGTH, budget, None, attention)


@pytest.mark.parametrize("budget", [64, 67])
def test_blocks_of_several_tokens(budget: int) -> None:
    """Of two, where segments of 33 also begin in the middle of one."""
    compare(430, budget, None, "plain")


@pytest.mark.parametrize("chunk", [7, 50])
def test_the_last_of_several_passes(chunk: int) -> None:
    compare(LENGTH, 8, chunk, "plain")


def test_a_small_budget_reads_few_pairs_and_a_large_one_all() -> None:
    tokens = random_tokens(length=LENGTH)
    few, every = (Driver(tokens, "critiprefill", LENGTH, budget=k).stats for k in (8, LENGTH))
    assert few.prefill_read_share is not None and few.prefill_read_share < 0.4
    assert every.prefill_read_share == 1.0
    assert few.row(0).as_dict()["prefill_read_share"] == few.prefill_read_share


def test_full_attention_has_no_sparse_prefill() -> None:
    assert Driver(random_tokens(), "full", 30).stats.as_dict()["prefill_read_share"] is None


def test_no_product_is_greater_than_the_bound() -> None:
    gen: Any = torch.Generator().manual_seed(0)
    queries, blocks = torch.randn(2, 3, 5, 8, generator=gen), torch.randn(2, 4, 6, 8, generator=gen)
    products = torch.einsum("hgtd,hbnd->hgbtn", queries, blocks).amax((-1, -2))
    bound = most_product(queries, blocks)
    assert (products <= bound + 1e-5).all()
    one = most_product(queries[:, :, :1], blocks[:, :, :1])
    close(one, torch.einsum("hgd,hbd->hgb", queries[:, :, 0], blocks[:, :, 0]))
