"""`LayerCache` under random operations against a model made of Python lists.

Every token has a number, which its key, value and query say, so that contents can be compared and not only shapes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

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

from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.policy.selection import FREE
from tests.helpers import PROPERTY, held
from tests.slow import slow_select

HEADS = 2
POOL = 3
SHARE = 0.4
SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.75])


@dataclass
class Ring:
    """One KV head's partial cache: the best of the last refresh, lowest first, then what came after."""

    best: list[int]
    newest: list[int] = field(default_factory=list)

    def push(self, position: int, budget: int) -> None:
        self.newest.append(position)
        if len(self.best) + len(self.newest) > budget:
            (self.best or self.newest).pop(0)


@dataclass
class Row:
    """One sequence: its tokens' numbers, which of them count, and what the method keeps for it."""

    tokens: list[int] = field(default_factory=list)
    visible: list[bool] = field(default_factory=list)
    pending: int | None = None
    reference: int | None = None
    budget: int | None = None
    hidden: int | None = None
    rings: list[Ring] | None = None


def tensors(numbers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Keys `[B, Hkv, n, 2]` that say (number, head), values `[B, Hkv, n, 3]` that say -number."""
    number = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, HEADS, -1)
    head = torch.arange(HEADS, dtype=torch.float32)[:, None].expand_as(number)
    return torch.stack([number, head], -1), -number[..., None].expand(-1, -1, -1, 3)


class CacheMachine(RuleBasedStateMachine):
    @initialize(rows=st.integers(1, 3))
    def start(self, rows: int) -> None:
        self.cache = LayerCache(RefreshConfig(budget=SHARE, pool_kernel=POOL))
        self.rows = [Row() for _ in range(rows)]
        self.numbered = 0

    def add(self, count: int, visible: list[list[bool]]) -> None:
        for row, seen in zip(self.rows, visible, strict=True):
            row.tokens += range(self.numbered, self.numbered + count)
            row.visible += seen
            self.numbered += count
        self.cache.append(*tensors([row.tokens[-count:] for row in self.rows]))

    @property
    def length(self) -> int:
        return len(self.rows[0].tokens)

    def scores(self, data: st.DataObject) -> list[list[list[float]]]:
        some = st.lists(SCORES, min_size=self.length, max_size=self.length)
        return [[data.draw(some) for _ in range(HEADS)] for _ in self.rows]

    def select_and_refresh(self, scores: list[list[list[float]]], heads: Tensor | None) -> None:
        selection = self.cache.store.backend.select(
            torch.tensor(scores),
            self.cache.budget,
            pool_kernel=POOL,
            visible=torch.tensor([row.visible for row in self.rows]),
            heads=heads,
        )
        self.cache.refresh(selection, heads)

    def best(self, scores: list[list[list[float]]], row: int, head: int) -> Ring:
        one = self.rows[row]
        return Ring(slow_select(scores[row][head], one.budget, POOL, one.visible))

    @rule(count=st.integers(1, 9), data=st.data())
    def append(self, count: int, data: st.DataObject) -> None:
        """Tokens of a prompt, some of them padding, never all."""
        mask = st.lists(st.booleans(), min_size=count - 1, max_size=count - 1)
        self.add(count, [[*data.draw(mask), True] for _ in self.rows])

    @precondition(lambda self: self.length > 0)
    @rule()
    def end_prompt(self) -> None:
        last = [row.tokens[-1] for row in self.rows]
        self.cache.await_selection(torch.tensor(last, dtype=torch.float32)[:, None, None, None])
        for row in self.rows:
            row.pending = row.tokens[-1]

    @precondition(lambda self: self.rows[0].pending is not None)
    @rule(data=st.data())
    def first_selection(self, data: st.DataObject) -> None:
        scores = self.scores(data)
        visible = torch.tensor([row.visible for row in self.rows])
        self.cache.resolve_budget(visible, self.cache.store.lengths)
        for row in self.rows:
            row.budget = self.cache.config.resolve_budget(sum(row.visible))
            row.hidden = row.visible.count(False)
        self.select_and_refresh(scores, None)
        self.cache.waiting = None
        self.cache.reference = torch.tensor(
            [[[float(row.tokens[-1])]] * HEADS for row in self.rows]
        )
        for index, row in enumerate(self.rows):
            row.rings = [self.best(scores, index, head) for head in range(HEADS)]
            row.pending, row.reference = None, row.tokens[-1]

    @precondition(lambda self: self.rows[0].rings is not None)
    @rule(count=st.integers(1, 5))
    def partial_steps(self, count: int) -> None:
        for _ in range(count):
            self.add(1, [[True]] * len(self.rows))
            self.cache.ring.push(self.cache.store.lengths - 1)
            for row in self.rows:
                for ring in row.rings:
                    ring.push(self.length - 1, row.budget)

    @precondition(lambda self: self.rows[0].budget is not None and self.rows[0].pending is None)
    @rule(data=st.data())
    def full_step(self, data: st.DataObject) -> None:
        """A new token and a refresh of all heads or, where there are rings, of any subset (an empty one too)."""
        self.add(1, [[True]] * len(self.rows))
        mask = [[data.draw(st.booleans()) for _ in range(HEADS)] for _ in self.rows]
        heads = data.draw(st.sampled_from([None, torch.tensor(mask)]))
        if self.rows[0].rings is None:
            heads = None
        scores = self.scores(data)
        self.select_and_refresh(scores, heads)
        for index, row in enumerate(self.rows):
            row.rings = row.rings or [Ring([]) for _ in range(HEADS)]
            row.rings = [
                self.best(scores, index, head) if heads is None or mask[index][head] else ring
                for head, ring in enumerate(row.rings)
            ]

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, self.length + 1))
        self.cache.crop(length)
        for row in self.rows:
            if length < len(row.tokens):
                del row.tokens[length:], row.visible[length:]
                row.rings = row.pending = row.hidden = None

    @precondition(lambda self: self.length > 0)
    @rule(data=st.data())
    def take_rows(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.cache.take_rows(torch.tensor(rows))
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]

    @rule(rows=st.integers(1, 3))
    def reset(self, rows: int) -> None:
        self.cache.reset()
        self.rows = [Row() for _ in range(rows)]

    @invariant()
    def the_store_holds_every_token(self) -> None:
        assert self.cache.length == self.length
        if self.cache.store.is_allocated:
            expected = tensors([row.tokens for row in self.rows])
            for there, wanted in zip(self.cache.store.dense(), expected, strict=True):
                assert torch.equal(there, wanted.view(len(self.rows), HEADS, -1, wanted.shape[-1]))

    @invariant()
    def every_ring_holds_what_the_model_says(self) -> None:
        ring = self.cache.ring
        if ring is None or self.rows[0].rings is None:
            assert ring is None or not bool(ring.used.any())
            assert self.rows[0].rings is None
            return
        assert held(ring) == [
            [sorted(one.best + one.newest) for one in row.rings] for row in self.rows
        ]
        taken = ring.positions != FREE
        at = ring.positions.clamp(min=0).long()[..., None]
        for copied, source in zip((ring.keys, ring.values), self.cache.store.dense(), strict=True):
            rows = source.gather(2, at.expand(-1, -1, -1, source.shape[-1]))
            assert torch.equal(copied[taken], rows[taken])
        assert torch.equal(ring.used, taken.sum(-1))

    @invariant()
    def the_state_beside_the_rings_follows_its_row(self) -> None:
        waiting = None if self.cache.waiting is None else self.cache.queries
        for name in ("pending", "reference", "budget", "hidden"):
            state = waiting if name == "pending" else getattr(self.cache, name)
            expected = [getattr(row, name) for row in self.rows]
            if state is None:
                assert expected == [None] * len(self.rows)
            else:
                assert state.reshape(len(self.rows), -1)[:, 0].tolist() == expected


def test_the_cache_equals_the_model() -> None:
    run_state_machine_as_test(
        CacheMachine, settings=settings(PROPERTY, max_examples=120, stateful_step_count=30)
    )
