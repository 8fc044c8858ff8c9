"""Which rows of a step are full and which partial, in the published mode; it knows numbers, and no engine (ours).

An engine with continuous batching schedules, preempts, resumes and drops requests as it likes, and tells nobody. So a
row's state is only believed where it fits: it is that of the row whose last token lies just before this step's first
one, in the same place of the cache. Any doubt costs one full step, which makes new state. That is the whole lifecycle.

Letters: B rows of a step, R rows of state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
NOWHERE = -1


class Kind(IntEnum):
    """What a row of a step does."""

    IDLE = 0  # no token of it is in the step
    PROMPT = 1  # several tokens, or the end of a prompt: full attention, and its last query selects
    FULL = 2  # one token, full attention, and it selects
    PARTIAL = 3  # one token, over what was selected
    DUE = 4  # one token, partial or full as its query decides
    LOST = 5  # as FULL, because it has no state


@dataclass(frozen=True)
class Batch:
    """The rows of a step, as an engine knows them; each `[B]`.

    Attributes:
        queries: tokens of each row in this step.
        ends: tokens of each row after it.
        last: where the last of them lies in the cache.
        previous: where the token before the first of them lies; anything where there is none.
        prefilling: rows that have not reached the end of their prompt before this step.
        requests: a number below R that names the request, where the engine has one.
        written: where all tokens of the step lie, `[T]`; what was there before is gone. Needed without `requests`.
    """

    queries: Numbers
    ends: Numbers
    last: Numbers
    previous: Numbers
    prefilling: NDArray[np.bool_]
    requests: Numbers | None = None
    written: Numbers | None = None


@dataclass(frozen=True)
class Plan:
    """What the rows do, `[B]` each.

    Attributes:
        kinds: of `Kind`.
        states: the row of state of each, `NOWHERE` for an idle one.
        lengths: tokens that each had when its state was made; K is a share of them.
        news: state was made in this step.
    """

    kinds: NDArray[np.int8]
    states: Numbers
    lengths: Numbers
    news: bool


class Planner:
    """Keeps the books of R rows of state.

    Args:
        rows: R, at least as many as a step has.
        stride: S, every S-th step may be full; `None`: none after the first selection.
        asks: a due row is full only if its query says so.
        stagger: see `settings.HostSettings`.

    Attributes:
        lengths: `[R]`, tokens that the row of each had when it was made.
    """

    def __init__(self, rows: int, stride: int | None, *, asks: bool, stagger: bool) -> None:
        self.stride, self.asks, self.stagger = stride, asks, stagger
        self._last = np.full(rows, NOWHERE, dtype=np.int64)  # where its last token lies
        self._ends = np.zeros(rows, dtype=np.int64)
        self.lengths = np.zeros(rows, dtype=np.int64)
        self._steps = np.zeros(rows, dtype=np.int64)  # since the end of its prompt
        self._used = np.zeros(rows, dtype=np.int64)  # the step that used it last
        self._step = 0

    def plan(self, batch: Batch) -> Plan:
        """The kinds of the rows of one step; afterwards their state is that of the step."""
        self._step += 1
        states = self._known(batch)
        active, known = batch.queries > 0, states != NOWHERE
        decodes = active & (batch.queries == 1) & ~batch.prefilling
        if batch.requests is None:
            self._provide(states, active & ~known)
        else:
            states[active] = batch.requests[active]
        kinds = np.full(len(states), Kind.IDLE, dtype=np.int8)
        kinds[active] = Kind.PROMPT
        kinds[decodes] = Kind.LOST
        steps = np.where(decodes & known, self._steps[states] + 1, 0)
        due = self._due(steps, batch.ends)
        kinds[decodes & known] = Kind.PARTIAL
        kinds[decodes & known & due] = Kind.DUE if self.asks else Kind.FULL
        if batch.written is not None:
            self._last[np.isin(self._last, batch.written)] = NOWHERE
        now = states[active]
        self._last[now], self._ends[now] = batch.last[active], batch.ends[active]
        self._steps[now], self._used[now] = steps[active], self._step
        made = (kinds == Kind.PROMPT) | (kinds == Kind.LOST)
        self.lengths[states[made]] = batch.ends[made]
        lengths = np.where(active, self.lengths[states], 0)
        return Plan(kinds, states, lengths, bool(made.any()))

    def _due(self, steps: Numbers, ends: Numbers) -> NDArray[np.bool_]:
        if self.stride is None:
            return np.zeros(len(steps), dtype=np.bool_)
        return (ends if self.stagger else steps) % self.stride == 0

    def _known(self, batch: Batch) -> Numbers:
        """The state that fits each row, `NOWHERE` for none; no two rows have the same."""
        before = batch.ends - batch.queries
        if batch.requests is None:
            fits = (self._last == batch.previous[:, None]) & (self._ends == before[:, None])
            found = np.where(fits.any(1), fits.argmax(1), NOWHERE)
        else:
            own = batch.requests
            fits = (self._last[own] == batch.previous) & (self._ends[own] == before)
            found = np.where(fits, own, NOWHERE)
        found = np.where((batch.queries > 0) & (before > 0), found, NOWHERE)
        _, first = np.unique(found, return_index=True)
        only = np.full_like(found, NOWHERE)
        only[first] = found[first]
        return only

    def _provide(self, states: Numbers, wanted: NDArray[np.bool_]) -> None:
        """State rows that no other row of the step has, the longest unused first, for the rows `wanted`."""
        count = int(wanted.sum())
        if not count:
            return
        free = np.ones(len(self._last), dtype=np.bool_)
        free[states[states != NOWHERE]] = False
        order = np.argsort(np.where(free, self._used, np.iinfo(np.int64).max), kind="stable")
        states[wanted] = order[:count]
