"""Codes of a few bits and the entries that are worth reading exactly: the policy alone, on plain tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.policy.rounding import (
    BLOCK,
    largest_weights,
    low_and_step,
    restored,
    round_block,
    worth_reading,
)
from tests.helpers import PROPERTY, relative_rms

SHAPE = (2, 3, BLOCK, 8)


def numbers(seed: int = 0, scale: float = 1.0) -> Tensor:
    """With outliers in some channels, as keys have them, and away from zero."""
    gen = torch.Generator().manual_seed(seed)
    channels = torch.randn(SHAPE[-1], generator=gen).exp()
    return scale * (torch.randn(SHAPE, generator=gen) * channels + 0.5)


def error(bits: int) -> float:
    return relative_rms(restored(round_block(numbers(), bits)), numbers())


@pytest.mark.parametrize("bits", range(2, 7))
def test_an_error_is_half_a_step_and_what_the_ends_of_the_grid_lose(bits: int) -> None:
    """A step as it is kept is 1/8 off at most, the least number a quarter of a step and 1/64 of itself."""
    exact = numbers()
    rounded = round_block(exact, bits)
    assert int(rounded.codes.min()) == 0 and int(rounded.codes.max()) <= 2**bits - 1
    low, high = exact.amin(-2), exact.amax(-2)
    wanted = torch.maximum((high - low) / (2**bits - 1), low.abs() * 4 / 255)
    _, step = low_and_step(rounded.grid)
    assert bool(((step / wanted - 1).abs() <= 0.125).all())
    beyond = (wanted - step).clamp(min=0) * (2**bits - 1)
    most = torch.maximum(step / 2 + step / 8, beyond + step / 8) + low.abs() / 256
    assert bool(((restored(rounded) - exact).abs() <= most[..., None, :] + 1e-6).all())


def test_more_bits_come_closer_as_far_as_grids_are_kept() -> None:
    """From 8 bits on the error is that of the 16 bits in which a grid is kept: 2 % at most."""
    errors = [error(bits) for bits in (1, 2, 3, 4)]
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert more < 0.8 * fewer
    assert error(6) < 0.04 and error(16) < 0.02


def test_codes_are_those_of_a_slow_definition() -> None:
    block = numbers()[0, 0]
    steps = [m * 2.0**e for e in range(-20, 12) for m in (1, 1.25, 1.5, 1.75)]
    rounded = round_block(block, 2)
    lows, kept = low_and_step(rounded.grid)
    for line, found, low, step in zip(
        block.T.tolist(), rounded.codes.T.tolist(), lows.tolist(), kept.tolist(), strict=True
    ):
        wanted = max((max(line) - min(line)) / 3, abs(min(line)) * 4 / 255)
        assert step == min(steps, key=lambda one: abs(one - wanted))
        assert low == round(min(line) / step * 4) * step / 4
        for number, code in zip(line, found, strict=True):
            assert code == min(range(4), key=lambda c: abs(low + step * c - number))


def test_the_values_of_one_bit_lie_around_the_mean() -> None:
    block = numbers()[0, 0]
    low, step = low_and_step(round_block(block, 1).grid)
    distance = (block - block.mean(0)).abs().mean(0)
    assert bool(((step / distance / 2 - 1).abs() <= 0.125).all())
    torch.testing.assert_close(low, block.mean(0) - distance, rtol=0, atol=float(step.max()) / 8)


def test_a_block_is_rounded_as_alone_and_in_the_dtype_it_has() -> None:
    exact = numbers().bfloat16()
    for bits in (1, 2, 3):
        together = round_block(exact, bits)
        for row in range(SHAPE[0]):
            for head in range(SHAPE[1]):
                alone = round_block(exact[row, head].float(), bits)
                for part, whole in zip(alone, together, strict=True):
                    assert torch.equal(part, whole[row, head])


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-3, 1e3])
def test_small_and_large_numbers_keep_their_size(scale: float) -> None:
    """Down to 2^-20, the least step; a step that is kept 1/8 too short loses as much of the range."""
    exact = numbers(scale=scale)
    found = (restored(round_block(exact, 6)) - exact).abs().max()
    assert float(found) <= 0.125 * float(exact.abs().max()) + 1e-6


def test_numbers_that_are_all_alike_are_kept_to_half_a_percent() -> None:
    for number in (0.75, -30.0, 0.0):
        exact = torch.full(SHAPE, number)
        torch.testing.assert_close(restored(round_block(exact, 2)), exact, rtol=0.005, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_hidden_tokens_have_no_say_in_a_grid(poison: float, bits: int) -> None:
    exact, visible = numbers(), torch.ones(SHAPE[:-1], dtype=torch.bool)
    visible[0, 0, :5] = visible[1, 2, 60:] = visible[1, 1, 30] = visible[1, 0] = False
    clean = exact.masked_fill(~visible[..., None], 0.5)  # what others hold is of no matter
    dirty = exact.masked_fill(~visible[..., None], poison)
    ours, theirs = (round_block(block, bits, visible) for block in (dirty, clean))
    assert torch.equal(ours.grid, theirs.grid) and torch.equal(ours.codes, theirs.codes)
    assert not ours.codes[~visible].any() and bool(restored(ours).isfinite().all())
    assert not torch.equal(round_block(dirty, bits).grid, ours.grid)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_channel_that_is_not_finite_is_nan_and_no_other(poison: float) -> None:
    exact = numbers()
    exact[0, 0, 3, 2] = poison
    rounded = round_block(exact, 2)
    assert int(rounded.codes.min()) >= 0 and int(rounded.codes.max()) <= 3
    found, clean = restored(rounded), restored(round_block(numbers(), 2))
    assert bool(found[0, 0, :, 2].isnan().all())
    found[0, 0, :, 2] = clean[0, 0, :, 2]
    assert torch.equal(found, clean)


def test_all_grids_that_there_are() -> None:
    """Steps from 2^-20 to 1.75 * 2^11, each longer than the last; `low` in quarters of one; the lowest means NaN."""
    low, step = low_and_step(torch.arange(-(2**15), 2**15).to(torch.int16).view(2**9, 2**7))
    assert bool((step == step[0]).all()) and bool((step[0].diff() > 0).all())
    assert step[0, :5].tolist() == [m * 2.0**-20 for m in (1, 1.25, 1.5, 1.75, 2)]
    assert float(step[0, -1]) == 1.75 * 2**11
    assert bool(low[0].isnan().all())
    assert torch.equal(low[1:] * 4, torch.arange(-255, 256)[:, None] * step[1:])


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("far", [5.0, -300.0, 2000.0])
def test_where_low_is_too_far_away_for_a_step_the_step_becomes_longer(
    far: float, bits: int
) -> None:
    """Of numbers that hardly differ nothing is lost but a hundredth of their distance from 0."""
    exact = far * (1 + numbers() / 1e4)
    rounded = round_block(exact, bits)
    assert bool((low_and_step(rounded.grid)[1] >= abs(far) * 3.5 / 255).all())
    assert bool(((restored(rounded) - exact).abs() <= abs(far) * 0.011).all())


@pytest.mark.parametrize("bits", range(1, 7))
def test_beyond_the_longest_step_numbers_stay_finite(bits: int) -> None:
    found = restored(round_block(numbers(scale=1e30), bits))
    assert bool(found.isfinite().all())
    assert 1e5 < float(found.abs().max()) <= (255 / 4 + 2**bits) * 1.75 * 2**11


@pytest.mark.parametrize("bits", range(2, 7))
def test_the_order_of_tokens_is_that_of_their_codes_and_nothing_else(bits: int) -> None:
    """But for one bit, whose mean is a sum."""
    exact, order = numbers(), torch.randperm(BLOCK, generator=torch.Generator().manual_seed(1))
    rounded, moved = round_block(exact, bits), round_block(exact[..., order, :], bits)
    assert torch.equal(moved.grid, rounded.grid)
    assert torch.equal(moved.codes, rounded.codes[..., order, :])


def test_a_block_without_a_visible_token_is_zeros() -> None:
    nothing = torch.zeros(SHAPE[:-1], dtype=torch.bool)
    for bits in range(1, 7):
        rounded = round_block(torch.full(SHAPE, math.nan), bits, nothing)
        assert bool((restored(rounded) == 0).all())


def test_largest_weights_of_a_group() -> None:
    logits = torch.tensor(
        [[[1.0, 2.0, -math.inf], [0.0, 5.0, 1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]]
    )
    lse = torch.tensor([[3.0, 6.0, -math.inf, 2.0]])  # the third head sees nothing
    expected = torch.tensor([[[-2.0, -1.0, -5.0], [1.0, 1.0, 1.0]]])
    assert torch.equal(largest_weights(logits, lse, 2), expected)


def chosen(weights: list[float] | Tensor, budget: int) -> list[int]:
    """The entries of one head that are worth it."""
    row = torch.as_tensor(weights)[None, None]
    return worth_reading(row, torch.tensor([budget]))[0, 0].nonzero()[:, 0].tolist()


LOG_WEIGHTS = st.one_of(
    st.floats(-40, 0.5),
    st.sampled_from([0.0, -1.0, -1.01, -31.9, -1e30, -math.inf, math.nan, math.inf]),
)


@PROPERTY
@given(weights=st.lists(LOG_WEIGHTS, min_size=1, max_size=40), budget=st.integers(1, 12))
def test_the_largest_are_chosen_and_never_more_than_k(weights: list[float], budget: int) -> None:
    found = chosen(weights, budget)
    assert len(found) <= budget
    candidates = [i for i, weight in enumerate(weights) if weight > -math.inf]
    assert set(found) <= set(candidates)  # neither NaN nor those without weight
    left = [weights[i] for i in candidates if i not in found]
    if found and left:
        assert min(weights[i] for i in found) > max(left)
    if len(candidates) <= budget:
        assert not left
    elif max(left) > -31.8:  # the next bucket, of 1/8 nat, would have been too many
        depth = math.floor(-min(max(left), 0.0) * 8)
        bucket = [w for w in left if math.floor(-min(w, 0.0) * 8) <= depth]
        assert len(found) + len(bucket) > budget


ADVERSARIAL = {
    "flat": [-3.0] * 500,
    "one too many alike": [-2.0] * 9 + [-9.0] * 491,
    "one huge": [-1e-6, *[-20.0] * 499],
    "all NaN": [math.nan] * 500,
    "no weight at all": [-math.inf] * 500,
    "more than one": [math.inf] * 500,
    "all in the last bucket": [-40.0 - i for i in range(500)],
    "a steep slope": [-i / 8 for i in range(500)],
    "a gentle slope": [-i / 800 for i in range(500)],
}
COUNTS = {"one huge": 1, "a steep slope": 8}  # of K = 8; of the others none


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_an_adversarial_head_reads_no_more_than_k(name: str) -> None:
    assert len(chosen(ADVERSARIAL[name], 8)) == COUNTS.get(name, 0)
    assert len(chosen(ADVERSARIAL[name][:8], 8)) == (
        8 if name not in ("all NaN", "no weight at all") else 0
    )


def test_heads_rows_and_order_decide_nothing_for_each_other() -> None:
    gen = torch.Generator().manual_seed(3)
    weights = torch.randn(3, 2, 200, generator=gen) * 4 - 6
    budget = torch.tensor([1, 9, 60])
    together = worth_reading(weights, budget)
    assert together.sum(-1).float().mean() > 15
    for row in range(3):
        for head in range(2):
            alone = chosen(weights[row, head], int(budget[row]))
            assert together[row, head].nonzero()[:, 0].tolist() == alone
    order = torch.randperm(200, generator=gen)
    assert torch.equal(worth_reading(weights[..., order], budget), together[..., order])
