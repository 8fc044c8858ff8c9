"""What `LayerCache` refuses, and what it must not share. How it behaves is in test_cache_model.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refreshkv.cache import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.selection import Selection
from refreshkv.step import Attention, decode_step

HEADS = 2


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of two rows."""
    return torch.zeros(2, HEADS, count, 2), torch.zeros(2, HEADS, count, 3)


@pytest.fixture
def cache() -> LayerCache:
    """Two rows of three tokens."""
    cache = LayerCache(RefreshConfig(budget=2), index=7, reserve=1000)
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
    everyone = Selection(torch.zeros(2, HEADS, 2).long(), torch.full((2, HEADS), 2))
    with pytest.raises(RuntimeError, match=r"^layer 7: resolve_budget before"):
        cache.refresh(everyone)


def test_the_reserve_reaches_the_store(cache: LayerCache) -> None:
    before = cache.store.keys.data_ptr()
    cache.append(*tokens(997))
    assert cache.store.keys.data_ptr() == before


def test_the_query_that_waits_is_a_copy(cache: LayerCache) -> None:
    queries = torch.zeros(2, HEADS, 3, 4)
    cache.await_selection(queries[:, :, -1])
    queries.fill_(1)
    assert float(cache.pending.abs().max()) == 0.0


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
    decode_step(cache, torch.ones(1, 1, 4), Attention(scale=1.0))
    assert cache.budget is not None and cache.budget.tolist() == [3]
