"""What is called recall is the mass of the true attention in the entries attended to."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from experiments import recall
from experiments.recall import Watch
from refreshkv.cache.layer import LayerCache
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods import find
from refreshkv.step import Algorithm
from tests.helpers import random_tokens
from tests.slow import slow_weights

PROMPT, LENGTH, PADS = 20, 32, (0, 7)
ATTENTION = AttendOptions(scale=0.5)


def watched(name: str, **settings: object) -> tuple[Tensor, list[Tensor]]:
    """Shares `[steps, B, Hkv]`, and after each step which positions `[B, Hkv, n]` a partial cache holds."""
    tokens = random_tokens(rows=2, pads=PADS, length=LENGTH)
    method, watch = find(name), Watch(1)
    config = method.config(**settings)
    cache = LayerCache(config.for_cache())
    cache.watch = functools.partial(watch.saw, 0)
    algorithm = Algorithm() if method.make is None else method.make(config, 0, 1)
    held = []
    for start, end in [(0, PROMPT), *((now, now + 1) for now in range(PROMPT, LENGTH))]:
        cache.append(tokens.keys[:, :, start:end], tokens.values[:, :, start:end])
        if start == 0:
            algorithm.observe(cache, tokens.queries[:, :, :end], ATTENTION, tokens.seen(end))
            continue
        algorithm.step(cache, tokens.queries[:, :, start], ATTENTION, tokens.seen(end))
        held.append(None if cache.ring is None else cache.ring.positions.clone())
    return torch.stack(watch.layers[0]), held


def true_mass(row: int, head: int, now: int, positions: list[int]) -> float:
    tokens = random_tokens(rows=2, pads=PADS, length=LENGTH)
    members = [2 * head, 2 * head + 1]
    everything = list(range(PADS[row], now + 1))
    queries, keys = tokens.queries[row, members, now], tokens.keys[row, head, everything]
    weights = slow_weights(queries, keys, ATTENTION, members).mean(0)
    return sum(float(weights[p - PADS[row]]) for p in positions)


def test_the_mass_in_a_partial_cache() -> None:
    shares, held = watched("no-refresh", budget=6)
    for step, positions in enumerate(held):
        for row in range(2):
            for head in range(shares.shape[2]):
                kept = [p for p in positions[row, head].tolist() if p >= 0]
                expected = true_mass(row, head, PROMPT + step, kept)
                assert float(shares[step, row, head]) == pytest.approx(expected, abs=1e-5)
    assert shares.min() > 0 and shares.max() < 1


def test_what_a_step_fetches_does_not_count_for_it() -> None:
    shares, held = watched("no-refresh", budget=6, successor=2)
    late = shares.new_tensor(
        [
            [
                [
                    true_mass(row, head, PROMPT + step, positions[row, head].tolist())
                    for head in (0, 1)
                ]
                for row in range(2)
            ]
            for step, positions in enumerate(held)
        ]
    )
    assert (shares[..., :2] - late).abs().max() > 0.01


def test_a_step_that_reads_everything_is_left_out() -> None:
    shares, _ = watched("refreshkv-fixed", budget=6, stride=3)
    full = torch.arange(1, len(shares) + 1) % 3 == 0
    assert torch.equal(shares.isnan().flatten(1).all(1), full)
    assert torch.equal(shares.isnan().flatten(1).any(1), full)


@pytest.mark.parametrize("name", ["no-refresh", "snapkv", "token-select", "int4-keys"])
def test_everything_is_all_of_the_mass(name: str) -> None:
    shares, _ = watched(name, budget=LENGTH)
    torch.testing.assert_close(shares, torch.ones_like(shares))


def test_steps_after_the_end_of_a_row_are_left_out() -> None:
    watch = Watch(1)
    watch.layers[0] = [torch.full((2, 1), float(step)) for step in range(5)]
    assert sorted(watch.of_rows([2, 4]).tolist()) == [0, 0, 1, 1, 2, 3]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("snapkv", "oracle-topk", "refreshkv-lse-drop")
    recall.show(tasks=("key-value",), length=256, limit=2, methods=methods)
    rows = dict(line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    means = {name: float(rows[f"| `{name}`"].split(",")[0]) for name in methods}
    assert means["snapkv"] < means["oracle-topk"] <= 100
    assert means["refreshkv-lse-drop"] < means["oracle-topk"]
