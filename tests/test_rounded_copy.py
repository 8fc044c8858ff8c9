"""The codes of a store: after any history they are those that are made at once, bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.paged import PagedStore
from refreshkv.cache.rounded import RoundedCopy
from refreshkv.cache.static import StaticStore
from refreshkv.cache.store import DenseStore, Store
from refreshkv.config import RefreshConfig
from refreshkv.kernels import reference
from refreshkv.kernels.codes import Codes, pack_keys, pack_values
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy.rounding import BLOCK, round_block
from refreshkv.step import decode_step
from tests.helpers import PROPERTY, left_padding

HEADS, DIM, VALUE_DIM, BITS, VALUE_BITS = 2, 8, 6, 2, 3
CONFIG = RefreshConfig(mode="mixed", budget=4, key_bits=BITS, value_bits=VALUE_BITS)
OPTIONS = AttendOptions(scale=0.3)


def random(seed: int, rows: int, count: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, HEADS, count, dim, generator=gen) for dim in (DIM, VALUE_DIM))
    return keys, values


def at_once(keys: Tensor, values: Tensor) -> list[Tensor]:
    """Codes and grids of the whole blocks among the tokens `[Hkv, n, D]` of a row, without any store."""
    blocks = keys.shape[1] // BLOCK
    keys, values = (x[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)) for x in (keys, values))
    of_keys, of_values = round_block(keys, BITS), round_block(values, VALUE_BITS)
    return [
        pack_keys(of_keys.codes, BITS),
        of_keys.grid,
        pack_values(of_values.codes, VALUE_BITS),
        of_values.grid,
    ]


def check(found: RoundedCopy, keys: Tensor, values: Tensor, pads: list[int], ends: int) -> None:
    """The codes of every row, of which `pads` tokens are padding, are those of its first `ends` positions."""
    assert found.codes is not None and found.finished is not None and found.first is not None
    for row, pad in enumerate(pads):
        blocks = (ends - pad) // BLOCK if ends > pad else 0
        assert int(found.finished[row]) == blocks and int(found.first[row]) == pad
        if blocks:
            expected = at_once(keys[row, :, pad:ends], values[row, :, pad:ends])
            for part, wanted in zip(found.codes.tensors, expected, strict=True):
                assert torch.equal(part[row, :, :blocks], wanted)


class History(RuleBasedStateMachine):
    """A layer that decodes, in the growing form; rows differ in their padding."""

    @initialize(pads=st.lists(st.sampled_from([0, 3, 70]), min_size=1, max_size=3))
    def start(self, pads: list[int]) -> None:
        self.pads = pads
        self.cache = LayerCache(CONFIG, store=self.store())
        self.keys, self.values = random(0, len(pads), 0)
        self.seed = 0
        self.prompt(150)
        self.decode(1)

    def store(self) -> Store:
        return DenseStore()

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def visible(self) -> Tensor | None:
        if not any(self.pads):
            return None
        mask = left_padding(self.pads, self.length)
        return torch.nn.functional.pad(mask, (0, self.cache.length - self.length))

    def add(self, count: int) -> None:
        self.seed += 1
        new = random(self.seed, len(self.pads), count)
        self.keys, self.values = (
            torch.cat([held, fresh], 2)
            for held, fresh in zip((self.keys, self.values), new, strict=True)
        )
        self.cache.append(*new)

    @rule(count=st.sampled_from([1, 5, 80, 150]))
    def prompt(self, count: int) -> None:
        """Or a chunk of one, or the next turn."""
        self.add(count)
        query = torch.zeros(len(self.pads), HEADS, 1, DIM)
        self.cache.await_selection(query)

    @precondition(lambda self: self.length > max(self.pads))
    @rule(count=st.sampled_from([1, 2, 70]))
    def decode(self, count: int) -> None:
        for _ in range(count):
            self.add(1)
            query = torch.ones(len(self.pads), HEADS, DIM)
            decode_step(self.cache, query, OPTIONS, self.visible())
        assert self.cache.copy is not None
        check(self.cache.copy, self.keys, self.values, self.pads, self.length - 1)

    @precondition(lambda self: self.length > max(self.pads) + 1)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(max(self.pads) + 1, self.length))
        self.cache.crop(length)
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    @precondition(lambda self: self.length > 0)
    @rule(data=st.data())
    def take_rows(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.pads) - 1), min_size=1, max_size=4))
        self.cache.take_rows(torch.tensor(rows))
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.pads = [self.pads[row] for row in rows]

    @precondition(lambda self: self.length > 0)
    @rule()
    def go_on_with_a_copy(self) -> None:
        twin = copy.deepcopy(self.cache)
        self.cache.append(*random(99, len(self.pads), 1))  # which leaves the twin alone
        self.cache.crop(1)
        self.cache = twin

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]

    @invariant()
    def what_is_finished_is_true(self) -> None:
        """Whatever just happened: what the copy calls finished are the codes of what the store holds now."""
        found = self.cache.copy
        if found is None or found.finished is None or self.cache.hidden is None:
            return
        for row, count in enumerate(found.finished.tolist()):
            assert self.pads[row] + count * BLOCK <= self.length
            end = self.pads[row] + count * BLOCK
            kept = (x[row, :, self.pads[row] : end] for x in (self.keys, self.values))
            for part, wanted in zip(found.codes.tensors, at_once(*kept), strict=True):
                assert torch.equal(part[row, :, :count], wanted)


class PagedHistory(History):
    """Over pages that are no multiple of a block."""

    def store(self) -> Store:
        return PagedStore(24)


@pytest.mark.parametrize("machine", [History, PagedHistory])
def test_codes_do_not_know_how_they_came_about(machine: type[History]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(PROPERTY, max_examples=30, stateful_step_count=10)
    )


@dataclass
class Held:
    """A copy of a store of random tokens; `visible` `[B, L]`."""

    keys: Tensor
    values: Tensor
    visible: Tensor
    copy: RoundedCopy
    store: Store

    @classmethod
    def over(cls, store: Store, rows: int, length: int, **options: bool) -> Held:
        keys, values = random(1, rows, length)
        store.append(keys, values)
        visible = torch.ones(rows, store.width, dtype=torch.bool)
        return cls(keys, values, visible, RoundedCopy(BITS, VALUE_BITS, store, **options), store)

    def follow(self, first: list[int], ends: int, most: int | None = None) -> list[Tensor]:
        self.copy.begin_at(self.store, torch.tensor(first))
        self.copy.follow(self.store, torch.full((len(first),), ends), self.visible, most)
        assert self.copy.codes is not None
        return [part.clone() for part in self.copy.codes.tensors]


def test_where_a_row_begins_elsewhere_its_codes_are_made_again_and_no_others() -> None:
    held = Held.over(DenseStore(), 2, 200)
    held.follow([0, 3], 200)
    marked = held.copy.codes
    assert marked is not None
    marked.keys.fill_(7)
    held.follow([0, 9], 200)
    assert held.copy.codes is marked and bool((marked.keys[0, :, :3] == 7).all())
    expected = at_once(held.keys[1, :, 9:], held.values[1, :, 9:])
    assert torch.equal(marked.keys[1, :, :2], expected[0])


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_padding_and_other_rows_never_reach_a_block(poison: float) -> None:
    """Padding on the left, and inside of a block."""
    found = []
    for number in (0.5, poison):
        held = Held.over(DenseStore(), 3, 200)
        held.visible[1, :70] = held.visible[1, 90:95] = False
        for buffer in held.store.dense():
            buffer[1].masked_fill_(~held.visible[1][None, :, None], number)
            buffer[2] = number
        found.append(held.follow([0, 70, 0], 200))
    keys, key_grids, values, value_grids = zip(*found, strict=True)
    for clean, dirty in (keys, key_grids, values, value_grids):
        assert torch.equal(clean[0, :, :3], dirty[0, :, :3])
    for clean, dirty in (key_grids, values, value_grids):
        assert torch.equal(clean[1, :, :2], dirty[1, :, :2])
    plain = Held.over(DenseStore(), 3, 200)
    plain.visible[1, :70] = plain.visible[1, 90:95] = False
    assert not torch.equal(plain.follow([0, 70, 0], 200)[1][2], key_grids[1][2])


def test_the_fixed_form_makes_the_same_codes_one_block_at_a_time() -> None:
    gen = [torch.zeros(2, HEADS, 260, dim) for dim in (DIM, VALUE_DIM)]
    fixed = Held.over(StaticStore(*gen, torch.zeros(2, dtype=torch.int64)), 2, 230, fixed=True)
    where = [part.data_ptr() for part in fixed.copy.tensors()]
    for ends in range(60, 231, 10):
        fixed.follow([0, 9], ends, most=1)
        check(fixed.copy, fixed.keys, fixed.values, [0, 9], ends)
    assert [part.data_ptr() for part in fixed.copy.tensors()] == where
    fixed.copy.reset()
    check(fixed.copy, fixed.keys, fixed.values, [0, 9], 0)


def test_a_step_of_the_fixed_form_never_asks_the_device() -> None:
    """A tensor without contents has no answer to give, as in a CUDA graph."""
    with FakeTensorMode():
        rows, query = torch.zeros(2, dtype=torch.int64), torch.zeros(2, HEADS, DIM)
        keys, values = (torch.zeros(2, HEADS, 200, dim) for dim in (DIM, VALUE_DIM))
        visible = torch.ones(2, 200, dtype=torch.bool)
        entries = Entries(keys, values)
        codes = Codes.room(keys, (DIM, VALUE_DIM), 3, BITS, VALUE_BITS)
        reference.encode(
            entries, codes, first=rows, begin=rows, end=rows + 1, most=1, visible=visible
        )
        options = AttendOptions(scale=0.3, visible=visible[:, None], lengths=rows[:, None])
        of_rows = {"first": rows, "finished": rows, "budget": rows}
        of_rows["tally"] = rows.new_zeros(2, HEADS, 2)
        attended = reference.attend_mixed(query, entries, codes, options, **of_rows, skip=0.1)
        assert attended.output.shape == (2, HEADS, VALUE_DIM)


def test_the_room_of_a_copy_and_what_two_bits_take() -> None:
    """A copy of 64 dims in bfloat16 takes .141 of the cache, and a quarter more while it grows."""
    store = DenseStore()
    store.append(*(torch.zeros(1, 1, 64 * BLOCK, 64, dtype=torch.bfloat16) for _ in range(2)))
    rounded = RoundedCopy(2, 2, store)
    assert rounded.bytes == 0
    rounded.begin_at(store, torch.tensor([0]))
    rounded.follow(store, store.lengths, None)
    assert rounded.codes is not None and rounded.codes.block_bytes == (1152, 1152)
    cache = store.entry_bytes * 64 * BLOCK
    assert 64 * sum(rounded.codes.block_bytes) / cache == 0.140625
    assert rounded.bytes == 68 * sum(rounded.codes.block_bytes)
