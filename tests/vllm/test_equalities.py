"""Where nothing is left out the tokens are those of stock vLLM, and rows of a batch do not know each other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.engines import Elsewhere, Engine, Stock, assert_same, counted, distance, ragged

NEW = 40
MIXED = {"mode": "mixed", "budget": 64}
REFRESH = {"mode": "refresh", "budget": 64, "stride": 5}
FIXED = REFRESH | {"threshold": None}


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "mixed", "budget": 2048},
        {"mode": "mixed", "budget": 1.0},
        {"mode": "full"},
        {"mode": "refresh", "budget": 2048},
        FIXED | {"stride": 1},
    ],
    ids=str,
)
def test_whoever_reads_everything_is_stock(settings: dict[str, Any], stock: Stock) -> None:
    prompts = ragged()
    with Engine(settings) as engine:
        assert_same(engine.generate(prompts, NEW), stock.generate(prompts, NEW))
        counts = engine.counts()
    assert counts.rows == len(prompts) * (
        NEW - 1
    )  # our path ran: the first token comes of the prompt
    assert counts.read == counts.available > 0


@pytest.mark.parametrize(
    "settings", [{"mode": "mixed", "budget": 2048}, FIXED | {"stride": 1}], ids=str
)
def test_steps_for_a_graph_are_stock(settings: dict[str, Any], stock: Stock) -> None:
    """Told in the same tensors each time; here run without one."""
    prompts = ragged()
    with Engine(settings) as engine:
        engine.hold()
        assert_same(engine.generate(prompts, NEW), stock.generate(prompts, NEW))
        assert engine.counts().rows == len(prompts) * (NEW - 1)


@pytest.mark.parametrize("settings", [MIXED, REFRESH], ids=str)
def test_steps_for_a_graph_are_as_others(settings: dict[str, Any]) -> None:
    """Of requests that come and go; while more run than it is for they are told as without a graph."""
    prompts, answers = ragged(), []
    new = [NEW + 5 * number for number in range(len(prompts))]
    for held in (False, True):
        with Engine(settings, enable_prefix_caching=False) as engine:
            if held:
                engine.hold(6)
            answers.append(engine.come_and_go(prompts, new))
            counts = engine.counts()
            assert counts.rows == sum(new) - len(new) and counts.lost == 0
            assert 0 < counts.read < counts.available
    assert_same(*answers)


@pytest.mark.parametrize("settings", [MIXED, REFRESH, FIXED | {"stagger": False}], ids=str)
def test_a_batch_is_its_requests_alone(settings: dict[str, Any], stock: Stock) -> None:
    prompts = ragged()
    with Engine(settings, enable_prefix_caching=False) as engine:
        together = engine.generate(prompts, NEW)
        counts = engine.counts()
        assert_same(together, engine.alone(prompts, NEW))
    assert counts.rows == len(prompts) * (NEW - 1) and counts.lost == 0
    assert 0 < counts.read < counts.available
    far = map(distance, together, stock.generate(prompts, NEW))
    assert (
        max(far) > 1e-3
    )  # the comparison would see another row's entries: it sees those that were left out


def test_a_share_is_taken_of_each_row() -> None:
    prompts = ragged((200, 400, 800))
    with Engine({"mode": "mixed", "budget": 0.25}, enable_prefix_caching=False) as engine:
        together = engine.generate(prompts, NEW)
        counts = engine.counts()
        assert_same(together, engine.alone(prompts, NEW))
    assert counts.read < 0.5 * counts.available


def test_speculation_by_ngram_is_stock(stock: Stock) -> None:
    prompts, new = ragged((300, 65, 700)), 60
    expected = stock.generate(prompts, new)
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 8,
        "prompt_lookup_max": 8,
    }
    for settings in ({"mode": "mixed", "budget": 2048}, {"mode": "refresh", "budget": 2048}):
        # In a process of its own: after numba, which it imports, no further engine starts in the same one.
        with Elsewhere({"REFRESHKV_VLLM_CPU": "1"}) as elsewhere:
            found, counts = elsewhere.run(
                counted, settings, prompts, new, speculative_config=speculation
            )
        assert_same(found, expected)
        # Steps without drafts are ours; those that verify some are prompts of a few tokens to the engine.
        assert 0 < counts.rows < len(prompts) * (new - 1)
