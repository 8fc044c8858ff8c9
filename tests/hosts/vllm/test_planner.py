"""Whatever an engine does with its requests, a row is only partial over a selection that is true of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refreshkv.hosts.vllm.planner import NOWHERE, Batch, Kind, Plan, Planner
from tests.helpers import PROPERTY

PAGE = 4
KNOWN = (Kind.PARTIAL, Kind.FULL, Kind.DUE)


@dataclass(eq=False)
class Request:
    """`text` so far: a prompt, then tokens of its own; `done` of it are in the cache, in `blocks`."""

    text: list[int]
    prompt: int
    number: int = 0
    done: int = 0
    blocks: list[int] = field(default_factory=list)


class Engine:
    """Schedules at random: chunks, decodes, drafts of which some are rejected, preempts, resumes, aborts, shares whole
    blocks of equal texts, and uses blocks again.

    The oracle is `selected`: of which text the selection in each row of state is.
    """

    def __init__(self, draw: st.DrawFn, rows: int, planner: Planner, *, numbered: bool) -> None:
        self.draw, self.rows, self.planner, self.numbered = draw, rows, planner, numbered
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.cached: dict[tuple[int, ...], int] = {}
        self.next_block, self.next_token = 1, 100
        self.selected: dict[int, tuple[int, ...]] = {}

    def choose(self, most: int) -> int:
        return self.draw(st.integers(0, most))

    def new_block(self) -> int:
        """One that nobody has; often one that somebody had."""
        taken = {block for request in self.running for block in request.blocks}
        free = sorted(set(range(1, self.next_block)) - taken)
        if not free or self.choose(3) == 0:
            self.next_block += 1
            return self.next_block - 1
        block = free[self.choose(len(free) - 1)]
        self.cached = {text: other for text, other in self.cached.items() if other != block}
        return block

    def arrive(self) -> None:
        """Many prompts are alike."""
        length = 1 + self.choose(11)
        self.waiting.append(Request(list(range(length)), length))

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            free = set(range(self.rows)) - {other.number for other in self.running}
            request.number = min(free)
            request.done, request.blocks = 0, []
            while request.done + PAGE < len(request.text):
                block = self.cached.get(tuple(request.text[: request.done + PAGE]))
                if block is None:
                    break
                request.blocks.append(block)
                request.done += PAGE
            self.running.append(request)

    def disturb(self) -> None:
        what = self.choose(7)
        if what == 0 and self.running:
            self.running.pop(self.choose(len(self.running) - 1))  # aborted
        if what == 1 and self.running:
            self.waiting.insert(0, self.running.pop(self.choose(len(self.running) - 1)))
        if what == 2:
            self.running.reverse()
        if what >= 5:
            self.arrive()
        if self.choose(9) == 0:
            self.cached.clear()

    def step(self) -> Plan | None:
        self.admit()
        for request in self.running:
            if request.done >= request.prompt and self.choose(3) == 0:
                self.more(request, 2)  # drafts
        scheduled = [(r, min(self.choose(4), len(r.text) - r.done)) for r in self.running]
        if not scheduled:
            return None
        last, previous, ends, written, resumed = [], [], [], [], []
        for request, count in scheduled:
            resumed.append(request.done < request.prompt)
            end = request.done + count
            while len(request.blocks) * PAGE < end:
                request.blocks.append(self.new_block())
            ends.append(end)
            written += [self.slot(request, position) for position in range(request.done, end)]
            last.append(self.slot(request, max(end - 1, 0)))
            previous.append(self.slot(request, max(request.done - 1, 0)))
        batch = Batch(
            queries=np.array([n for _, n in scheduled]),
            ends=np.array(ends),
            last=np.array(last),
            previous=np.array(previous),
            prefilling=np.array(resumed),
            requests=np.array([r.number for r, _ in scheduled]) if self.numbered else None,
            written=np.array(written, dtype=np.int64),
        )
        plan = self.planner.plan(batch)
        self.check(scheduled, plan, resumed)
        for request, count in scheduled:
            before, request.done = request.done, request.done + count
            if count > 1 and before >= request.prompt:
                request.done -= self.choose(count - 1)  # rejected, and with them what was to come
                del request.text[request.done :]
            for whole in range(before // PAGE, request.done // PAGE):
                text = tuple(request.text[: (whole + 1) * PAGE])
                self.cached.setdefault(text, request.blocks[whole])
            if count and request.done == len(request.text):
                self.more(request, 1)
        return plan

    def more(self, request: Request, count: int) -> None:
        request.text += range(self.next_token, self.next_token + count)
        self.next_token += count

    def slot(self, request: Request, position: int) -> int:
        return request.blocks[position // PAGE] * PAGE + position % PAGE if request.blocks else 0

    def check(
        self, scheduled: list[tuple[Request, int]], plan: Plan, prefilling: list[bool]
    ) -> None:
        used = [int(s) for s in plan.states if s != NOWHERE]
        assert len(used) == len(set(used)) and all(0 <= state < self.rows for state in used)
        for (request, count), kind, state, of_prompt in zip(
            scheduled, plan.kinds, plan.states, prefilling, strict=True
        ):
            assert (kind == Kind.IDLE) == (count == 0) == (state == NOWHERE)
            if not count:
                continue
            assert (kind == Kind.PROMPT) == (count > 1 or of_prompt)
            if kind in KNOWN:
                assert self.selected.get(int(state)) == tuple(request.text[: request.done])
        for (request, count), state in zip(scheduled, plan.states, strict=True):
            if count:
                self.selected[int(state)] = tuple(request.text[: request.done + count])


@PROPERTY
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from([None, 1, 3]))
def test_a_known_row_is_known(
    data: st.DataObject, numbered: bool, stagger: bool, stride: int | None
) -> None:
    rows = 4
    engine = Engine(
        data.draw, rows, Planner(rows, stride, asks=False, stagger=stagger), numbered=numbered
    )
    for _ in range(25):
        engine.disturb()
        plan = engine.step()
        if plan is not None and stride == 1:
            assert Kind.PARTIAL not in plan.kinds
        if plan is not None and stride is None:
            assert Kind.FULL not in plan.kinds


def decode(
    planner: Planner, ends: list[int], *, queries: int = 1, request: list[int] | None = None
) -> Plan:
    """A step of rows that lie far from each other, each in one piece; several tokens are of a prompt."""
    count = len(ends)
    base = np.arange(count) * 1000
    return planner.plan(
        Batch(
            queries=np.full(count, queries),
            ends=np.array(ends),
            last=base + ends - 1,
            previous=base + ends - 1 - queries,
            prefilling=np.full(count, queries > 1),
            requests=None if request is None else np.array(request),
        )
    )


@pytest.mark.parametrize("asks, due", [(False, Kind.FULL), (True, Kind.DUE)])
@pytest.mark.parametrize("stagger", [False, True])
def test_strides(asks: bool, due: Kind, stagger: bool) -> None:
    """Staggered, rows of unlike length are due at unlike times; else all of them so long after their prompts."""
    planner = Planner(2, 3, asks=asks, stagger=stagger)
    assert decode(planner, [10, 11], queries=10).kinds.tolist() == [Kind.PROMPT] * 2
    seen = [decode(planner, [10 + n, 11 + n]).kinds.tolist() for n in range(1, 7)]
    for row, prompt in enumerate((10, 11)):
        expected = [(prompt + n if stagger else n) % 3 == 0 for n in range(1, 7)]
        assert [kinds[row] == due for kinds in seen] == expected
        assert all(kinds[row] in (due, Kind.PARTIAL) for kinds in seen)


def test_nobody_is_lost_while_there_is_room() -> None:
    """As many rows as there is state for, some of which pause."""
    planner = Planner(5, None, asks=False, stagger=True)
    decode(planner, [20] * 5, queries=20)
    for n in range(1, 30):
        count = 5 if n % 3 else 2
        kinds = decode(planner, [20 + n] * 2 + [20 + n - n // 3] * (count - 2)).kinds
        assert (kinds == Kind.PARTIAL).all()


def test_a_row_that_comes_from_nowhere_is_lost_once() -> None:
    planner = Planner(2, None, asks=False, stagger=True)
    assert decode(planner, [9]).kinds.tolist() == [Kind.LOST]
    assert decode(planner, [10]).kinds.tolist() == [Kind.PARTIAL]
    assert decode(planner, [12]).kinds.tolist() == [Kind.LOST]  # a step is missing


def test_a_number_that_another_request_has_now() -> None:
    planner = Planner(3, None, asks=False, stagger=True)
    decode(planner, [10], queries=10, request=[2])
    assert decode(planner, [11], request=[2]).states.tolist() == [2]
    assert decode(planner, [40], request=[2]).kinds.tolist() == [Kind.LOST]


def test_a_number_is_believed_where_the_length_fits() -> None:
    """On a GPU the number is all that is known of the place of a token."""
    planner = Planner(3, None, asks=False, stagger=True)
    one, two = np.array([1]), np.array([2])
    seen = [
        planner.plan(Batch(one, np.array([end]), two, two, one == 0, two)).kinds[0]
        for end in (11, 12, 40, 41, 41)
    ]
    assert seen == [Kind.LOST, Kind.PARTIAL, Kind.LOST, Kind.PARTIAL, Kind.LOST]


def test_two_rows_with_one_past_do_not_share_state() -> None:
    """They hit the same prefix; the first one gets what is known of it."""
    planner = Planner(4, None, asks=False, stagger=True)
    decode(planner, [8], queries=8)
    both = np.array([1, 1])
    plan = planner.plan(Batch(both, both * 9, np.array([8, 50]), both * 7, both == 0))
    assert plan.kinds.tolist() == [Kind.PARTIAL, Kind.LOST]
    assert len(set(plan.states.tolist())) == 2


def test_the_longest_unused_state_goes_first() -> None:
    planner = Planner(2, None, asks=False, stagger=True)
    decode(planner, [5, 6], queries=5)
    decode(planner, [6])  # the second row pauses
    new = np.array([1])
    planner.plan(Batch(new * 3, new * 3, np.array([9000]), new * 0, new == 1))
    assert decode(planner, [7]).kinds.tolist() == [Kind.PARTIAL]
