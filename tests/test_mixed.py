"""One layer in mixed steps: a slow definition, full attention, and histories that change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.paged import PagedStore
from refreshkv.config import RefreshConfig
from refreshkv.kernels.options import AttendOptions
from refreshkv.policy.rounding import BLOCK, restored, round_block
from refreshkv.stats import RowStats
from refreshkv.step import decode_step
from tests.helpers import Decoder, Tokens, random_tokens, relative_rms
from tests.slow import slow_worth
from tests.test_step import ATTENTIONS, backend  # noqa: F401 (every test here runs on both backends)

PROMPT, STEPS = 150, 12
PADS = (0, 80, 33)
MIXED = RefreshConfig(mode="mixed", budget=6)
PLAIN = AttendOptions(scale=0.5)
# Of the keys or the values of a block: two bits a number, where 16 dims take the room of 32, and 16 bits a dim.
HALF_BYTES = 64 * 32 * 2 // 8 + 16 * 2
EVERY = {"plain": PLAIN, **ATTENTIONS}


def texts(group: int = 2, pads: tuple[int, ...] = PADS, length: int = PROMPT + STEPS) -> Tokens:
    """Queries that point at some keys, so that weights differ."""
    tokens = random_tokens(length=length, rows=len(pads), group=group, pads=pads, seed=7)
    tokens.queries *= 2.0
    return tokens


def decoder(config: RefreshConfig = MIXED, tokens: Tokens | None = None, **options: Any) -> Decoder:
    return Decoder(tokens or texts(), config, PROMPT, **{"options": PLAIN, **options})


def check_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def slow_step(
    tokens: Tokens, row: int, head: int, now: int, options: AttendOptions, config: RefreshConfig
) -> Tensor:
    """`[G, D]`: the step at position `now`, one KV head of one row, without any of our kernels."""
    first = 0 if tokens.visible is None else int(tokens.visible[row].int().argmax())
    group = slice(head * tokens.group, (head + 1) * tokens.group)
    queries = tokens.queries[row, group, now]
    keys, values = (x[row, head, first : now + 1] for x in (tokens.keys, tokens.values))
    rough_keys, rough_values = keys.clone(), values.clone()
    covered = (now - first) // BLOCK * BLOCK
    blocks = [slice(at, at + BLOCK) for at in range(0, covered, BLOCK)]
    for block in blocks:
        rough_keys[block] = restored(round_block(keys[block], 2))
        rough_values[block] = restored(round_block(values[block], 2))

    def logits_of(keys: Tensor) -> Tensor:
        logits = queries @ keys.T * options.scale
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        if options.sinks is None:
            return logits
        return torch.cat([logits, options.sinks[group, None]], 1)

    weights = logits_of(rough_keys).log_softmax(1)[:, : len(keys)]
    assert isinstance(config.budget, int)
    worth = slow_worth(weights[:, :covered].amax(0).tolist(), config.budget)
    rough_keys[worth], rough_values[worth] = keys[worth], values[worth]
    logits = logits_of(rough_keys)
    left = weights.exp()
    left[:, worth] = 0
    for block in blocks:
        if float(left[:, block].sum(1).max()) < config.skip / len(blocks):
            unread = [i for i in range(block.start, block.stop) if i not in worth]
            logits[:, unread] = -math.inf
    return logits.softmax(1)[:, : len(keys)] @ rough_values


@pytest.mark.parametrize("skip", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("name", EVERY)
def test_a_step_is_its_definition(name: str, skip: float) -> None:
    tokens, options, config = texts(), EVERY[name], replace(MIXED, skip=skip)
    run = decoder(config, tokens, options=options)
    for now in range(PROMPT, PROMPT + 3):
        output = run.step().output
        for row in range(3):
            for head in range(2):
                expected = slow_step(tokens, row, head, now, options, config)
                check_close(output[row, 2 * head : 2 * head + 2], expected)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", EVERY)
def test_a_budget_of_everything_is_full_attention(name: str, group: int) -> None:
    options = EVERY[name]
    if options.sinks is not None:
        options = replace(options, sinks=torch.linspace(-2.0, 7.0, 2 * group))
    run = decoder(replace(MIXED, budget=1000), texts(group), options=options)
    for step in run.run(STEPS):
        check_close(step.output, step.full)
    assert run.cache.copy is not None and run.cache.copy.finished.tolist() == [2, 1, 2]


def test_more_bits_come_closer_and_six_are_close() -> None:
    """As does a larger budget: at two bits and K = 6 it is an approximation."""
    errors = {}
    for bits in (2, 4, 6):
        for budget in (1, 24):
            config = replace(MIXED, budget=budget, key_bits=bits, value_bits=bits, skip=0.0)
            steps = decoder(config).run(4)
            errors[bits, budget] = max(relative_rms(step.output, step.full) for step in steps)
    assert errors[6, 1] < 0.15 < errors[4, 1] < 0.3 < errors[2, 1]
    for bits in (2, 4, 6):
        assert errors[bits, 24] < 0.2 * errors[bits, 1]


@pytest.mark.parametrize("prompt", [40, 63, 68])
def test_before_a_block_is_complete_it_is_full_attention(prompt: int) -> None:
    """The token that completes one is exact too, and with it all of the block."""
    tokens = texts(pads=(0, 5), length=75)
    run = Decoder(tokens, replace(MIXED, budget=1), prompt, options=PLAIN)
    for now in range(prompt, 75):
        step = run.step()
        for row, pad in enumerate((0, 5)):
            exact = now - pad < BLOCK
            assert torch.allclose(step.output[row], step.full[row], atol=2e-6) == exact


@pytest.mark.parametrize("config", [MIXED, replace(MIXED, budget=0.1)], ids=["tokens", "share"])
def test_a_batch_is_its_rows_alone(config: RefreshConfig) -> None:
    tokens = texts()
    together = decoder(config, tokens).run(STEPS)
    for row, pad in enumerate(PADS):
        alone = Decoder(tokens.alone(row), config, PROMPT - pad, options=PLAIN)
        for ours, theirs in zip(alone.run(STEPS), together, strict=True):
            check_close(ours.output[0], theirs.output[row])


def in_chunks(run: Decoder) -> None:
    """The prompt once more, in pieces, on a cache that was used before."""
    run.cache.reset()
    tokens = run.tokens
    for begin, end in ((0, 1), (1, 90), (90, 149), (149, PROMPT)):
        run.cache.append(tokens.keys[:, :, begin:end], tokens.values[:, :, begin:end])
        run.cache.await_selection(tokens.queries[:, :, begin:end])


def in_turns(run: Decoder) -> None:
    """A shorter prompt, an answer, and the rest as the next prompt."""
    run.cache.reset()
    tokens = run.tokens
    for begin, end in ((0, 100), (108, PROMPT)):
        run.cache.append(tokens.keys[:, :, begin:end], tokens.values[:, :, begin:end])
        run.cache.await_selection(tokens.queries[:, :, begin:end])
        if not begin:
            run.run(8)


def cropped(run: Decoder) -> None:
    """Another continuation, of which nothing remains."""
    run.run(4)
    junk = random_tokens(length=90, rows=3, seed=8)
    for now in range(90):
        run.cache.append(junk.keys[:, :, now : now + 1], junk.values[:, :, now : now + 1])
        seen = torch.nn.functional.pad(run.tokens.seen(PROMPT), (0, now + 5), value=True)
        decode_step(run.cache, junk.queries[:, :, now], PLAIN, seen)
    run.cache.crop(PROMPT)


def cropped_into_the_prompt(run: Decoder) -> None:
    """And what is lost of it comes as another prompt."""
    run.run(4)
    run.cache.crop(120)
    tokens = run.tokens
    run.cache.append(tokens.keys[:, :, 120:PROMPT], tokens.values[:, :, 120:PROMPT])
    run.cache.await_selection(tokens.queries[:, :, 120:PROMPT])


def taken_elsewhere_and_back(run: Decoder) -> None:
    """As beams take rows, after steps that made codes; then all of it is taken back."""
    run.run(3)
    run.cache.take_rows(torch.tensor([2, 0, 1, 1]))
    run.cache.take_rows(torch.tensor([1, 3, 0]))
    run.cache.crop(PROMPT)


def continued_by_a_copy(run: Decoder) -> None:
    run.step()
    twin = copy.deepcopy(run.cache)
    run.run(STEPS - 2)
    run.cache.crop(10)
    run.cache = twin
    run.cache.crop(PROMPT)


HISTORIES = (
    in_chunks,
    in_turns,
    cropped,
    cropped_into_the_prompt,
    taken_elsewhere_and_back,
    continued_by_a_copy,
)


@pytest.mark.parametrize("history", HISTORIES)
def test_what_happened_before_changes_nothing(history: Callable[[Decoder], None]) -> None:
    fresh, run = decoder(), decoder()
    history(run)
    assert run.cache.length == PROMPT
    for ours, theirs in zip(run.run(STEPS), fresh.run(STEPS), strict=True):
        check_close(ours.output, theirs.output)
        assert relative_rms(ours.output, ours.full) > 0.02  # by codes, indeed


def test_rows_go_on_from_the_row_they_were() -> None:
    rows = torch.tensor([2, 0, 0])
    run, fresh = decoder(), decoder(tokens=texts().rows(rows))
    run.run(4)
    fresh.run(4)
    run.cache.take_rows(rows)
    run.tokens = fresh.tokens
    for ours, theirs in zip(run.run(STEPS - 4), fresh.run(STEPS - 4), strict=True):
        check_close(ours.output, theirs.output)


def test_a_share_is_one_of_the_prompt_before_it() -> None:
    run = decoder(replace(MIXED, budget=0.1))
    run.step()
    assert run.cache.budget is not None and run.cache.budget.tolist() == [15, 7, 12]
    run.run(5)
    run.cache.await_selection(run.tokens.queries[:, :, :1])
    run.step()  # it is in the store before the step asks how long the prompt was
    assert run.cache.budget.tolist() == [16, 8, 13]


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_padding_and_other_rows_never_leak(poison: float) -> None:
    clean, dirty = texts(), texts()
    assert dirty.visible is not None
    for part in (dirty.queries, dirty.keys, dirty.values):
        part[:2].masked_fill_(~dirty.visible[:2, None, :, None], poison)
        part[2, :, PROMPT - 40 :] = poison
    for ours, theirs in zip(
        decoder(tokens=dirty).run(4), decoder(tokens=clean).run(4), strict=True
    ):
        check_close(ours.output[:2], theirs.output[:2])


def test_pages_give_what_rows_give() -> None:
    tokens, run = texts(), decoder()
    paged = LayerCache(MIXED, store=PagedStore(24))
    paged.append(tokens.keys[:, :, :PROMPT], tokens.values[:, :, :PROMPT])
    paged.await_selection(tokens.queries[:, :, :PROMPT])
    for now in range(PROMPT, PROMPT + STEPS):
        paged.append(tokens.keys[:, :, now : now + 1], tokens.values[:, :, now : now + 1])
        seen = torch.nn.functional.pad(tokens.seen(now + 1), (0, paged.length - now - 1))
        check_close(decode_step(paged, tokens.queries[:, :, now], PLAIN, seen), run.step().output)
    ours, theirs = (cache.stats.layers[0] for cache in (paged, run.cache))
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize("skip", [0.0, 0.02, 0.3, 1.0])
def test_what_is_left_out_has_no_more_weight_than_it_may(skip: float) -> None:
    """Where no entry is exact: the weights that count are those which the rounded keys give."""
    run = decoder()
    run.step()
    cache, query = run.cache, run.tokens.queries[:, :, PROMPT]
    visible = run.tokens.seen(PROMPT + 1)
    assert cache.copy is not None and cache.copy.codes is not None and visible is not None
    rows = {
        "first": cache.copy.first,
        "finished": cache.copy.finished,
        "budget": torch.zeros(3, dtype=torch.int64),
    }
    options = PLAIN.over(visible[:, None])
    whole, counts = torch.zeros(2, 3, 2, 2, dtype=torch.int64)
    every, some = (
        cache.store.attend_mixed(query, cache.copy.codes, options, **rows, skip=share, tally=tally)
        for share, tally in ((0.0, whole), (skip, counts))
    )
    left_out = 1 - (some.lse - every.lse).exp()
    assert float(left_out.min()) > -1e-5 and float(left_out.max()) <= skip + 1e-5
    of_keys, of_values = cache.copy.codes.block_bytes
    blocks = cache.copy.finished[:, None].expand(-1, 2)
    assert torch.equal(whole[..., 1], blocks * (of_keys + of_values))
    unread = (whole - counts)[..., 1] // of_values
    assert bool((unread.repeat_interleave(2, 1)[left_out > 1e-5] > 0).all())
    assert int(unread.sum()) >= {0.0: 0, 0.02: 0, 0.3: 1, 1.0: 4}[skip]


HEADS = {
    "flat": lambda keys: keys.zero_(),
    "two alike a block": lambda keys: keys[:, :, 2::32].fill_(3.0),
    "one huge": lambda keys: keys[:, :, 50].fill_(1e4),
    "all NaN": lambda keys: keys.fill_(math.nan),
    "as they come": lambda keys: keys,
}


@pytest.mark.parametrize("name", HEADS)
def test_no_head_makes_a_step_read_more_than_k_exactly(name: str) -> None:
    tokens = texts()
    HEADS[name](tokens.keys[:, :, :PROMPT])
    stats = RowStats()
    run = decoder(tokens=tokens)
    run.cache.stats = stats
    for now in range(PROMPT, PROMPT + STEPS):
        run.step()
        for row, pad in enumerate(PADS):
            found, uncovered = stats.row(row).layers[0], (now - pad) % BLOCK + 1
            assert 2 * uncovered <= int(found.read) <= 2 * (uncovered + 6)
            keys = (now - pad) // BLOCK * 2 * HALF_BYTES
            assert keys <= int(found.rounded) <= 2 * keys  # and the values of some blocks
        stats.reset()


def test_what_a_step_reads() -> None:
    """By hand, in two KV heads of 16 dims in float32; five entries have all the weight, K is 6."""
    tokens, stats = texts(), RowStats()
    tokens.queries.abs_()
    tokens.keys[:, :, 90:94] = 9.0
    tokens.keys[:, :, 10] = 9.0  # padding, or not
    tokens.keys[1:, :, 95] = 9.0
    run = decoder(tokens=tokens)
    run.cache.stats = stats
    run.run(STEPS)
    totals = dict.fromkeys(("full", "steps", "read", "rounded", "available"), 0)
    for row, pad in enumerate(PADS):
        layer = stats.row(row).layers[0]
        ends = range(PROMPT + 1 - pad, PROMPT + STEPS + 1 - pad)
        blocks = [(end - 1) // BLOCK for end in ends]
        assert (layer.entry_bytes, layer.full, layer.steps) == (128, 0, 2 * STEPS)
        assert layer.rounded == 2 * HALF_BYTES * sum(blocks)  # of keys: no block has weight left
        assert layer.available == 2 * sum(ends)
        exact = 2 * STEPS * 5
        assert layer.read == exact + 2 * sum(
            e - BLOCK * n for e, n in zip(ends, blocks, strict=True)
        )
        share = (layer.read * 128 + layer.rounded) / (layer.available * 128)
        assert stats.row(row).kv_read_share == share
        for name in totals:
            totals[name] += getattr(layer, name)
    assert {name: int(getattr(stats.layers[0], name)) for name in totals} == totals
