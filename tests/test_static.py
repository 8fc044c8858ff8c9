"""The static form of the cache decodes as the growing one does, compiled too, and never moves."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.static import StaticStore
from refreshkv.config import RefreshConfig, make_config
from refreshkv.kernels.options import AttendOptions
from refreshkv.policy.triggers import trigger_for
from refreshkv.stats import RowStats
from refreshkv.step import begin_decoding, decode_step
from tests.helpers import Decoder, Tokens, random_tokens
from tests.test_step import ATTENTIONS, CONFIGS, OPTIONS

PROMPT, STEPS, SPARE = 24, 14, 7
EVERY = {
    **CONFIGS,
    **OPTIONS,
    "full": RefreshConfig(mode="full"),
    "score only": replace(CONFIGS["drift of a head"], score_only=True),
    "lse-drop": make_config("lse-drop", budget=8),
}


class StaticDecoder(Decoder):
    """As `Decoder`, with a cache of the fixed form."""

    def __init__(
        self,
        tokens: Tokens,
        config: RefreshConfig,
        prompt: int,
        options: AttendOptions | None = None,
    ) -> None:
        super().__init__(tokens, config, prompt, options=options)
        grown, (rows, heads, length, dim) = self.cache, tokens.keys.shape
        keys, values = (torch.zeros(rows, heads, length + SPARE, dim) for _ in range(2))
        store = StaticStore(keys, values, torch.zeros(rows, dtype=torch.int64))
        self.cache = LayerCache(config, store=store, fixed=True)
        self.cache.append(*grown.store.dense())
        self.cache.await_selection(tokens.queries[:, :, :prompt])
        begin_decoding(self.cache, self.options, self.mask(prompt))
        self.run_step: Callable[..., Tensor] = decode_step

    def next(self) -> Tensor:
        """One step, with the mask of a host whose cache does not grow."""
        now, tokens = int(self.cache.store.lengths[0]), self.tokens
        new = (x[:, :, now : now + 1] for x in (tokens.keys, tokens.values))
        self.cache.append(*new, decodes=True)
        query = tokens.queries[:, :, now]
        return self.run_step(self.cache, query, self.options, self.mask(now + 1))

    def mask(self, length: int) -> Tensor:
        """That of such a host, over all positions."""
        visible = torch.arange(self.cache.length) < length
        if self.tokens.visible is None:
            return visible.expand(self.cache.rows, -1)
        return visible & torch.nn.functional.pad(self.tokens.visible, (0, SPARE), value=True)


def texts(pads: tuple[int, ...] = (0, 9, 4)) -> Tokens:
    return random_tokens(length=PROMPT + STEPS, rows=3, group=2, pads=pads)


@pytest.mark.parametrize("name", EVERY)
def test_it_decodes_as_the_growing_cache_does(name: str) -> None:
    grown = Decoder(texts(), EVERY[name], PROMPT)
    static = StaticDecoder(texts(), EVERY[name], PROMPT)
    for _ in range(STEPS):
        torch.testing.assert_close(static.next(), grown.step().output, atol=2e-6, rtol=1e-5)
    assert_same_counts(static.cache, grown.cache)


@pytest.mark.parametrize("name", [name for name in EVERY if "drop" not in name])
def test_a_host_that_knows_the_schedule_changes_nothing(name: str) -> None:
    grown = Decoder(texts(), EVERY[name], PROMPT)
    static = StaticDecoder(texts(), EVERY[name], PROMPT)
    kinds = set()
    for step in range(1, STEPS + 1):
        static.cache.due = static.cache.trigger.kind(step)
        kinds.add(static.cache.due)
        torch.testing.assert_close(static.next(), grown.step().output, atol=2e-6, rtol=1e-5)
    assert_same_counts(static.cache, grown.cache)
    assert (kinds == {None}) == (name == "every option")


def test_what_a_step_will_be() -> None:
    def kinds(config: RefreshConfig) -> list[str | None]:
        return [trigger_for(config).kind(step) for step in range(1, 5)]

    assert kinds(CONFIGS["never"]) == ["partial"] * 4
    assert kinds(CONFIGS["fixed"]) == ["partial"] * 3 + ["full"]
    assert kinds(CONFIGS["drift of a head"]) == ["partial", "decide"] * 2
    assert kinds(EVERY["lse-drop"]) == [None] * 4


def test_counts_outlive_the_cache_and_a_reset_forgets_them() -> None:
    static = StaticDecoder(texts(), EVERY["fixed"], PROMPT)
    stats = static.cache.stats
    for _ in range(5):
        static.next()
    tally = static.cache.tally
    assert tally is not None and tally.any()
    assert stats.layers[0].steps == 5 * 3 * 2
    assert not tally.any()
    static.next()
    stats.reset()
    assert not stats.layers and not tally.any()
    static.next()
    del static
    gc.collect()
    tally.mul_(2)  # whatever adds to it later
    assert stats.layers[0].steps == 2 * 3 * 2
    tally += 1
    assert stats.layers[0].steps == 2 * 3 * 2


@pytest.mark.parametrize("name", ATTENTIONS)
def test_with_softcap_and_sinks(name: str) -> None:
    config, attention = EVERY["every option"], ATTENTIONS[name]
    grown = Decoder(texts(), config, PROMPT, options=attention)
    static = StaticDecoder(texts(), config, PROMPT, options=attention)
    for _ in range(STEPS):
        torch.testing.assert_close(static.next(), grown.step().output, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["every option", "drift of a head", "lse-drop", "full", "score only"]
)
def test_compiled_it_is_one_graph_that_is_never_made_again(name: str) -> None:
    torch._dynamo.reset()
    grown = Decoder(texts(), EVERY[name], PROMPT)
    static = StaticDecoder(texts(), EVERY[name], PROMPT)
    counter = torch._dynamo.testing.CompileCounter()
    static.run_step = torch.compile(decode_step, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(STEPS):
        torch.testing.assert_close(static.next(), grown.step().output, atol=2e-6, rtol=1e-5)
    assert counter.frame_count == 1
    assert_same_counts(static.cache, grown.cache)


@pytest.mark.parametrize("name", ["every option", "drift of the layer"])
def test_its_tensors_stay_where_they_are(name: str) -> None:
    static = StaticDecoder(texts(), EVERY[name], PROMPT)
    before = {id(part): part.data_ptr() for part in static.cache.tensors()}
    static.next()
    for _ in range(STEPS - 1):
        static.next()
    assert {id(part): part.data_ptr() for part in static.cache.tensors()} == before


def test_a_second_prompt_starts_over() -> None:
    static = StaticDecoder(texts(), EVERY["every option"], PROMPT)
    for _ in range(STEPS):
        static.next()
    before = [part.data_ptr() for part in static.cache.tensors()]
    static.cache.reset()
    other = random_tokens(length=PROMPT + STEPS, rows=3, group=2, seed=5)
    grown = Decoder(other, EVERY["every option"], PROMPT)
    static.tokens = other
    static.cache.append(other.keys[:, :, :PROMPT], other.values[:, :, :PROMPT])
    static.cache.await_selection(other.queries[:, :, :PROMPT])
    begin_decoding(static.cache, static.options, static.mask(PROMPT))
    for _ in range(STEPS):
        torch.testing.assert_close(static.next(), grown.step().output, atol=2e-6, rtol=1e-5)
    assert [part.data_ptr() for part in static.cache.tensors()] == before


def test_rows_can_change_places() -> None:
    rows = torch.tensor([2, 0, 0])
    grown = Decoder(texts(), EVERY["every option"], PROMPT)
    static = StaticDecoder(texts(), EVERY["every option"], PROMPT)
    for decoder in (grown, static):
        for _ in range(4):
            decoder.step() if decoder is grown else static.next()
        decoder.cache.take_rows(rows)
        decoder.tokens = decoder.tokens.rows(rows)
    for _ in range(STEPS - 4):
        torch.testing.assert_close(static.next(), grown.step().output, atol=2e-6, rtol=1e-5)


def test_what_it_cannot_do_it_says() -> None:
    static = StaticDecoder(texts(), EVERY["lse-drop"], PROMPT)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        static.cache.crop(3)
    keys = torch.zeros(1, 1, 4, 8)
    store = StaticStore(keys, keys.clone(), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="RowStats"):
        LayerCache(RefreshConfig(), store=store, fixed=True, stats=RowStats())


def test_a_budget_in_tokens_is_its_number_of_slots() -> None:
    static = StaticDecoder(texts(), replace(EVERY["lse-drop"], budget=5), PROMPT)
    assert static.cache.ring is not None
    assert static.cache.ring.positions.shape[2] == 5


def assert_same_counts(static: LayerCache, grown: LayerCache) -> None:
    for name in ("full", "steps", "read", "available"):
        ours, theirs = (int(getattr(c.stats.layers[0], name)) for c in (static, grown))
        assert ours == theirs, name
