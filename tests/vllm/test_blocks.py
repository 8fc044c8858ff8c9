"""Codes belong to a block: shared by prefix hits, alive through chunks and preemption, never of its last owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from refreshkv.hosts.vllm.decoding import Mixed
from tests.vllm.engines import (
    BLOCK,
    Answer,
    Engine,
    Prompt,
    Stock,
    assert_same,
    distance,
    prompt,
    ragged,
)

EXACT = {"mode": "mixed", "budget": 2048}
MIXED = {"mode": "mixed", "budget": 64}
REFRESH = {"mode": "refresh", "budget": 64, "stride": 5}


def suffixed() -> list[Prompt]:
    """A long beginning with ends of their own, the longest a multiple of the block; and the beginning alone."""
    shared = prompt(10 * BLOCK, 1)
    ends = [prompt(length, seed)[1:] for seed, length in enumerate((20, 65, 101, 129), start=5)]
    return [*(shared + end for end in ends), shared]


def fresh(
    settings: dict[str, Any], prompts: Sequence[Prompt], new: int = 40, **options: Any
) -> list[Answer]:
    """From an engine that has seen nothing and shares nothing, one request after the other."""
    with Engine(settings, enable_prefix_caching=False, **options) as engine:
        return engine.alone(prompts, new)


def test_prefix_hits_find_the_codes() -> None:
    prompts = suffixed()
    with Engine(MIXED) as engine:
        engine.generate(prompts[:1])
        found = engine.generate(prompts)
    assert [one.cached // BLOCK for one in found] == [10, 10, 10, 10, 9]
    assert_same(found, fresh(MIXED, prompts))


@pytest.mark.parametrize("settings", [EXACT, {"mode": "refresh", "budget": 2048}], ids=str)
def test_prefix_hits_are_stock(settings: dict[str, Any], stock: Stock) -> None:
    prompts = suffixed()
    with Engine(settings) as engine:
        engine.generate(prompts[:1])
        found = engine.generate(prompts)
    assert all(one.cached for one in found)
    assert_same(found, stock.generate(prompts))


@pytest.mark.parametrize("settings", [MIXED, REFRESH], ids=str)
@pytest.mark.parametrize("tokens", [100, 192])
def test_a_prompt_in_chunks_is_the_whole_one(settings: dict[str, Any], tokens: int) -> None:
    prompts = ragged()
    with Engine(settings, max_num_batched_tokens=tokens, enable_prefix_caching=False) as engine:
        found = engine.generate(prompts)
    assert_same(found, fresh(settings, prompts, max_num_batched_tokens=4096))


def preempted(
    settings: dict[str, Any], prompts: list[Prompt], new: int
) -> tuple[list[Answer], Any, int]:
    """Answers of a cache that is too small for all of them at once, what was counted, and preemptions."""
    times = 0
    with Engine(settings, num_gpu_blocks_override=36, enable_prefix_caching=False) as engine:
        scheduler = engine.scheduler
        preempt = scheduler._preempt_request

        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal times
            times += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = count
        found = engine.generate(prompts, new)
        counts = engine.counts()
        assert engine.free_blocks == 35  # and the one that vLLM keeps empty
    assert times > 0
    return found, counts, times


@pytest.mark.parametrize("settings", [EXACT, {"mode": "refresh", "budget": 2048}], ids=str)
def test_preempted_requests_are_stock(settings: dict[str, Any], stock: Stock) -> None:
    prompts = ragged((300, 310, 320, 330, 340, 350))
    found, *_ = preempted(settings, prompts, 150)
    assert_same(found, stock.generate(prompts, 150))


def test_preempted_requests_find_or_make_codes() -> None:
    prompts, new = ragged((300, 310, 320, 330, 340, 350)), 150
    found, counts, times = preempted(MIXED, prompts, new)
    expected = fresh(MIXED, prompts, new)
    assert (
        counts.rows == len(prompts) * (new - 1) - times
    )  # to the engine a resumed row is a prompt
    # Not bit by bit: the tokens of before are computed again, with full attention.
    assert_same(found, expected, within=5e-3)


def test_preempted_requests_select_anew() -> None:
    prompts, new = ragged((300, 310, 320, 330, 340, 350)), 150
    _, counts, times = preempted(REFRESH, prompts, new)
    assert counts.rows == counts.partial == len(prompts) * (new - 1) - times
    assert counts.lost == 0


def after_aborts(later: list[Prompt], **options: Any) -> list[Answer]:
    """Answers in blocks that held something else: a full cache whose requests were aborted in mid-generation."""
    with Engine(MIXED, num_gpu_blocks_override=36, **options) as engine:
        names = [engine.begin(prompt(900, seed), 200) for seed in (20, 21)]
        engine.step(40)
        assert engine.free_blocks < 6
        engine.abort(*names)
        engine.step()
        assert engine.free_blocks == 35
        return engine.generate(later)


@pytest.mark.parametrize("caching", [False, True])
def test_reused_blocks_have_codes_of_their_own(caching: bool) -> None:
    later = ragged((1000, 1030))
    found = after_aborts(later, enable_prefix_caching=caching)
    assert_same(found, fresh(MIXED, later))


def test_codes_of_the_last_owner_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    later = ragged((1000, 1030))
    expected = fresh(MIXED, later)
    learn, written = Mixed.learn, set()

    def once(self: Mixed, pages: Any, step: Any, query: Any) -> None:
        """As a plugin would that takes a block with codes for one that needs none."""
        new = [] if step.fresh is None else step.fresh.blocks.unique().tolist()
        if not {(id(self), block) for block in new} & written:
            learn(self, pages, step, query)
        written.update((id(self), block) for block in new)

    monkeypatch.setattr(Mixed, "learn", once)
    found = after_aborts(later, enable_prefix_caching=False)
    assert max(map(distance, found, expected)) > 1e-3
