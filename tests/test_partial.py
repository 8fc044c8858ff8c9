"""The ring: what a refresh puts in, what pushes put out, and that every copy is the store's row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import CPU, REFERENCE, Backend
from refreshkv.partial import PartialCache
from refreshkv.selection import FREE, Selection
from refreshkv.store import DenseStore
from tests.helpers import held

HEADS = 2


@pytest.fixture(params=[CPU, REFERENCE], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


class Ring:
    """A store of random tokens with a partial cache over it; scores fall or rise with the position."""

    def __init__(self, backend: Backend, budget: list[int], length: int) -> None:
        self.backend = backend
        self.gen = torch.Generator().manual_seed(0)
        self.store = DenseStore()
        self.rows = len(budget)
        self.append(length)
        self.partial = PartialCache(self.store, torch.tensor(budget), backend)

    def append(self, count: int) -> None:
        shape = (self.rows, HEADS, count)
        self.store.append(
            torch.randn(*shape, 4, generator=self.gen), torch.randn(*shape, 6, generator=self.gen)
        )

    def refresh(self, *, rising: bool, heads: Tensor | None = None) -> None:
        """Select by position: the newest tokens are the best if `rising`, else the oldest."""
        score = torch.arange(1.0, self.store.length + 1)
        scores = score if rising else 1 / score
        self.partial.refresh(
            self.backend.select(
                scores.expand(self.rows, HEADS, -1),
                self.partial.budget,
                pool_kernel=1,
                heads=heads,
            ),
            heads,
        )

    def push(self, count: int) -> None:
        for _ in range(count):
            self.append(1)
            self.partial.push()

    def check(self, *expected: list[int]) -> None:
        """Every head of row i holds the positions `expected[i]`, with the store's keys and values."""
        assert held(self.partial) == [[sorted(row)] * HEADS for row in expected]
        self.check_copies()

    def check_copies(self) -> None:
        partial, store = self.partial, self.store
        for row, head, slot in (partial.positions != FREE).nonzero().tolist():
            position = int(partial.positions[row, head, slot])
            assert torch.equal(partial.keys[row, head, slot], store.keys[row, head, position])
            assert torch.equal(partial.values[row, head, slot], store.values[row, head, position])
        keys, values, counted = partial.entries()
        used = torch.full(keys.shape[:3], True) if counted is None else counted
        assert torch.equal(used, partial.positions[:, :, : keys.shape[2]] != FREE)
        assert torch.equal(used.sum(-1), partial.used)
        assert keys.shape[2] == values.shape[2] >= int(partial.used.max())


@pytest.mark.parametrize("pushes", [0, 1, 3, 4])
def test_pushes_put_out_the_lowest_scored(backend: Backend, pushes: int) -> None:
    ring = Ring(backend, [4], 10)
    ring.refresh(rising=False)  # best are 0, 1, 2, 3; lowest of them 3
    ring.push(pushes)
    ring.check([*range(4 - pushes), *range(10, 10 + pushes)])


@pytest.mark.parametrize("pushes", [5, 9, 12])
def test_more_pushes_than_slots_leave_the_newest(backend: Backend, pushes: int) -> None:
    ring = Ring(backend, [4], 10)
    ring.refresh(rising=False)
    ring.push(pushes)
    ring.check(list(range(10 + pushes - 4, 10 + pushes)))


def test_free_slots_are_used_before_anything_leaves(backend: Backend) -> None:
    ring = Ring(backend, [8], 5)
    ring.refresh(rising=False)
    ring.push(3)
    ring.check(list(range(8)))
    ring.push(2)  # now 4 and then 3, the lowest-scored, leave
    ring.check([0, 1, 2, 5, 6, 7, 8, 9])


def test_every_row_has_its_own_budget(backend: Backend) -> None:
    ring = Ring(backend, [2, 5, 40], 10)
    ring.refresh(rising=False)
    ring.check([0, 1], [0, 1, 2, 3, 4], list(range(10)))
    ring.push(3)
    ring.check([11, 12], [0, 1, 10, 11, 12], list(range(13)))


def test_a_refresh_of_one_head_leaves_the_others(backend: Backend) -> None:
    ring = Ring(backend, [3, 4], 10)
    ring.refresh(rising=False)
    ring.push(1)
    kept = ring.partial.keys[~torch.eye(2, dtype=torch.bool)].clone()
    heads = torch.eye(2, dtype=torch.bool)  # row 0 head 0, row 1 head 1
    ring.refresh(rising=True, heads=heads)
    assert held(ring.partial) == [[[8, 9, 10], [0, 1, 10]], [[0, 1, 2, 10], [7, 8, 9, 10]]]
    assert ring.partial.pushed.tolist() == [[0, 1], [1, 0]]
    assert torch.equal(ring.partial.keys[~heads], kept)
    ring.check_copies()
    ring.push(1)  # each head puts out the lowest of its own last refresh
    assert held(ring.partial) == [[[9, 10, 11], [0, 10, 11]], [[0, 1, 10, 11], [8, 9, 10, 11]]]


def test_a_later_refresh_replaces_everything(backend: Backend) -> None:
    ring = Ring(backend, [4], 10)
    ring.refresh(rising=False)
    ring.push(6)
    ring.refresh(rising=True)
    ring.check([12, 13, 14, 15])
    assert ring.partial.positions[0, 0, :4].tolist() == [12, 13, 14, 15]  # lowest first


@pytest.mark.parametrize("heads", [None, torch.ones(1, HEADS, dtype=torch.bool)], ids=["", "heads"])
def test_a_smaller_selection_leaves_free_slots(backend: Backend, heads: Tensor | None) -> None:
    ring = Ring(backend, [4], 10)
    ring.refresh(rising=False)
    two = Selection(torch.tensor([[[3, 8]] * HEADS]), torch.tensor([[2] * HEADS]))
    ring.partial.refresh(two, heads)
    ring.check([3, 8])
    ring.push(3)
    ring.check([8, 10, 11, 12])


def test_a_generous_budget_costs_no_memory(backend: Backend) -> None:
    ring = Ring(backend, [10**6], 10)
    ring.refresh(rising=False)
    ring.push(70)
    ring.check(list(range(80)))
    assert ring.partial.keys.shape[2] < 200


def test_no_slot_beyond_the_budget_is_allocated(backend: Backend) -> None:
    ring = Ring(backend, [4, 6], 10)
    ring.refresh(rising=False)
    ring.push(9)
    assert ring.partial.keys.shape[2] == 6


@pytest.mark.parametrize(
    ("budget", "length", "masked"),
    [
        ([4, 4], 10, False),
        ([4, 5], 10, True),
        ([8, 20], 5, True),  # alike until the first row is full
    ],
)
def test_a_mask_is_made_only_where_rows_differ(
    backend: Backend, budget: list[int], length: int, masked: bool
) -> None:
    ring = Ring(backend, budget, length)
    ring.refresh(rising=False)
    ring.push(6)
    assert (ring.partial.entries()[2] is not None) is masked
    ring.check_copies()


@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 0, 1]])
def test_rows_keep_their_own_ring(backend: Backend, rows: list[int]) -> None:
    ring = Ring(backend, [2, 5], 10)
    ring.refresh(rising=False)
    ring.push(1)
    taken = torch.tensor(rows)
    ring.store.take_rows(taken)
    ring.partial.take_rows(taken)
    ring.rows = len(rows)
    ring.check(*[[[0, 10], [0, 1, 2, 3, 10]][row] for row in rows])
    ring.push(1)
    ring.check(*[[[10, 11], [0, 1, 2, 10, 11]][row] for row in rows])
