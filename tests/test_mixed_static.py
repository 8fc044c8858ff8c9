"""Mixed steps of the static form: those of the growing one, in one graph, and nothing ever moves."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from refreshkv.config import RefreshConfig
from refreshkv.step import begin_decoding, decode_step
from tests.helpers import Decoder, Tokens, random_tokens
from tests.test_mixed import EVERY, MIXED, PLAIN, PROMPT, check_close, texts
from tests.test_static import StaticDecoder

STEPS = 70  # every row completes a block


def long_texts() -> Tokens:
    return texts(length=PROMPT + STEPS)


def pair(config: RefreshConfig = MIXED, name: str = "plain") -> tuple[Decoder, StaticDecoder]:
    made = (
        kind(long_texts(), config, PROMPT, options=EVERY[name]) for kind in (Decoder, StaticDecoder)
    )
    grown, static = made
    assert isinstance(static, StaticDecoder)
    return grown, static


def check_alike(static: StaticDecoder, grown: Decoder, steps: int) -> None:
    for _ in range(steps):
        check_close(static.next(), grown.step().output)


def check_same_copy(static: StaticDecoder, grown: Decoder) -> None:
    """Codes, bit for bit, and counts."""
    ours, theirs = static.cache.copy, grown.cache.copy
    assert ours is not None and theirs is not None
    assert ours.finished is not None and theirs.finished is not None
    assert torch.equal(ours.finished, theirs.finished)
    assert ours.codes is not None and theirs.codes is not None
    for part, other in zip(ours.codes.tensors, theirs.codes.tensors, strict=True):
        for row, blocks in enumerate(ours.finished.tolist()):
            assert torch.equal(part[row, :, :blocks], other[row, :, :blocks])
    counts = [cache.stats.as_dict() for cache in (static.cache, grown.cache)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", EVERY)
def test_it_decodes_as_the_growing_cache_does(name: str) -> None:
    grown, static = pair(name=name)
    check_alike(static, grown, STEPS)
    check_same_copy(static, grown)


def test_compiled_it_is_one_graph_that_is_never_made_again() -> None:
    torch._dynamo.reset()
    grown, static = pair()
    counter = torch._dynamo.testing.CompileCounter()
    static.run_step = torch.compile(decode_step, backend=counter, fullgraph=True, dynamic=False)
    before = {id(part): part.data_ptr() for part in static.cache.tensors()}
    check_alike(static, grown, STEPS)
    assert counter.frame_count == 1
    assert {id(part): part.data_ptr() for part in static.cache.tensors()} == before
    check_same_copy(static, grown)


def test_a_second_prompt_starts_over() -> None:
    _, static = pair()
    for _ in range(5):
        static.next()
    static.cache.reset()
    other = random_tokens(length=PROMPT + STEPS, rows=3, seed=5)
    grown = Decoder(other, MIXED, PROMPT, options=PLAIN)
    static.tokens = other
    static.cache.append(other.keys[:, :, :PROMPT], other.values[:, :, :PROMPT])
    static.cache.await_selection(other.queries[:, :, :PROMPT])
    begin_decoding(static.cache, PLAIN, static.mask(PROMPT))
    for part in (static.cache.stats, grown.cache.stats):
        part.reset()
    check_alike(static, grown, STEPS)
    check_same_copy(static, grown)


def test_rows_can_change_places() -> None:
    rows = torch.tensor([2, 0, 0])
    grown, static = pair()
    check_alike(static, grown, 4)
    for decoder in (grown, static):
        decoder.cache.take_rows(rows)
        decoder.tokens = decoder.tokens.rows(rows)
    check_alike(static, grown, STEPS - 4)
    check_same_copy(static, grown)
