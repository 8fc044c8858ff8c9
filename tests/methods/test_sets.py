"""What each method attends to, against slow definitions, and what each promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from refreshkv.kernels.backend import REFERENCE
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods import METHODS
from refreshkv.methods.pyramidkv import PyramidKVSettings, layer_budget
from refreshkv.methods.quest import Quest
from refreshkv.policy.rounding import restored, round_block
from tests.helpers import random_tokens

from .driver import CHOOSING, EVICTING, KEPT, KIVI, VARYING, Driver, close, full_attention
from .slow import SLOW, Row, ablation, snapkv
from .slow_search import SEARCHING

SINKS = torch.tensor([0.0, 7.0, 5.0, -2.0])
ATTENTIONS = {
    "plain": None,
    "softcap": AttendOptions(scale=0.5, softcap=1.5),
    "sinks": AttendOptions(scale=0.5, sinks=SINKS),
}
SHAPES: dict[str, dict[str, Any]] = {
    "ragged": {"rows": 3, "group": 2, "pads": (0, 47, 18)},
    "multi-head": {"rows": 2, "kv_heads": 4, "group": 1, "dim": 32},
}
PROMPT, LENGTH = 60, 85
PAGE = 16


def check(driver: Driver, name: str, slow: Any = None) -> None:
    """Every step's sets and outputs, each row and head."""
    tokens = driver.tokens
    taken = driver.run(tokens.keys.shape[2] - driver.prompt)
    for row in range(tokens.keys.shape[0]):
        alone = Row(tokens, row, driver.prompt, driver.config, driver.options)
        for now, sets, (output, held) in zip(
            alone.steps, (slow or (SLOW | SEARCHING)[name])(alone), taken, strict=True
        ):
            assert held[row] == [[p + alone.pad for p in positions] for positions in sets]
            for head, positions in enumerate(sets):
                expected = alone.output(head, now, positions)
                close(output[row, alone.members(head)], expected)


@pytest.mark.parametrize("budget", [1, 5, 40, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KEPT)
def test_equals_the_slow_method(name: str, shape: str, budget: int | float) -> None:
    tokens = random_tokens(**SHAPES[shape], length=LENGTH)
    check(Driver(tokens, name, PROMPT, budget=budget), name)


@pytest.mark.parametrize("budget", [4, 12, 24])
@pytest.mark.parametrize("name", KEPT)
def test_a_long_answer_to_a_short_prompt(name: str, budget: int) -> None:
    """The answer decides what stays, not the prompt."""
    tokens = random_tokens(rows=2, pads=(0, 5), length=LENGTH)
    check(Driver(tokens, name, 9, budget=budget), name)


@pytest.mark.parametrize("name", KEPT)
def test_on_the_reference_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refreshkv.cache.store.backend_for", lambda device: REFERENCE)
    check(Driver(random_tokens(rows=2, pads=(0, 7), length=LENGTH), name, PROMPT, budget=12), name)


@pytest.mark.parametrize("attention", ["softcap", "sinks"])
@pytest.mark.parametrize("name", KEPT)
def test_softcap_and_sinks(name: str, attention: str) -> None:
    tokens = random_tokens(rows=2, pads=(0, 7), length=LENGTH)
    check(Driver(tokens, name, PROMPT, options=ATTENTIONS[attention], budget=12), name)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "snapkv-1", "int4-keys", "oracle-topk"])
def test_the_mean_of_a_group(name: str) -> None:
    tokens = random_tokens(rows=2, group=4, pads=(0, 7), length=LENGTH)
    mean, maximum = ({"budget": 40, "group_reduction": r} for r in ("mean", "max"))
    check(Driver(tokens, name, PROMPT, **mean), name)
    found = [Driver(tokens, name, PROMPT, **settings).run(1)[0][1] for settings in (mean, maximum)]
    assert found[0] != found[1]  # or the comparison above could not fail


@pytest.mark.parametrize("budget", [9, 14, 30, 61])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_citrus_in_many_chunks(chunk: int, budget: int) -> None:
    tokens = random_tokens(rows=3, pads=(0, 47, 18), length=LENGTH)
    check(Driver(tokens, "citrus", PROMPT, budget=budget, chunk=chunk, window=8), "citrus")


@pytest.mark.parametrize("budget", [3, 8, 20, 50])
@pytest.mark.parametrize("sub_caches", [1, 2, 6])
def test_sub_caches(sub_caches: int, budget: int) -> None:
    tokens = random_tokens(rows=3, pads=(0, 47, 18), length=LENGTH)
    settings = {"budget": budget, "sub_caches": sub_caches, "decay": 0.8, "sinks": 3}
    check(Driver(tokens, "cascading", PROMPT, **settings), "cascading")


@pytest.mark.parametrize("layer", range(3))
def test_pyramidkv_is_snapkv_with_the_budget_of_its_layer(layer: int) -> None:
    tokens = random_tokens(rows=2, pads=(0, 9), length=LENGTH)
    driver = Driver(tokens, "pyramidkv", PROMPT, budget=40, layer=layer, layers=3)

    def slow(row: Row) -> Any:
        row.budget = layer_budget(40, row.prompt, layer, 3, PyramidKVSettings())
        return snapkv(32)(row)

    check(driver, "pyramidkv", slow)


@pytest.mark.parametrize("layers", [1, 2, 5, 32])
@pytest.mark.parametrize("tokens", [33, 100, 5000])
@pytest.mark.parametrize("budget", [8, 32, 33, 90, 512])
def test_the_pyramid_falls_and_its_mean_is_the_budget(
    budget: int, tokens: int, layers: int
) -> None:
    found = [
        layer_budget(budget, tokens, layer, layers, PyramidKVSettings()) for layer in range(layers)
    ]
    assert sum(found) == layers * budget
    assert found == sorted(found, reverse=True)
    assert min(found) >= min(budget, 32)
    assert found[0] <= max(tokens, budget)
    if budget >= tokens:
        assert set(found) == {budget}


def test_the_pyramid_of_the_paper() -> None:
    """A body of 480 falls from 2 * 480 - 24 to 480 / 20 = 24, on top of the window."""
    found = [layer_budget(512, 16384, layer, 32, PyramidKVSettings()) for layer in range(32)]
    assert (found[0], found[-1]) == (936 + 32, 24 + 32)
    falls = [a - b for a, b in itertools.pairwise(found)]
    assert max(falls) - min(falls) <= 1
    # A prompt of 500 tokens can give the first layer 468 + 32: the surplus goes to the others.
    short = [layer_budget(300, 500, layer, 32, PyramidKVSettings()) for layer in range(32)]
    assert (short[0], short[-1]) == (500, 100)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("twilight", *KIVI)])
def test_a_budget_for_every_token_is_full_attention(name: str, attention: str) -> None:
    tokens = random_tokens(rows=3, pads=(0, 47, 18), length=LENGTH)
    driver = Driver(tokens, name, PROMPT, options=ATTENTIONS[attention], budget=LENGTH)
    for now in range(PROMPT, LENGTH):
        close(driver.step(), full_attention(tokens, now, driver.options))


@pytest.mark.parametrize("budget", [1, 7, 16, 33, 0.25])
@pytest.mark.parametrize("name", [name for name in KEPT if name not in VARYING])
def test_no_step_attends_to_more_than_the_budget_or_to_padding(
    name: str, budget: int | float
) -> None:
    pads = (0, 47, 18)
    tokens = random_tokens(rows=3, pads=pads, length=LENGTH)
    driver = Driver(tokens, name, PROMPT, budget=budget)
    for step, (_, held) in enumerate(driver.run(LENGTH - PROMPT)):
        for row, pad in enumerate(pads):
            most = driver.config.resolve_budget(PROMPT - pad)
            if name == "quest":
                most = -(-most // PAGE) * PAGE
            for positions in held[row]:
                assert len(positions) <= most
                assert min(positions) >= pad
                if name not in ("oracle-topk", "kascade"):
                    assert PROMPT + step in positions


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_its_rows_alone(name: str) -> None:
    pads = (0, 47, 18)
    tokens = random_tokens(rows=3, pads=pads, length=LENGTH)
    outputs = [output for output, _ in Driver(tokens, name, PROMPT, budget=0.4).run(20)]
    for row, pad in enumerate(pads):
        alone = Driver(tokens.alone(row), name, PROMPT - pad, budget=0.4)
        for together, (output, _) in zip(outputs, alone.run(20), strict=True):
            close(together[row], output[0])


@pytest.mark.parametrize("chunk", [1, 7, 32, 59])
@pytest.mark.parametrize("name", METHODS)
def test_the_chunks_of_a_prompt_change_nothing(name: str, chunk: int) -> None:
    tokens = random_tokens(rows=2, pads=(0, 9), length=LENGTH)
    whole = Driver(tokens, name, PROMPT, budget=20)
    chunked = Driver(tokens, name, PROMPT, chunk=chunk, budget=20)
    for (expected, expected_held), (output, held) in zip(
        whole.run(20), chunked.run(20), strict=True
    ):
        close(output, expected)
        assert held == expected_held


def test_h2o_sums_over_the_prompt_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(rows=2, pads=(0, 9), length=LENGTH)
    whole = Driver(tokens, "h2o", PROMPT, budget=20).algorithm.scores
    monkeypatch.setattr("refreshkv.methods.h2o._BLOCK", 7 * 2 * 4 * PROMPT)
    close(Driver(tokens, "h2o", PROMPT, budget=20).algorithm.scores, whole)
    # Every query gives one unit in all: the prompt's visible queries, for each head.
    close(whole.sum(-1), torch.tensor([[60.0] * 4, [51.0] * 4]))


@pytest.mark.parametrize("name", METHODS)
def test_rows_taken_in_mid_text_go_on_as_before(name: str) -> None:
    tokens = random_tokens(rows=3, pads=(0, 47, 18), length=LENGTH)
    for steps_before in (0, 6):
        driver, taken = (Driver(tokens, name, PROMPT, budget=0.3) for _ in range(2))
        driver.run(steps_before)
        taken.run(steps_before)
        rows = torch.tensor([2, 1, 2, 2])
        taken.take_rows(rows)
        taken.stats.reset()
        for (before, _), (after, _) in zip(driver.run(8), taken.run(8), strict=True):
            close(after, before[rows])


@pytest.mark.parametrize("name", EVICTING)
def test_what_would_bring_evicted_entries_back_is_refused(name: str) -> None:
    driver = Driver(random_tokens(length=LENGTH), name, PROMPT, budget=20)
    driver.step()
    with pytest.raises(RuntimeError, match="new cache for every prompt"):
        driver.observe(PROMPT + 1, PROMPT + 5)
    with pytest.raises(RuntimeError, match="cannot take tokens back"):
        driver.crop(PROMPT)


@pytest.mark.parametrize("name", CHOOSING)
def test_a_method_that_evicts_nothing_goes_on_after_a_crop_and_another_prompt(name: str) -> None:
    tokens = random_tokens(rows=2, pads=(0, 9), length=LENGTH)
    settings = {"budget": 20} | ({"window": 9} if name in ("kascade", "squeezed") else {})
    driver = Driver(tokens, name, PROMPT, **settings)
    driver.run(9)
    driver.crop(PROMPT + 3)
    driver.observe(PROMPT + 3, PROMPT + 12)
    once = Driver(tokens, name, PROMPT + 12, **settings)
    for (output, held), (expected, expected_held) in zip(driver.run(6), once.run(6), strict=True):
        close(output, expected)
        assert held == expected_held
    for each in (driver, once):  # and without a prompt in between
        each.crop(PROMPT + 15)
    close(driver.step(), once.step())


@pytest.mark.parametrize("name", [name for name in KEPT if name not in VARYING])
def test_the_oracle_keeps_at_least_the_mass_of_every_other_set(name: str) -> None:
    tokens = random_tokens(rows=2, pads=(0, 9), length=LENGTH)
    other, oracle = (Driver(tokens, n, PROMPT, budget=32) for n in (name, "oracle-topk"))
    for now in range(PROMPT, LENGTH):
        other.step()
        oracle.step()
        seen = tokens.seen(now + 1)
        everything = oracle.options.over(seen[:, None])
        received = oracle.cache.store.score(tokens.queries[:, :, now], everything).scores
        best, mass = ((received * driver.chosen).sum(-1) for driver in (oracle, other))
        assert (best >= mass - 1e-6).all()
        if name not in ("oracle-topk", "quest"):
            assert best.sum() > mass.sum()


@pytest.mark.parametrize("pads", [None, (0, 21)])
def test_quest_bounds_every_product_of_a_page(pads: tuple[int, ...] | None) -> None:
    tokens = random_tokens(rows=2, group=3, pads=pads, length=LENGTH)
    driver = Driver(tokens, "quest", PROMPT, budget=32)
    quest = driver.algorithm
    assert isinstance(quest, Quest)
    for now in range(PROMPT, LENGTH):
        driver.step()
        query = tokens.queries[:, :, now]
        bounds = quest.bounds(query)
        for row, pad in enumerate(pads or (0, 0)):
            keys = tokens.keys[row, :, pad : now + 1].repeat_interleave(3, 0)
            products = (query[row, :, None] * keys).sum(-1)
            pages = products.split(PAGE, -1)
            largest = torch.stack([page.amax(-1) for page in pages], -1)
            assert (bounds[row, :, : len(pages)] >= largest - 1e-5).all()
            assert bounds[row, :, len(pages) :].isinf().all()
            # Exact for a page of one token.
            if pages[-1].shape[-1] == 1:
                close(bounds[row, :, len(pages) - 1], largest[:, -1])


def test_rounded_keys_are_counted() -> None:
    """32 dimensions: 4 bits a component and 32 a token make 160 of an entry's 1,024, rounded up."""
    tokens = random_tokens(rows=2, pads=(0, 21), dim=32, length=LENGTH)
    driver = Driver(tokens, "int4-keys", PROMPT, budget=16)
    driver.run(2)
    expected = [sum(2 * (16 + -(-n * 160 // 1024)) for n in row) for row in ([61, 62], [40, 41])]
    assert [int(driver.stats.row(row).layers[0].read) for row in (0, 1)] == expected


def test_quest_counts_its_bounds() -> None:
    tokens = random_tokens(rows=2, pads=(0, 21), length=LENGTH)
    driver = Driver(tokens, "quest", PROMPT, budget=32)
    driver.run(3)
    # 61 tokens: 4 pages, 13 tokens in the last, which is read with one more. Row 1: 40 tokens, 8 in the last of 3.
    expected = [
        sum(2 * (16 + tail + pages) for tail, pages in row)
        for row in (
            [(13, 4), (14, 4), (15, 4)],
            [(8, 3), (9, 3), (10, 3)],
        )
    ]
    assert [int(driver.stats.row(row).layers[0].read) for row in (0, 1)] == expected


@pytest.mark.parametrize("threshold", [None, 0.1, -0.1, -1.0])
@pytest.mark.parametrize("budget", [1, 2, 24, 70, LENGTH])
def test_token_select_goes_on_with_what_it_chose(budget: int, threshold: float | None) -> None:
    """The cosines of random queries are around 0: some steps choose, at -1 the first alone."""
    pads = (0, 47, 18)
    tokens = random_tokens(rows=3, pads=pads, length=LENGTH)
    first, second = (
        Driver(tokens, "token-select", PROMPT, budget=budget, threshold=threshold) for _ in "12"
    )
    check(first, "token-select")
    for step, (_, held) in enumerate(second.run(LENGTH - PROMPT)):
        for pad, positions in zip(pads, (row[0] for row in held), strict=True):
            assert len(positions) <= budget
            assert positions[-1] == PROMPT + step
            if budget == LENGTH:
                assert positions == list(range(pad, PROMPT + step + 1))


def test_token_select_counts_the_keys_that_it_chose_from() -> None:
    tokens = random_tokens(rows=2, pads=(0, 21), length=LENGTH)
    driver = Driver(tokens, "token-select", PROMPT, budget=21, threshold=-1.0)
    driver.run(3)
    # 2 heads. The first step chooses, among 61 and 40 tokens; half of an entry is its key.
    expected = [2 * (31 + 3 * 21), 2 * (20 + 3 * 21)]
    assert [int(driver.stats.row(row).layers[0].read) for row in (0, 1)] == expected


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("name", ["no-full-attention", "no-reselection"])
def test_the_ablations_equal_the_slow_ones(name: str, threshold: float | None) -> None:
    tokens = random_tokens(rows=3, pads=(0, 47, 18), length=LENGTH)
    driver = Driver(tokens, name, PROMPT, budget=6, stride=3, threshold=threshold)
    outputs = [output for output, _ in driver.run(LENGTH - PROMPT)]
    for row in range(3):
        alone = Row(tokens, row, PROMPT, driver.config, driver.options)
        for head in alone.heads:
            sets = ablation(alone, head, name)
            for now, positions, output in zip(alone.steps, sets, outputs, strict=True):
                close(output[row, alone.members(head)], alone.output(head, now, positions))
    full = driver.stats.full_steps
    assert 0 < full < 3 * 25 // 3 if threshold else full == 3 * (25 // 3)


@pytest.mark.parametrize("name", ["no-full-attention", "no-reselection"])
def test_an_ablation_goes_on_after_a_crop(name: str) -> None:
    tokens = random_tokens(length=LENGTH)
    driver = Driver(tokens, name, PROMPT, budget=6, stride=3, threshold=None)
    driver.run(4)
    driver.algorithm.crop(PROMPT + 2)
    driver.cache.crop(PROMPT + 2)
    after = driver.step()
    full = full_attention(tokens, PROMPT + 2, driver.options)
    assert torch.allclose(after, full, atol=1e-5) is (name == "no-reselection")
    driver.run(3)
    assert driver.stats.full_steps == 3  # the third step, the one after the crop, and three later


def test_twilight_keeps_the_share_and_not_one_token_more_than_it_needs() -> None:
    tokens = random_tokens(group=1, length=LENGTH)
    few, many = (
        Driver(tokens, "twilight", PROMPT, budget=5, share=share).run(3) for share in (0.2, 0.95)
    )
    for (_, least), (_, most) in zip(few, many, strict=True):
        for row, other in zip(least, most, strict=True):
            assert all(
                set(a) <= set(b) and len(a) < len(b) for a, b in zip(row, other, strict=True)
            )


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_attends_to_nothing_but_codes_and_the_newest_tokens(bits: int) -> None:
    """130 tokens: the last step sees two blocks by their codes, and two tokens as they are."""
    tokens = random_tokens(rows=2, length=130)
    driver = Driver(tokens, f"kivi-{bits}", 120, budget=20)
    outputs = [driver.step() for _ in range(10)]
    keys, values = tokens.keys.clone(), tokens.values.clone()
    for block in (slice(0, 64), slice(64, 128)):
        for part in (keys, values):
            part[:, :, block] = restored(round_block(part[:, :, block], bits))
    expected = full_attention(replace(tokens, keys=keys, values=values), 129, driver.options)
    torch.testing.assert_close(outputs[-1], expected, rtol=2e-2, atol=2e-3)
    exact = full_attention(tokens, 129, driver.options)
    assert (outputs[-1] - exact).abs().max() > 4 * (outputs[-1] - expected).abs().max()
