"""Every store holds what it is given and computes the same over it, wherever its entries lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.paged import PagedStore
from refreshkv.cache.static import StaticStore
from refreshkv.cache.store import DenseStore, Store
from refreshkv.exact import Cycle, ExactLayer
from refreshkv.kernels.options import AttendOptions
from refreshkv.policy.selection import FREE
from refreshkv.step import decode_step
from tests.helpers import PROPERTY, random_tokens
from tests.test_step import ALL

HEADS, GROUP, DIM, VALUE_DIM, ROOM = 2, 2, 8, 6, 64


def stores(rows: int) -> dict[str, Store]:
    fixed = (torch.zeros(rows, HEADS, ROOM, dim) for dim in (DIM, VALUE_DIM))
    return {
        "dense": DenseStore(),
        "static": StaticStore(*fixed, torch.zeros(rows, dtype=torch.int64)),
        "pages of 4": PagedStore(4),
        "pages of 64": PagedStore(64),
    }


def random(gen: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=gen)


def shown(store: Store, visible: Tensor) -> Tensor:
    """A mask `[B, L]` for all positions of a store."""
    return torch.nn.functional.pad(visible, (0, store.width - visible.shape[1]))[:, None]


def check_alike(first: Store, other: Store, gen: torch.Generator) -> None:
    """The verbs give the same over both, the scores of positions that the first has."""
    rows, width = first.rows, first.width
    query = random(gen, rows, HEADS * GROUP, DIM)
    queries = random(gen, rows, HEADS * GROUP, 3, DIM)
    visible = torch.rand(rows, width, generator=gen) < 0.8
    options = AttendOptions(scale=0.3, sinks=random(gen, HEADS * GROUP), softcap=2.0)
    starts = first.lengths - 1
    positions = torch.randint(-1, width, (rows, HEADS, 5), generator=gen).int()
    newest = torch.zeros(rows, HEADS, dtype=torch.int64)
    results = []
    for store in (first, other):
        seen = options.over(shown(store, visible))
        attended, scored = store.attend_and_score(query, seen)
        full, votes = store.verify(queries, seen, starts=starts, counts=starts * 0 + 2)
        at, best = store.attend_at(query, positions, options, newest=newest, count=2)
        copies = store.room_for(5)
        filled = torch.full((rows, HEADS), 5)
        store.refresh(
            positions,
            filled,
            ring_keys=copies[0],
            ring_values=copies[1],
            ring_positions=torch.zeros_like(positions),
            state=torch.zeros(6, rows, HEADS, dtype=torch.int64),
            budget=filled[:, 0],
        )
        results.append(
            [
                *store.attend(query, seen),
                *attended,
                *full,
                *at,
                best,
                *copies,
                *(
                    scores[:, :, :width]
                    for scores in (
                        scored.scores,
                        store.score(query, seen).scores,
                        votes.scores,
                        store.vote(queries, seen, starts=starts).scores,
                    )
                ),
                *(part[:, :, :width] for part in store.dense()),
            ]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["static", "pages of 4", "pages of 64"])
@PROPERTY
@given(data=st.data(), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_all_stores_are_one(kind: str, data: st.DataObject, rows: int, seed: int) -> None:
    """Appends, writes at each row's own position, crops and rows that change, against the dense store."""
    gen = torch.Generator().manual_seed(seed)
    dense, store = stores(rows)["dense"], stores(rows)[kind]
    operations = ["append", "write", "take_rows"] + ["crop"] * (kind != "static")
    for operation in ["append", *data.draw(st.lists(st.sampled_from(operations), max_size=6))]:
        length = dense.width
        if operation == "append":
            count = data.draw(st.integers(1, 7))
            new = random(gen, rows, HEADS, count, DIM), random(gen, rows, HEADS, count, VALUE_DIM)
            for one in (dense, store):
                one.append(*new)
        elif operation == "write":
            starts = torch.tensor([data.draw(st.integers(0, length - 1)) for _ in range(rows)])
            new = random(gen, rows, HEADS, 1, DIM), random(gen, rows, HEADS, 1, VALUE_DIM)
            for one in (dense, store):
                one.write(*new, starts)
        elif operation == "crop":
            length = data.draw(st.integers(1, length))
            for one in (dense, store):
                one.crop(length)
        else:
            some = st.integers(0, rows - 1)
            fewer = data.draw(st.lists(some, min_size=rows, max_size=rows))
            for one in (dense, store):
                one.take_rows(torch.tensor(fewer))
        assert torch.equal(dense.lengths, store.lengths)
        check_alike(dense, store, gen)


def test_pages_of_rows_that_are_gone_are_used_again() -> None:
    store = PagedStore(4)
    store.append(torch.randn(3, HEADS, 20, DIM), torch.randn(3, HEADS, 20, VALUE_DIM))
    pages = len(store.entries().keys)
    store.take_rows(torch.tensor([2, 2, 2]))
    store.crop(7)
    store.append(torch.randn(3, HEADS, 13, DIM), torch.randn(3, HEADS, 13, VALUE_DIM))
    blocks = store.entries().blocks
    assert blocks is not None and len(blocks.unique()) == blocks.numel() == 15
    assert len(store.entries().keys) == pages


class Layer:
    """Decodes a text over any store; `prompts` may differ from row to row where the store lets them."""

    def __init__(self, store: Store, name: str, prompt: int, **changes: object) -> None:
        self.tokens = random_tokens(length=40, rows=2, pads=(0, 5), seed=2)
        self.options = AttendOptions(scale=0.25)
        self.cache = LayerCache(replace(ALL[name], **changes), store=store)
        self.cache.append(self.tokens.keys[:, :, :prompt], self.tokens.values[:, :, :prompt])
        self.cache.await_selection(self.tokens.queries[:, :, :prompt])

    def step(self) -> Tensor:
        now = int(self.cache.store.lengths[0])
        token = slice(now, now + 1)
        self.cache.append(self.tokens.keys[:, :, token], self.tokens.values[:, :, token])
        visible = self.tokens.seen(now + 1)
        assert visible is not None
        visible = shown(self.cache.store, visible)[:, 0]
        return decode_step(self.cache, self.tokens.queries[:, :, now], self.options, visible)


@pytest.mark.parametrize("ring", ["copied", "indexed"])
@pytest.mark.parametrize("name", ["fixed", "drift of a head", "every option"])
def test_a_layer_decodes_alike_over_pages_and_by_a_list(name: str, ring: str) -> None:
    plain, paged = Layer(DenseStore(), name, 20), Layer(PagedStore(8), name, 20, ring=ring)
    for _ in range(15):
        torch.testing.assert_close(paged.step(), plain.step(), atol=2e-6, rtol=1e-5)
    ours, theirs = plain.cache.ring, paged.cache.ring
    assert ours is not None and theirs is not None
    kept = [
        sorted(p for p in ring.positions[1, 0].tolist() if p != FREE) for ring in (ours, theirs)
    ]
    assert kept[0] == kept[1]
    assert plain.cache.stats.kv_read_share == paged.cache.stats.kv_read_share


@pytest.mark.parametrize("ring", ["copied", "indexed"])
def test_the_exact_mode_over_pages(ring: str) -> None:
    tokens, options = random_tokens(length=40, rows=2, seed=4), AttendOptions(scale=0.25)
    runs = []
    for store, kind in ((DenseStore(), "copied"), (PagedStore(4), ring)):
        config = replace(ALL["fixed"], mode="exact", stride=5, threshold=0.85, ring=kind)
        cache = LayerCache(config, store=store)
        cache.append(tokens.keys[:, :, :20], tokens.values[:, :, :20])
        cache.await_selection(tokens.queries[:, :, :20])
        cycle = Cycle(cache.store.lengths)
        layer, outputs = ExactLayer(cache, options, None, cycle), []
        for kept in ([2, 3], [1, 1], [3, 2]):
            layer.select()
            ends = int(layer.ends.min())
            for ahead in range(2):
                one = (x[:, :, ends + ahead] for x in (tokens.queries, tokens.keys, tokens.values))
                cycle.begin_draft(grows=True)
                outputs.append(layer.draft(*one))
                cycle.end_draft()
            new = (x[:, :, ends : ends + 3] for x in (tokens.queries, tokens.keys, tokens.values))
            cycle.counts.fill_(3)
            outputs.append(layer.verify(*new))
            layer.commit(torch.tensor(kept))
            cycle.advance(torch.tensor(kept))
        runs.append(outputs)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_rows_with_prompts_at_different_times_decode_as_alone() -> None:
    """Row 1 gets another prompt while row 0 goes on: continuous batching in one cache."""
    tokens, options = random_tokens(length=60, rows=2, seed=6), AttendOptions(scale=0.25)
    config = replace(ALL["every option"], budget=9)
    cache = LayerCache(config, store=PagedStore(8))
    alone = [LayerCache(config, store=PagedStore(8)) for _ in range(2)]

    def feed(one: LayerCache, rows: slice, at: list[int], count: int = 1) -> None:
        keys, values = (
            torch.stack(
                [x[row, :, now : now + count] for row, now in zip((0, 1)[rows], at, strict=True)]
            )
            for x in (tokens.keys, tokens.values)
        )
        one.append(keys, values)

    def step(one: LayerCache, rows: slice, at: list[int]) -> Tensor:
        feed(one, rows, at)
        pairs = zip((0, 1)[rows], at, strict=True)
        query = torch.stack([tokens.queries[row, :, now] for row, now in pairs])
        return decode_step(one, query, options)

    both = slice(0, 2)
    feed(cache, both, [0, 0], 20)
    cache.await_selection(tokens.queries[:, :, :20])
    for row in range(2):
        feed(alone[row], slice(row, row + 1), [0], 20)
        alone[row].await_selection(tokens.queries[row : row + 1, :, :20])
    for now in range(20, 26):
        together = step(cache, both, [now, now])
        for row in range(2):
            own = step(alone[row], slice(row, row + 1), [now])
            torch.testing.assert_close(together[row], own[0], atol=2e-6, rtol=1e-5)
    # Row 1 is told to select anew, as after a prompt; row 0 keeps its ring, its anchors and its budget.
    before = cache.ring.positions[0].clone() if cache.ring is not None else None
    queries = tokens.queries[:, :, 18:26]
    cache.await_selection(queries, torch.tensor([False, True]))
    alone[1].await_selection(queries[1:])
    for now in range(26, 40):
        together = step(cache, both, [now, now])
        for row in range(2):
            own = step(alone[row], slice(row, row + 1), [now])
            torch.testing.assert_close(together[row], own[0], atol=2e-6, rtol=1e-5)
    assert before is not None
