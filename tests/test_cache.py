"""What `LayerCache` refuses, and what it must not share. How it behaves is in test_cache_model.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.store import DenseStore
from refreshkv.config import RefreshConfig
from refreshkv.kernels.options import AttendOptions
from refreshkv.policy.selection import FREE, Selected
from refreshkv.step import decode_step
from tests.helpers import PROPERTY, Decoder, random_tokens

HEADS = 2


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of two rows."""
    return torch.zeros(2, HEADS, count, 2), torch.zeros(2, HEADS, count, 3)


@pytest.fixture
def cache() -> LayerCache:
    """Two rows of three tokens."""
    cache = LayerCache(RefreshConfig(budget=2), index=7, store=DenseStore(1000))
    cache.append(*tokens(3))
    return cache


KEYS, VALUES = tokens(1)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (KEYS[:1], VALUES[:1]),
        (KEYS[:, :1], VALUES[:, :1]),
        (KEYS.double(), VALUES.double()),
        (KEYS.to("meta"), VALUES.to("meta")),
        (KEYS[..., :1], VALUES),
        (KEYS, VALUES[:1]),
        (KEYS, VALUES[..., :1]),
        (KEYS.repeat(1, 1, 2, 1), VALUES),
    ],
    ids=["rows", "heads", "dtype", "device", "key dim", "value rows", "value dim", "value tokens"],
)
def test_tokens_of_another_kind_are_refused(
    cache: LayerCache, keys: Tensor, values: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"^layer 7: [^\n]+$"):
        cache.append(keys, values)
    assert cache.length == 3


def test_a_refresh_without_a_budget_is_refused(cache: LayerCache) -> None:
    everyone = Selected(torch.zeros(2, HEADS, 2).int(), torch.full((2, HEADS), 2))
    with pytest.raises(RuntimeError, match=r"^layer 7: resolve_budget before"):
        cache.refresh(everyone)


def test_the_reserve_reaches_the_store(cache: LayerCache) -> None:
    before = cache.store.dense()[0].data_ptr()
    cache.append(*tokens(997))
    assert cache.store.dense()[0].data_ptr() == before


def test_the_query_that_waits_is_a_copy(cache: LayerCache) -> None:
    queries = torch.zeros(2, HEADS, 3, 4)
    cache.await_selection(queries)
    queries.fill_(1)
    assert float(cache.queries.abs().max()) == 0.0


@pytest.mark.parametrize("rows", [[], [-1], [0, 2]], ids=["none", "negative", "too large"])
def test_rows_that_are_not_there_are_refused(cache: LayerCache, rows: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot take rows"):
        cache.take_rows(torch.tensor(rows, dtype=torch.int64))
    assert cache.rows == 2 and cache.length == 3


def test_a_share_after_a_crop_before_any_decode_step_is_one_of_the_prompt() -> None:
    """The token being decoded is not part of the prompt, here as after an uncropped prompt."""
    cache = LayerCache(RefreshConfig(budget=0.5))
    cache.append(torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 9, 4))
    cache.crop(6)
    cache.append(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    decode_step(cache, torch.ones(1, 1, 4), AttendOptions(scale=1.0))
    assert cache.budget is not None and cache.budget.tolist() == [3]


@PROPERTY
@given(window=st.integers(1, 12), chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_last_queries_wait_however_the_prompt_is_cut(window: int, chunks: list[int]) -> None:
    cache, queries = LayerCache(RefreshConfig(window=window)), torch.randn(2, 4, sum(chunks), 8)
    for chunk in queries.split(chunks, 2):
        cache.append(torch.zeros(2, 2, chunk.shape[2], 8), torch.zeros(2, 2, chunk.shape[2], 8))
        cache.await_selection(chunk)
    assert cache.queries is not None
    assert torch.equal(cache.queries, queries[:, :, -window:])


ANCHORED = RefreshConfig(budget=8, anchor=0.5, stride=3, threshold=None)


def anchored(**changes: Any) -> LayerCache:
    """Three rows of 20 tokens, the first ones of two rows padding, that have decoded two."""
    decoder = Decoder(random_tokens(rows=3, pads=(0, 9, 4), **changes), ANCHORED, 20)
    decoder.run(2)
    return decoder.cache


def test_anchors_follow_their_row() -> None:
    cache = anchored()
    before, rows = cache.anchors, [2, 0, 2, 1]
    assert before is not None and before.shape == (3, 2, 4)
    assert len({tuple(row.flatten().tolist()) for row in before}) == 3
    cache.take_rows(torch.tensor(rows))
    assert cache.anchors is not None and torch.equal(cache.anchors, before[rows])


@pytest.mark.parametrize("length", [5, 12, 19, 21])
def test_a_crop_forgets_the_anchors_behind_it(length: int) -> None:
    cache = anchored()
    before = cache.anchors
    assert before is not None
    cache.crop(length)
    assert cache.anchors is not None
    left = cache.anchors != FREE
    assert torch.equal(left, before < length)
    assert torch.equal(cache.anchors[left], before[left])


def test_a_reset_and_another_prompt_forget_the_anchors() -> None:
    cache, again = anchored(), anchored(seed=1)
    expected = again.anchors
    cache.append(*(x[:, :, :1] for x in again.store.dense()))
    cache.await_selection(torch.zeros(3, 4, 1, 16))  # attends to all alike: the newest are the best
    cache.append(*(x[:, :, :1] for x in again.store.dense()))
    decode_step(cache, torch.zeros(3, 4, 16), AttendOptions(scale=1.0))
    assert cache.anchors is not None and cache.anchors.tolist() == [[[22, 21, 20, 19]] * 2] * 3
    assert not torch.equal(cache.anchors, expected)
    cache.reset()
    assert cache.anchors is None
