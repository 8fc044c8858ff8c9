"""The full store grows in place, keeps what it holds, and forgets what it is told to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.cache.store import DenseStore, is_identity
from tests.helpers import PROPERTY

ROWS, HEADS, DIM, VALUE_DIM = 3, 2, 4, 6


def tokens(count: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values that say which row and token they are."""
    label = torch.arange(start, start + count) + 1000.0 * torch.arange(ROWS)[:, None]
    label = label[:, None, :, None]
    return label.expand(-1, HEADS, -1, DIM), -label.expand(-1, HEADS, -1, VALUE_DIM)


def filled(*counts: int, reserve: int = 0) -> DenseStore:
    store = DenseStore(reserve)
    for count in counts:
        store.append(*tokens(count, start=store.length))
    return store


def assert_holds(store: DenseStore, count: int, rows: list[int] | None = None) -> None:
    keys, values = tokens(count)
    rows = list(range(ROWS)) if rows is None else rows
    assert store.length == count
    assert torch.equal(store.dense()[0], keys[rows])
    assert torch.equal(store.dense()[1], values[rows])


def addresses(store: DenseStore) -> tuple[int, int]:
    return store.dense()[0].data_ptr(), store.dense()[1].data_ptr()


def count_reallocations(store: DenseStore, appends: int, size: int = 1) -> int:
    moves, before = 0, addresses(store)
    for _ in range(appends):
        store.append(*tokens(size, start=store.length))
        after = addresses(store)
        moves, before = moves + (after != before), after
    return moves


def test_an_append_writes_in_place_while_there_is_room() -> None:
    store = filled(10)
    assert count_reallocations(store, 100) == 0
    assert_holds(store, 110)


def test_growth_keeps_the_content() -> None:
    store = filled(10)
    assert count_reallocations(store, 700) > 0
    assert_holds(store, 710)


def test_the_copies_add_up_to_a_constant_per_token() -> None:
    store, copied = filled(1), 0
    before = addresses(store)
    for _ in range(6000):
        store.append(*tokens(1, start=store.length))
        if addresses(store) != before:
            copied, before = copied + store.length, addresses(store)
    assert copied < 6 * store.length  # 1 / (1 - 1 / 1.25) = 5, and one for the small start


def test_a_reserve_is_allocated_at_once() -> None:
    store = filled(1, reserve=3000)
    assert count_reallocations(store, 299, size=10) == 0
    assert_holds(store, 2991)
    assert filled(5000, reserve=10).length == 5000  # too small a reserve is no limit


def test_a_reserve_for_a_whole_context_is_not_allocated_for_a_short_prompt() -> None:
    store = filled(100, reserve=10**9)
    assert store.dense()[0].untyped_storage().nbytes() < 5000 * ROWS * HEADS * DIM * 4


writes = st.tuples(st.lists(st.integers(0, 15), min_size=ROWS, max_size=ROWS), st.integers(1, 400))


@PROPERTY
@given(prompt=st.integers(0, 300), drafts=st.lists(writes, min_size=1, max_size=5))
def test_each_row_is_written_at_its_own_place(
    prompt: int, drafts: list[tuple[list[int], int]]
) -> None:
    """Over old content, past the end and past the capacity, against a list for every row."""
    store = filled(prompt) if prompt else DenseStore()
    rows = [[1000.0 * row + token for token in range(prompt)] for row in range(ROWS)]
    for number, (back, count) in enumerate(drafts):
        starts = [max(0, len(row) - step) for row, step in zip(rows, back, strict=True)]
        new = torch.arange(ROWS * count).view(ROWS, 1, count, 1) + 1e5 * (number + 1)
        keys, values = new.expand(-1, HEADS, -1, DIM), -new.expand(-1, HEADS, -1, VALUE_DIM)
        store.write(keys, values, torch.tensor(starts))
        for row, start, written in zip(rows, starts, new[:, 0, :, 0].tolist(), strict=True):
            row[start : start + count] = written
    assert store.length == max(map(len, rows))
    for index, row in enumerate(rows):
        label = torch.tensor(row)[:, None]
        assert torch.equal(store.dense()[0][index, :, : len(row)], label.expand(HEADS, -1, DIM))
        assert torch.equal(
            store.dense()[1][index, :, : len(row)], -label.expand(HEADS, -1, VALUE_DIM)
        )


def test_a_write_within_the_room_is_in_place_and_one_beyond_it_grows() -> None:
    store = filled(10)
    before = addresses(store)
    store.write(*tokens(3, start=9), torch.tensor([9, 9, 9]))
    assert_holds(store, 12)
    assert addresses(store) == before
    store.write(*tokens(600, start=12), torch.tensor([12, 12, 12]))
    assert_holds(store, 612)
    assert addresses(store) != before


def test_places_behind_a_shorter_row_hold_finite_numbers() -> None:
    """A masked kernel multiplies them by zero; uninitialised memory may be NaN."""
    store = filled(10)
    everything = torch.full((ROWS, HEADS, 100, DIM), torch.nan)
    values = torch.full((ROWS, HEADS, 100, VALUE_DIM), torch.nan)
    store.append(everything, values)
    store.crop(10)
    store.write(*tokens(2), torch.tensor([10, 40, 3]))
    assert store.length == 42
    assert bool(store.dense()[0].isfinite().all()) and bool(store.dense()[1].isfinite().all())


@pytest.mark.parametrize(("length", "left"), [(4, 4), (0, 0), (9, 9), (10, 10), (99, 10)])
def test_crop_forgets_the_end_and_its_room_is_used_again(length: int, left: int) -> None:
    store = filled(10)
    before = addresses(store)
    store.crop(length)
    assert_holds(store, left)
    store.append(*tokens(3, start=left))
    assert_holds(store, left + 3)
    assert addresses(store) == before


def test_a_negative_crop_is_refused() -> None:
    store = filled(10)
    with pytest.raises(ValueError, match="-1"):
        store.crop(-1)
    assert_holds(store, 10)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [2], [0, 0, 1, 1, 2, 2]])
def test_rows_can_be_reordered_repeated_and_left_out(rows: list[int]) -> None:
    store = filled(10)
    store.take_rows(torch.tensor(rows))
    assert_holds(store, 10, rows)
    store.dense()[0][0, 0, 0, 0] = 7.5  # a repeated row is a copy, not a view of the other
    assert int((store.dense()[0] == 7.5).sum()) == 1
    more_keys, more_values = tokens(2, start=10)
    store.append(more_keys[rows], more_values[rows])
    assert torch.equal(store.dense()[1], tokens(12)[1][rows])


def test_reset_frees_everything_and_another_shape_fits() -> None:
    store = filled(10)
    store.reset()
    assert not store.is_allocated
    assert store.length == 0
    with pytest.raises(RuntimeError, match="empty"):
        store.dense()
    store.append(torch.ones(1, 5, 2, 3), torch.ones(1, 5, 2, 3))
    assert store.dense()[0].shape == (1, 5, 2, 3)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_an_entry_is_one_key_and_one_value(dtype: torch.dtype, size: int) -> None:
    store = DenseStore()
    store.append(*(tensor.to(dtype) for tensor in tokens(3)))
    assert store.dense()[0].dtype == dtype
    assert store.entry_bytes == (DIM + VALUE_DIM) * size


@pytest.mark.parametrize(
    ("rows", "identity"), [([0, 1, 2], True), ([0, 2, 1], False), ([0, 1], False), ([], False)]
)
def test_the_identity_is_recognised(rows: list[int], identity: bool) -> None:
    assert is_identity(torch.tensor(rows, dtype=torch.int64), 3) is identity
