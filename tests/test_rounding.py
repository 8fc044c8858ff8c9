"""Codes of a few bits and the entries that are worth reading exactly: the policy alone, on plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.policy.rounding import (
    BLOCK,
    Rounded,
    largest_weights,
    restored,
    round_keys,
    round_values,
    worth_reading,
)
from tests.helpers import PROPERTY, relative_rms

SHAPE = (2, 3, BLOCK, 8)
ROUNDED: dict[str, tuple[Callable[..., Rounded], int]] = {  # and over which dimension a grid lies
    "keys": (round_keys, -2),
    "values": (round_values, -1),
}


def numbers(seed: int = 0, scale: float = 1.0) -> Tensor:
    """With outliers in some channels, as keys have them, and away from zero."""
    gen = torch.Generator().manual_seed(seed)
    channels = torch.randn(SHAPE[-1], generator=gen).exp()
    return scale * (torch.randn(SHAPE, generator=gen) * channels + 0.5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ROUNDED)
def test_an_error_is_half_a_step_at_most(kind: str, bits: int) -> None:
    """And what 16 bits lose of the ends of the grid: 1/256 of them."""
    make, over = ROUNDED[kind]
    exact = numbers()
    rounded = make(exact, bits)
    assert int(rounded.codes.min()) == 0 and int(rounded.codes.max()) == 2**bits - 1
    low, high = exact.amin(over, keepdim=True), exact.amax(over, keepdim=True)
    ends = low.abs() + (high - low)
    assert bool(((restored(rounded) - exact).abs() <= rounded.step / 2 + ends / 256).all())
    torch.testing.assert_close(
        rounded.step.float() * (2**bits - 1), high - low, rtol=1 / 256, atol=0
    )


@pytest.mark.parametrize("kind", ROUNDED)
def test_sixteen_bits_are_the_numbers(kind: str) -> None:
    """But for the ends of the grid, which have 8 bits of precision; every bit up to there halves the error."""
    make, _ = ROUNDED[kind]
    errors = [relative_rms(restored(make(numbers(), bits)), numbers()) for bits in (1, 2, 3, 4, 16)]
    assert errors[-1] < 0.003
    for more, fewer in zip(errors[1:4], errors[:3], strict=True):
        assert more < 0.55 * fewer


@pytest.mark.parametrize("kind", ROUNDED)
def test_codes_are_those_of_a_slow_definition(kind: str) -> None:
    make, over = ROUNDED[kind]
    block = numbers()[0, 0]
    rounded = make(block, 2)
    lines = block if over == -1 else block.T
    codes = rounded.codes if over == -1 else rounded.codes.T
    for line, found, low, step in zip(
        lines.tolist(),
        codes.tolist(),
        rounded.low.flatten().tolist(),
        rounded.step.flatten().tolist(),
        strict=True,
    ):
        assert low == float(torch.tensor(min(line)).bfloat16())
        assert step == float((torch.tensor(max(line)) - torch.tensor(min(line))).div(3).bfloat16())
        for number, code in zip(line, found, strict=True):
            nearest = min(range(4), key=lambda c: abs(low + step * c - number))
            assert code == nearest


@pytest.mark.parametrize("kind", ROUNDED)
def test_a_block_is_rounded_as_alone_and_in_the_dtype_it_has(kind: str) -> None:
    make, _ = ROUNDED[kind]
    exact = numbers().bfloat16()
    together = make(exact, 3)
    for row in range(SHAPE[0]):
        for head in range(SHAPE[1]):
            for part, whole in zip(make(exact[row, head].float(), 3), together, strict=True):
                assert torch.equal(part, whole[row, head])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("kind", ROUNDED)
def test_tiny_and_huge_numbers_keep_their_size(kind: str, scale: float) -> None:
    make, _ = ROUNDED[kind]
    exact = numbers(scale=scale)
    assert float((restored(make(exact, 8)) - exact).abs().max()) <= 0.02 * float(exact.abs().max())


def test_numbers_that_are_all_alike_are_kept() -> None:
    exact = torch.full(SHAPE, 0.75)
    for make, _ in ROUNDED.values():
        assert torch.equal(restored(make(exact, 2)), exact)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_hidden_tokens_have_no_say_in_a_grid(poison: float) -> None:
    exact, visible = numbers(), torch.ones(SHAPE[:-1], dtype=torch.bool)
    visible[0, 0, :5] = visible[1, 2, 60:] = visible[1, 1, 30] = False
    clean = exact.masked_fill(~visible[..., None], 0.5)  # what others hold is of no matter
    dirty = exact.masked_fill(~visible[..., None], poison)
    ours, theirs = (round_keys(keys, 2, visible) for keys in (dirty, clean))
    assert torch.equal(ours.low, theirs.low) and torch.equal(ours.step, theirs.step)
    assert torch.equal(ours.codes[visible], theirs.codes[visible])
    assert not torch.equal(round_keys(dirty, 2).step, ours.step)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ROUNDED)
def test_no_number_gives_a_code_that_there_is_not(kind: str, poison: float) -> None:
    make, over = ROUNDED[kind]
    exact = numbers()
    exact[0, 0, 3, 2] = poison
    rounded = make(exact, 2)
    assert int(rounded.codes.min()) >= 0 and int(rounded.codes.max()) <= 3
    same = torch.ones(SHAPE, dtype=torch.bool)  # the other grids
    same[(0, 0, slice(None), 2) if over == -2 else (0, 0, 3)] = False
    assert torch.equal(restored(rounded)[same], restored(make(numbers(), 2))[same])


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
