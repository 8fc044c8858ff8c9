"""The ring: what a refresh puts in, what pushes put out, and that every copy is the store's row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.cache.ring import CopiedRing, IndexedRing, Ring
from refreshkv.cache.store import DenseStore
from refreshkv.kernels.backend import CPU, REFERENCE, Backend
from refreshkv.kernels.options import AttendOptions
from refreshkv.policy.selection import FREE, Selected
from tests.helpers import PROPERTY, held

HEADS = 2


@pytest.fixture(params=[CPU, REFERENCE], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


class Over(DenseStore):
    """A store whose kernels a test chooses."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    @property
    def backend(self) -> Backend:
        return self._backend


class Driver:
    """A store of random tokens with rings over it; scores fall or rise with the position."""

    def __init__(
        self, backend: Backend, budget: list[int], length: int, kind: type[Ring] = CopiedRing
    ) -> None:
        self.backend = backend
        self.gen = torch.Generator().manual_seed(0)
        self.store = Over(backend)
        self.rows = len(budget)
        self.append(length)
        self.ring = kind(self.store, torch.tensor(budget))

    def append(self, count: int) -> None:
        shape = (self.rows, HEADS, count)
        self.store.append(
            torch.randn(*shape, 4, generator=self.gen), torch.randn(*shape, 6, generator=self.gen)
        )

    def refresh(self, *, rising: bool, heads: Tensor | None = None) -> None:
        """Select by position: the newest tokens are the best if `rising`, else the oldest."""
        score = torch.arange(1.0, self.store.length + 1)
        scores = score if rising else 1 / score
        self.ring.refresh(
            self.backend.select(
                scores.expand(self.rows, HEADS, -1),
                self.ring.budget,
                pool_kernel=1,
                heads=heads,
            ),
            heads,
        )

    def push(self, count: int) -> None:
        for _ in range(count):
            self.append(1)
            self.ring.push(self.store.lengths - 1)

    def hold(self, *positions: int) -> None:
        """Select these in every ring, lowest first."""
        shape = (self.rows, HEADS)
        selected = torch.tensor(positions).int().expand(*shape, -1)
        self.ring.refresh(Selected(selected, torch.full(shape, len(positions))))

    def fetch_after(self, *slots: int) -> None:
        """What follows the tokens in these slots of every ring."""
        self.fetch(torch.tensor(slots).expand(self.rows, HEADS, -1))

    def fetch(self, slots: Tensor) -> None:
        """What follows the tokens in `slots` `[B, Hkv, m]`: they are called the most attended."""

        def best(query: Tensor, options: AttendOptions, count: int) -> tuple[None, Tensor]:
            return None, slots

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.ring, "_attend", best)
            end, query = self.store.lengths, torch.zeros(self.rows, HEADS, 4)
            self.ring.attend(query, AttendOptions(scale=1.0), successor=slots.shape[2], end=end)

    def check(self, *expected: list[int]) -> None:
        """Every head of row i holds the positions `expected[i]`, with the store's keys and values."""
        assert held(self.ring) == [[sorted(row)] * HEADS for row in expected]
        self.check_copies()

    def check_copies(self) -> None:
        ring, (keys, values) = self.ring, self.store.dense()
        taken = ring.positions != FREE
        assert torch.equal(ring.used, taken.sum(-1))
        slots = torch.arange(ring.positions.shape[2])
        assert torch.equal(taken, slots < ring.used[..., None])
        if isinstance(ring, CopiedRing):
            for row, head, slot in taken.nonzero().tolist():
                position = int(ring.positions[row, head, slot])
                assert torch.equal(ring.keys[row, head, slot], keys[row, head, position])
                assert torch.equal(ring.values[row, head, slot], values[row, head, position])


@pytest.mark.parametrize("pushes", [0, 1, 3, 4])
def test_pushes_put_out_the_lowest_scored(backend: Backend, pushes: int) -> None:
    ring = Driver(backend, [4], 10)
    ring.refresh(rising=False)  # best are 0, 1, 2, 3; lowest of them 3
    ring.push(pushes)
    ring.check([*range(4 - pushes), *range(10, 10 + pushes)])


@pytest.mark.parametrize("pushes", [5, 9, 12])
def test_more_pushes_than_slots_leave_the_newest(backend: Backend, pushes: int) -> None:
    ring = Driver(backend, [4], 10)
    ring.refresh(rising=False)
    ring.push(pushes)
    ring.check(list(range(10 + pushes - 4, 10 + pushes)))


def test_free_slots_are_used_before_anything_leaves(backend: Backend) -> None:
    ring = Driver(backend, [8], 5)
    ring.refresh(rising=False)
    ring.push(3)
    ring.check(list(range(8)))
    ring.push(2)  # now 4 and then 3, the lowest-scored, leave
    ring.check([0, 1, 2, 5, 6, 7, 8, 9])


def test_every_row_has_its_own_budget(backend: Backend) -> None:
    ring = Driver(backend, [2, 5, 40], 10)
    ring.refresh(rising=False)
    ring.check([0, 1], [0, 1, 2, 3, 4], list(range(10)))
    ring.push(3)
    ring.check([11, 12], [0, 1, 10, 11, 12], list(range(13)))


def test_a_refresh_of_one_head_leaves_the_others(backend: Backend) -> None:
    ring = Driver(backend, [3, 4], 10)
    ring.refresh(rising=False)
    ring.push(1)
    kept = ring.ring.keys[~torch.eye(2, dtype=torch.bool)].clone()
    heads = torch.eye(2, dtype=torch.bool)  # row 0 head 0, row 1 head 1
    ring.refresh(rising=True, heads=heads)
    assert held(ring.ring) == [[[8, 9, 10], [0, 1, 10]], [[0, 1, 2, 10], [7, 8, 9, 10]]]
    assert ring.ring.pushed.tolist() == [[0, 1], [1, 0]]
    assert torch.equal(ring.ring.keys[~heads], kept)
    ring.check_copies()
    ring.push(1)  # each head puts out the lowest of its own last refresh
    assert held(ring.ring) == [[[9, 10, 11], [0, 10, 11]], [[0, 1, 10, 11], [8, 9, 10, 11]]]


def test_a_later_refresh_replaces_everything(backend: Backend) -> None:
    ring = Driver(backend, [4], 10)
    ring.refresh(rising=False)
    ring.push(6)
    ring.refresh(rising=True)
    ring.check([12, 13, 14, 15])
    assert ring.ring.positions[0, 0, :4].tolist() == [12, 13, 14, 15]  # lowest first


@pytest.mark.parametrize("heads", [None, torch.ones(1, HEADS, dtype=torch.bool)], ids=["", "heads"])
def test_a_smaller_selection_leaves_free_slots(backend: Backend, heads: Tensor | None) -> None:
    ring = Driver(backend, [4], 10)
    ring.refresh(rising=False)
    two = Selected(torch.tensor([[[3, 8]] * HEADS]).int(), torch.tensor([[2] * HEADS]))
    ring.ring.refresh(two, heads)
    ring.check([3, 8])
    ring.push(3)
    ring.check([8, 10, 11, 12])


def test_a_generous_budget_costs_no_memory(backend: Backend) -> None:
    ring = Driver(backend, [10**6], 10)
    ring.refresh(rising=False)
    ring.push(70)
    ring.check(list(range(80)))
    assert ring.ring.keys.shape[2] < 200


def test_no_slot_beyond_the_budget_is_allocated(backend: Backend) -> None:
    ring = Driver(backend, [4, 6], 10)
    ring.refresh(rising=False)
    ring.push(9)
    assert ring.ring.keys.shape[2] == 6


@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 0, 1]])
def test_rows_keep_their_own_ring(backend: Backend, rows: list[int]) -> None:
    ring = Driver(backend, [2, 5], 10)
    ring.refresh(rising=False)
    ring.push(1)
    taken = torch.tensor(rows)
    ring.store.take_rows(taken)
    ring.ring.take_rows(taken)
    ring.ring.allow(torch.tensor([2, 5])[taken])
    ring.rows = len(rows)
    ring.check(*[[[0, 10], [0, 1, 2, 3, 10]][row] for row in rows])
    ring.push(1)
    ring.check(*[[[10, 11], [0, 1, 2, 10, 11]][row] for row in rows])


def test_what_is_fetched_replaces_the_lowest_and_is_no_step(backend: Backend) -> None:
    ring = Driver(backend, [4], 10)
    ring.hold(8, 6, 4, 2)
    ring.push(1)  # over 8
    ring.fetch_after(1, 3)  # 7 over 6 and 3 over 4
    ring.check([2, 3, 7, 10])
    assert ring.ring.steps.tolist() == [[1, 1]]
    assert ring.ring.pushed.tolist() == [[3, 3]]
    assert ring.ring.fetched.tolist() == [[2, 2]]
    assert ring.ring.newest.tolist() == [[0, 0]]
    ring.push(1)  # over 2, and then the oldest that came later
    assert ring.ring.fetched.tolist() == [[0, 0]]
    ring.push(1)
    ring.check([3, 7, 11, 12])


def test_what_is_there_is_not_fetched_again(backend: Backend) -> None:
    ring = Driver(backend, [4], 10)
    ring.refresh(rising=False)  # 3, 2, 1, 0
    ring.fetch_after(1, 2)
    ring.check([0, 1, 2, 3])
    assert ring.ring.pushed.tolist() == [[0, 0]]


def test_what_is_not_there_yet_is_not_fetched(backend: Backend) -> None:
    ring = Driver(backend, [4], 10)
    ring.hold(9, 5)
    ring.fetch_after(0, 2)  # the last token, and a free slot
    ring.check([5, 9])
    ring.append(1)
    ring.fetch_after(0, 2)
    ring.check([5, 9, 10])


def test_each_head_fetches_for_itself(backend: Backend) -> None:
    ring = Driver(backend, [3], 10)
    ring.hold(7, 4, 1)
    ring.fetch(torch.tensor([[[9, 0], [1, 2]]]))  # there is no slot 9
    assert held(ring.ring) == [[[1, 4, 8], [1, 2, 5]]]
    ring.fetch(torch.tensor([[[1, -1], [7, 8]]]))
    assert held(ring.ring) == [[[1, 5, 8], [1, 2, 5]]]
    ring.push(1)
    assert held(ring.ring) == [[[5, 8, 10], [2, 5, 10]]]
    ring.check_copies()


def test_fetching_fills_free_slots_first(backend: Backend) -> None:
    ring = Driver(backend, [6, 20], 10)
    ring.hold(8, 6, 3, 1)
    ring.fetch_after(0, 1, 2)
    ring.check([1, 3, 4, 6, 7, 9], [1, 3, 4, 6, 7, 8, 9])


def test_fetching_nothing_changes_nothing(backend: Backend) -> None:
    ring = Driver(backend, [3, 7], 5)
    ring.refresh(rising=False)
    ring.push(2)
    names = ("keys", "values", "positions", "filled", "pushed", "steps", "newest", "used")
    before = {name: getattr(ring.ring, name).clone() for name in names}
    ring.fetch_after(40, -1)
    for name, content in before.items():
        held_now = getattr(ring.ring, name)
        assert torch.equal(
            held_now[:, :, : content.shape[2]] if content.dim() > 2 else held_now, content
        )


def test_each_row_pushes_what_was_written_at_a_position_of_its_own(backend: Backend) -> None:
    """The exact mode drafts behind the end of every row."""
    ring = Driver(backend, [3, 3], 10)
    ring.refresh(rising=False)
    keys, values, positions = (
        torch.randn(2, HEADS, 1, 4),
        torch.randn(2, HEADS, 1, 6),
        torch.tensor([11, 14]),
    )
    ring.store.write(keys, values, positions)
    ring.ring.push(positions)
    ring.check([0, 1, 11], [0, 1, 14])


def test_a_void_ring_holds_nothing_until_it_is_filled_again(backend: Backend) -> None:
    ring = Driver(backend, [3, 5], 10)
    ring.refresh(rising=False)
    ring.push(2)
    ring.ring.void()
    ring.check([], [])
    ring.refresh(rising=True)
    ring.check([9, 10, 11], [7, 8, 9, 10, 11])


@pytest.mark.parametrize("successor", [0, 2])
def test_both_kinds_attend_and_fetch_alike(backend: Backend, successor: int) -> None:
    """One reads its copies, the other the store."""
    rings = [Driver(backend, [4, 9], 12, kind) for kind in (CopiedRing, IndexedRing)]
    options = AttendOptions(scale=0.5)
    for step in range(9):
        query, outputs = torch.randn(2, 2 * HEADS, 4), []
        for ring in rings:
            if step % 4 == 0:
                ring.refresh(rising=step == 4)
            ring.push(1)
            end = ring.store.lengths - 1
            outputs.append(ring.ring.attend(query, options, successor=successor, end=end))
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other)
        assert held(rings[0].ring) == held(rings[1].ring)
    assert not hasattr(rings[1].ring, "keys")


@pytest.mark.parametrize("kind", [CopiedRing, IndexedRing])
@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=lambda backend: backend.name)
@PROPERTY
@given(
    budget=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    length=st.integers(1, 9),
    data=st.data(),
)
def test_a_ring_is_a_queue_that_starts_sorted(
    kernels: Backend, kind: type[Ring], budget: list[int], length: int, data: st.DataObject
) -> None:
    """Refreshes of some heads, pushes and fetches against one list for every head, lowest first."""
    ring = Driver(kernels, budget, length, kind)
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
            at_newest = ring.ring.positions.gather(-1, ring.ring.newest[..., None])
            assert bool((at_newest == count).all())
        elif what == "fetch":
            slots = st.integers(0, max(budget) - 1)
            some = st.lists(
                slots, unique=True, min_size=min(2, max(budget)), max_size=min(2, max(budget))
            )
            drawn = [data.draw(some) for _ in pairs]
            best = torch.tensor(drawn).view(len(budget), HEADS, -1)
            before = ring.ring.positions.tolist()
            for (row, head), chosen in zip(pairs, drawn, strict=True):
                there = [
                    before[row][head][slot] for slot in chosen if slot < len(before[row][head])
                ]
                after = [place + 1 for place in there if place != FREE]
                for place in [p for p in after if p < count and p not in queues[row][head]]:
                    enter(row, head, place)
            ring.fetch(best)
        else:
            heads = torch.tensor(data.draw(flags)).view(len(budget), HEADS)
            ring.refresh(rising=False, heads=heads)
            for row, head in heads.nonzero().tolist():
                queues[row][head] = list(range(min(budget[row], count)))[::-1]
        assert held(ring.ring) == [[sorted(queue) for queue in row] for row in queues]
        assert ring.ring.used.tolist() == [[len(queue) for queue in row] for row in queues]
        ring.check_copies()
