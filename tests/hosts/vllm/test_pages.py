"""Codes lie behind the keys and values of their page, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm.pages import Pages, PageShape
from refreshkv.kernels.backend import CPU, REFERENCE, Backend, triton_backend
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import AttendOptions, Entries
from tests.helpers import random_tokens
from tests.hosts.vllm.fakes import LAYOUTS, cache_of

MIXED = RefreshConfig(mode="mixed", budget=8)
SHAPE = PageShape(3, 64, (16, 16), torch.float32, MIXED)
SHAPES = [
    SHAPE,
    replace(SHAPE, tokens=128, dtype=torch.bfloat16),
    replace(
        SHAPE, heads=1, dims=(24, 24), rounding=RefreshConfig(mode="mixed", budget=8, key_bits=3)
    ),
    replace(SHAPE, heads=2, tokens=192, dims=(80, 80), dtype=torch.float16),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_entries_do_not_touch_each_other(shape: PageShape, layout: str) -> None:
    layer = LAYOUTS[layout][1] - 1
    cache, raw = cache_of(shape, 5, layout, layer)
    codes = shape.codes(cache)
    for part in codes.tensors:
        part[3] = -1
    assert not cache.any(), "codes are written over entries"
    written = raw == 255
    assert written[3, layer].sum() == sum(2 * part[3].numel() for part in codes.tensors)
    assert not raw[:3].any() and not raw[4].any() and not raw[3, :layer].any()
    cache.fill_(7)
    assert all((part[3] == -1).all() and not part[:3].any() for part in codes.tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: PageShape) -> None:
    cache, _ = cache_of(shape, 2)
    config = shape.rounding
    assert config is not None
    like = cache.new_zeros(2, shape.heads, 1)
    room = Codes.room(like, shape.dims, shape.tokens // 64, config.key_bits, config.value_bits)
    assert [x.shape for x in shape.codes(cache).tensors] == [x.shape for x in room.tensors]
    assert shape.bytes % 64 == 0
    small = sum(x[0].numel() * 2 for x in room.tensors) + shape.kv_bytes
    assert small <= shape.bytes < small + 64


def test_without_codes_a_page_is_its_entries() -> None:
    shape = replace(SHAPE, tokens=16, rounding=None)
    assert shape.bytes == shape.kv_bytes
    pages = Pages.of(cache_of(shape, 4)[0], shape)
    assert pages.codes is None and pages.keys.shape == pages.values.shape == (4, 3, 16, 16)


def test_a_block_size_that_is_no_multiple_of_64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of that; got 96: give --block-size 64 or 128"):
        replace(SHAPE, tokens=96)


def test_pages_that_have_no_room_or_are_in_pieces_are_refused() -> None:
    dense = torch.zeros(5, 3, 64, 32)
    heads_first = torch.zeros(3, 5, 300, 32)[:, :, :64].transpose(0, 1)
    other = cache_of(replace(SHAPE, heads=2), 5)[0]
    for cache in (dense, heads_first, other):
        with pytest.raises(ValueError, match=r"asked for 27840 bytes .*VLLM_KV_CACHE_LAYOUT"):
            SHAPE.codes(cache)


def backends() -> dict[str, Backend]:
    found = {"reference": REFERENCE, "cpu": CPU}
    pytest.importorskip("triton")
    return found | {"triton": triton_backend()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("layout, page", [("LBNHC", 64), ("BLHNC", 128)])
def test_a_step_over_pages_equals_one_over_a_dense_store(name: str, layout: str, page: int) -> None:
    backend = backends()[name]
    tokens = random_tokens(rows=2, kv_heads=2, group=2, length=300, dim=16)
    shape = PageShape(2, page, (16, 16), torch.float32, MIXED)
    pages = Pages.of(cache_of(shape, 12, layout)[0], shape)
    each = -(-300 // page)
    table = torch.tensor([8, 2, 5, 1, 9, 3, 7, 4, 11, 10])[: 2 * each].reshape(2, each).int()
    for row in range(2):
        for position in range(300):
            at = int(table[row, position // page]), slice(None), position % page
            pages.keys[at], pages.values[at] = (
                tokens.keys[row, :, position],
                tokens.values[row, :, position],
            )
    before = pages.keys.clone(), pages.values.clone()
    dense = Entries(tokens.keys, tokens.values)
    codes = Codes.room(tokens.keys, (16, 16), 4, 2, 2)
    span: dict[str, Any] = {"first": torch.zeros(2).long(), "begin": torch.zeros(2).long(),
                            "end": torch.tensor([4, 3]), "most": 4}  # fmt: skip
    backend.encode(dense, codes, **span)
    backend.encode(pages.entries(table), pages.codes_at(table), **span)
    assert torch.equal(before[0], pages.keys) and torch.equal(before[1], pages.values)
    lengths = torch.tensor([300, 250])
    given = {
        "first": torch.zeros(2).long(),
        "finished": torch.tensor([4, 3]),
        "budget": torch.tensor([8, 5]),
    }
    options = AttendOptions(scale=0.5, lengths=lengths[:, None])
    query, results = tokens.queries[:, :, -1], []
    for entries, copy in ((dense, codes), (pages.entries(table), pages.codes_at(table))):
        tally = torch.zeros(2, 2, 2, dtype=torch.int64)
        output = backend.attend_mixed(query, entries, copy, options, **given, tally=tally).output
        results.append((output, tally))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].any()
