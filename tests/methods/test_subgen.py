"""SubGen: its samples against the algorithm of the paper, token after token, and that they are right in the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.methods.kept import Look
from refreshkv.methods.subgen import SubGen, chance, farthest_first
from tests.helpers import left_padding, random_tokens
from tests.slow import slow_logits

from .driver import Driver, close
from .slow import Row
from .test_sets import ATTENTIONS, LENGTH, PROMPT


def slow(row: Row, head: int, samples: int, seed: int) -> list[Tensor]:
    """The outputs `[G, D]` of a KV head, by the paper's algorithm 1 over what has left the window."""
    slots = row.budget // 4
    clusters = slots * 2 // (samples + 1)
    slots = slots if clusters else 0
    window = row.budget - slots - -(-clusters * (samples + 1) // 2)
    keys, values = (part[0, head].double() for part in (row.text.keys, row.text.values))
    centres = [0]
    while len(centres) < clusters:
        gaps = (keys[: row.prompt, None] - keys[centres]).square().sum(-1).amin(1)
        centres.append(int(gaps.argmax()))
    drawn = chance(torch.arange(1, len(keys) + 1)[None], slots + samples, seed * 1009)[0]
    reservoir, total = [-1] * slots, 0.0
    sizes, members = [0] * clusters, [[-1] * samples for _ in range(clusters)]

    def leave(token: int) -> None:
        nonlocal total
        norm = float(values[token].square().sum())
        total += norm
        for slot in range(slots):
            if drawn[token, samples + slot] < norm / total:
                reservoir[slot] = token
        if clusters:
            nearest = int((keys[token] - keys[centres]).square().sum(-1).argmin())
            sizes[nearest] += 1
            for sample in range(samples):
                if drawn[token, sample] < 1 / sizes[nearest]:
                    members[nearest][sample] = token

    outputs, left = [], 0
    for now in row.steps:
        while now + 1 > row.budget and left < now + 1 - window:
            leave(left)
            left += 1
        queries = row.text.queries[0, row.members(head), now]
        mass = slow_logits(queries, keys, row.options).exp()
        above, below = (
            mass[:, left : now + 1] @ values[left : now + 1],
            mass[:, left : now + 1].sum(-1),
        )
        if row.options.sinks is not None:
            below = below + row.options.sinks[row.members(head)].double().exp()
        for token in reservoir if left else []:
            share = total / slots / values[token].square().sum()
            above = above + share * mass[:, token, None] * values[token]
        for size, tokens in zip(sizes, members, strict=True):
            for token in tokens if size else []:
                below = below + size / samples * mass[:, token]
        most = float(values[: now + 1].abs().max())
        outputs.append((above / below[:, None]).clamp(-most, most))
    return outputs


def compare(driver: Driver, samples: int = 1, seed: int = 0) -> None:
    steps = driver.tokens.keys.shape[2] - driver.prompt
    taken = [output for output, _ in driver.run(steps)]
    for row in range(len(driver.tokens.keys)):
        alone = Row(driver.tokens, row, driver.prompt, driver.config, driver.options)
        for head in alone.heads:
            for output, expected in zip(taken, slow(alone, head, samples, seed), strict=True):
                close(output[row, alone.members(head)], expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("budget", [1, 3, 4, 13, 40, 70, 0.5])
def test_equals_the_algorithm_of_the_paper(budget: int | float, attention: str) -> None:
    """With 40 and 70 the sampling begins in mid answer."""
    tokens = random_tokens(rows=3, pads=(0, 47, 18), length=LENGTH)
    compare(Driver(tokens, "subgen", PROMPT, budget=budget, options=ATTENTIONS[attention]))


@pytest.mark.parametrize("samples", [2, 3, 9])
def test_several_samples_of_a_cluster(samples: int) -> None:
    tokens = random_tokens(rows=2, group=1, pads=(0, 18), length=LENGTH)
    settings: dict[str, Any] = {"samples": samples, "seed": 5}
    compare(Driver(tokens, "subgen", PROMPT, budget=20, **settings), **settings)


def test_a_token_counts_once_in_the_mean() -> None:
    """Above the line and below it, over many seeds."""
    tokens = random_tokens(length=40, kv_heads=1, group=1)
    driver = Driver(tokens, "subgen", 39, budget=24)
    driver.step()
    method, cache = driver.algorithm, driver.cache
    assert isinstance(method, SubGen) and method.kept is not None
    now = Look(cache, tokens.queries[:, :, 39], driver.options, None, 40)
    found = []
    for seed in range(2000):
        method.settings = type(method.settings)(budget=24, seed=seed)
        found.append(torch.stack(method.weights(now, method.kept, tokens.keys, tokens.values)))
    mean = torch.stack(found).mean(0)
    # The standard error of a rare token's weight is some 0.06.
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0.0, atol=0.3)
    assert 0.95 < float(mean.mean()) < 1.05
    assert max(float(one.max()) for one in found) > 3  # or nothing would stand for others


def test_chance_is_even_and_depends_on_the_seed() -> None:
    drawn = chance(torch.arange(1, 4001)[None], 8, 3)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1
    assert torch.allclose(drawn.mean(1), torch.full((1, 8), 0.5).double(), atol=0.02)
    assert abs(float(torch.corrcoef(drawn[0].T).fill_diagonal_(0).max())) < 0.06
    assert not torch.equal(drawn, chance(torch.arange(1, 4001)[None], 8, 4))


def test_the_centres_are_far_from_each_other() -> None:
    points = torch.tensor([5.0, 0.0, 1.0, 9.0, 4.0])[None, None, :, None]
    assert farthest_first(points, left_padding((0,), 5), 3).flatten().tolist() == [5.0, 0.0, 9.0]
    assert farthest_first(points, left_padding((1,), 5), 3).flatten().tolist() == [0.0, 9.0, 4.0]


def test_what_stands_for_others_is_counted() -> None:
    """K = 22: 5 entries, and of 5 clusters a centre and a sample, which are keys; until K is reached, every token."""
    tokens = random_tokens(rows=2, pads=(0, 41), length=LENGTH)
    driver = Driver(tokens, "subgen", PROMPT, budget=22)
    driver.run(4)
    assert [int(driver.stats.row(row).layers[0].read) for row in (0, 1)] == [
        2 * 4 * 22,
        2 * (20 + 21 + 22 + 22),
    ]
    assert driver.held()[1][0] == list(range(LENGTH - 21 - 12, LENGTH - 21))
