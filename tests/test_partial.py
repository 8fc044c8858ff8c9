"""The ring: what a refresh puts in, what pushes put out, and that every copy is the store's row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.cache.ring import PartialCache
from refreshkv.cache.store import DenseStore
from refreshkv.kernels.backend import CPU, REFERENCE, Backend
from refreshkv.policy.selection import FREE, Selection
from tests.helpers import PROPERTY, held

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
            self.partial.push(
                self.store.keys[:, :, -1], self.store.values[:, :, -1], self.store.length - 1
            )

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
        used = torch.full(keys.shape[:2], keys.shape[2]) if counted is None else counted
        taken = torch.arange(keys.shape[2]) < used[..., None]
        assert torch.equal(taken, partial.positions[:, :, : keys.shape[2]] != FREE)
        assert torch.equal(used, partial.used)
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
    ("budget", "length", "counted"),
    [
        ([4, 4], 10, False),
        ([4, 5], 10, True),
        ([8, 20], 5, True),  # alike until the first row is full
    ],
)
def test_slots_are_counted_only_where_rows_differ(
    backend: Backend, budget: list[int], length: int, counted: bool
) -> None:
    ring = Ring(backend, budget, length)
    ring.refresh(rising=False)
    ring.push(6)
    assert (ring.partial.entries()[2] is not None) is counted
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


def everywhere(ring: Ring, *positions: int) -> Tensor:
    """What brings `positions` into every ring, `[B, Hkv, m]`."""
    return torch.tensor(positions).expand(ring.rows, HEADS, -1)


def where(positions: Tensor, wanted: Tensor) -> Tensor:
    """The wanted ones of `positions`, and no others."""
    return positions.masked_fill(~wanted, FREE)


def test_what_is_fetched_replaces_the_lowest_and_is_no_step(backend: Backend) -> None:
    ring = Ring(backend, [4], 10)
    ring.refresh(rising=False)  # 3, 2, 1, 0
    ring.push(1)  # over 3
    ring.partial.fetch(everywhere(ring, 5, 7))  # over 2 and 1
    ring.check([0, 5, 7, 10])
    assert ring.partial.steps.tolist() == [[1, 1]]
    assert ring.partial.pushed.tolist() == [[3, 3]]
    assert ring.partial.newest.tolist() == [[0, 0]]
    ring.push(1)  # over 0, and then the oldest that came later
    ring.push(1)
    ring.check([5, 7, 11, 12])


def test_what_is_there_is_not_fetched_again(backend: Backend) -> None:
    ring = Ring(backend, [4], 10)
    ring.refresh(rising=False)
    ring.partial.fetch(everywhere(ring, 1, 3))
    ring.check([0, 1, 2, 3])
    assert ring.partial.pushed.tolist() == [[0, 0]]


def test_each_head_fetches_for_itself(backend: Backend) -> None:
    ring = Ring(backend, [3], 10)
    ring.refresh(rising=False)  # 2, 1, 0
    positions = torch.tensor([[[7, 8], [2, 9]]])
    ring.partial.fetch(where(positions, torch.tensor([[[False, True], [True, True]]])))
    assert held(ring.partial) == [[[0, 1, 8], [0, 1, 9]]]
    ring.partial.fetch(where(positions, torch.tensor([[[True, True], [False, False]]])))
    assert held(ring.partial) == [[[0, 7, 8], [0, 1, 9]]]
    ring.push(1)
    assert held(ring.partial) == [[[7, 8, 10], [0, 9, 10]]]
    ring.check_copies()


def test_fetching_fills_free_slots_first(backend: Backend) -> None:
    ring = Ring(backend, [6, 20], 10)
    four = Selection(torch.tensor([[[3, 2, 1, 0]] * HEADS] * 2), torch.full((2, HEADS), 4))
    ring.partial.refresh(four)
    ring.partial.fetch(everywhere(ring, 7, 8, 9))
    ring.check([0, 1, 2, 7, 8, 9], [0, 1, 2, 3, 7, 8, 9])


def test_fetching_nothing_changes_nothing(backend: Backend) -> None:
    ring = Ring(backend, [3, 7], 5)
    ring.refresh(rising=False)
    ring.push(2)
    names = ("keys", "values", "positions", "filled", "pushed", "steps", "newest", "used")
    before = {name: getattr(ring.partial, name).clone() for name in names}
    ring.partial.fetch(everywhere(ring, FREE, FREE))
    for name, content in before.items():
        held_now = getattr(ring.partial, name)
        assert torch.equal(
            held_now[:, :, : content.shape[2]] if content.dim() > 2 else held_now, content
        )


def test_a_token_that_is_not_in_the_store_may_be_pushed(backend: Backend) -> None:
    """The lossless mode drafts at a place of its own in every row."""
    ring = Ring(backend, [3, 3], 10)
    ring.refresh(rising=False)
    keys, values = torch.randn(2, HEADS, 4), torch.randn(2, HEADS, 6)
    ring.partial.push(keys, values, torch.tensor([[11], [14]]))
    assert held(ring.partial) == [[[0, 1, 11]] * HEADS, [[0, 1, 14]] * HEADS]
    slot = ring.partial.newest[0, 0]
    assert torch.equal(ring.partial.keys[:, :, slot], keys)
    assert torch.equal(ring.partial.values[:, :, slot], values)


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=lambda backend: backend.name)
@PROPERTY
@given(
    budget=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    length=st.integers(1, 9),
    data=st.data(),
)
def test_a_ring_is_a_queue_that_starts_sorted(
    kernels: Backend, budget: list[int], length: int, data: st.DataObject
) -> None:
    """Refreshes of some heads, pushes and fetches against one list for every head, lowest first."""
    ring = Ring(kernels, budget, length)
    ring.refresh(rising=True)
    queues = [[list(range(max(0, length - k), length)) for _ in range(HEADS)] for k in budget]
    pairs = [(row, head) for row in range(len(budget)) for head in range(HEADS)]

    def enter(row: int, head: int, position: int) -> None:
        queues[row][head] = [*queues[row][head], position][-budget[row] :]

    flags = st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs))
    for what in data.draw(st.lists(st.sampled_from(["push", "fetch", "refresh"]), max_size=10)):
        count = ring.store.length
        if what == "push":
            ring.push(1)
            for row, head in pairs:
                enter(row, head, count)
            at_newest = ring.partial.positions.gather(-1, ring.partial.newest[..., None])
            assert bool((at_newest == count).all())
        elif what == "fetch":
            tokens = st.integers(0, count - 1)
            some = st.lists(tokens, unique=True, min_size=min(2, count), max_size=min(2, count))
            drawn = [(data.draw(some), data.draw(st.booleans())) for _ in pairs]
            for (row, head), (positions, wanted) in zip(pairs, drawn, strict=True):
                missing = [p for p in positions if wanted and p not in queues[row][head]]
                for position in missing:
                    enter(row, head, position)
            positions = torch.tensor([positions for positions, _ in drawn])
            wanted = torch.tensor([wanted for _, wanted in drawn])[:, None].expand_as(positions)
            shape = (len(budget), HEADS, -1)
            ring.partial.fetch(where(positions.view(shape), wanted.reshape(shape)))
        else:
            heads = torch.tensor(data.draw(flags)).view(len(budget), HEADS)
            ring.refresh(rising=False, heads=heads)
            for row, head in heads.nonzero().tolist():
                queues[row][head] = list(range(min(budget[row], count)))[::-1]
        assert held(ring.partial) == [[sorted(queue) for queue in row] for row in queues]
        assert ring.partial.used.tolist() == [[len(queue) for queue in row] for row in queues]
        ring.check_copies()
