"""One layer's decode rows, mode by mode: one operation over all rows, whatever the engine mixes in a step.

Letters: B rows, Hq query heads, Hkv KV heads, D head dim, R rows of state, K slots of a list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm.pages import Pages
from refreshkv.hosts.vllm.planner import Kind
from refreshkv.hosts.vllm.steps import Fresh, Held, Rows, Step, there
from refreshkv.kernels.backend import Backend, backend_for
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.kernels.reference.rings import STATE
from refreshkv.mixed import COPY_COUNTS
from refreshkv.policy.selection import FREE
from refreshkv.stats import COUNTS

USED = STATE.index("used")
Kinds = NDArray[np.int8]
Told = Kinds | Held | None  # what rows do in the published mode
# Bytes that kernels may put down of a step. vLLM does not see it in a step: `serving` shows it such a tensor before.
SCRATCH = 1 << 30


class Decoding(ABC):
    """What a layer does with its decode rows, and before it with what the step wrote.

    Args:
        config: the settings.
        options: how the model attends.
        device: of its tensors.
    """

    def __init__(self, config: RefreshConfig, options: AttendOptions, device: torch.device) -> None:
        self.config, self.options = config, options
        self.backend: Backend = backend_for(device)

    def learn(self, pages: Pages, step: Step, query: Tensor) -> None:  # noqa: B027, most modes learn nothing
        """The step's tokens are in the pages, and its prompts attended; `query` `[T, Hq, D]` is that of all tokens."""

    def attend(self, query: Tensor, pages: Pages, step: Step, tally: Tensor) -> Tensor:
        """Attention of the decode rows, `[B, Hq, D]` -> `[B, Hq, D]`.

        `tally` `[B, Hkv, 5]` int64 is added to, in the order of `stats.COUNTS`.
        """
        rows = step.decodes
        assert rows is not None
        some = parts(query, rows, pages.size)
        told = step.kinds if step.held is None else step.held
        if len(some) == 1:
            return self._attend(query, pages, rows, told, tally)
        output = torch.empty_like(query)
        for at in some:
            own = None if told is None else told[at]
            output[at] = self._attend(query[at], pages, rows.some(at), own, tally[at])
        return output

    @abstractmethod
    def _attend(self, query: Tensor, pages: Pages, rows: Rows, told: Told, tally: Tensor) -> Tensor:
        """As `attend`, of so few rows that there is room for what the kernels put down; `told` is what they do."""


class Full(Decoding):
    """`mode="full"`: our kernels read everything."""

    def _attend(self, query: Tensor, pages: Pages, rows: Rows, told: Told, tally: Tensor) -> Tensor:
        tally[..., COUNTS.index("full")].add_(rows.ends.clamp(max=1)[:, None])
        tally[..., COUNTS.index("read")].add_(rows.ends[:, None])
        options = self.options.over(lengths=rows.ends[:, None])
        return self.backend.attend(query, pages.entries(rows.blocks), options).output


class Mixed(Decoding):
    """`mode="mixed"`: codes of all blocks that are complete, and exactly the few entries that have weight.

    It keeps no state of a request: a block's codes belong to the block, and K follows from the row's length.
    """

    def learn(self, pages: Pages, step: Step, query: Tensor) -> None:
        fresh: Fresh | None = step.fresh
        if fresh is not None:
            self.backend.encode(
                pages.entries(fresh.blocks),
                pages.codes_at(fresh.blocks),
                first=fresh.first,
                begin=fresh.begin,
                end=fresh.end,
                most=fresh.most,
            )

    def _attend(self, query: Tensor, pages: Pages, rows: Rows, told: Told, tally: Tensor) -> Tensor:
        return self.backend.attend_mixed(
            query,
            pages.entries(rows.blocks),
            pages.codes_at(rows.blocks),
            self.options.over(lengths=rows.ends[:, None]),
            first=rows.first,
            finished=rows.finished,
            budget=rows.budget,
            skip=self.config.skip,
            tally=tally[..., COPY_COUNTS],
        ).output


@dataclass(frozen=True)
class Asked:
    """What the trigger finds of some rows.

    Attributes:
        states: `[B]` int64, their rows of state.
        before, own: `[B, Hkv, D]`, what is remembered of the query of their last full step, and what to of this one.
        drifted: `[B, Hkv]` bool, whose query has moved away from that.
    """

    states: Tensor
    before: Tensor
    own: Tensor
    drifted: Tensor


class Refresh(Decoding):
    """`mode="refresh"`: the published method over lists of positions, one for each row of state and KV head.

    Args:
        rows: R; there is one more, for padding.
        slots: K, the most that a budget can be.
        heads: Hkv.
        dim: D.
    """

    def __init__(
        self,
        config: RefreshConfig,
        options: AttendOptions,
        device: torch.device,
        *,
        rows: int,
        slots: int,
        heads: int,
        dim: int,
    ) -> None:
        super().__init__(config, options, device)
        shape = rows + 1, heads
        self.positions = torch.full((*shape, slots), FREE, dtype=torch.int32, device=device)
        self.state = torch.zeros(len(STATE), *shape, dtype=torch.int64, device=device)
        self.asks = config.threshold is not None and config.stride is not None
        # The query of the last full step of each row and head, averaged as the trigger compares it.
        self.reference = torch.zeros(*shape, dim if self.asks else 0, device=device)

    def learn(self, pages: Pages, step: Step, query: Tensor) -> None:
        rows = step.prompts
        if rows is None:
            return
        own = query[rows.tokens]
        for at in parts(own, rows, pages.size):
            self._learn(own[at], pages, rows.some(at))

    def _learn(self, query: Tensor, pages: Pages, rows: Rows) -> None:
        options = self.options.over(lengths=rows.ends[:, None])
        scores = self.backend.score(query, pages.entries(rows.blocks), options).scores
        self._select(scores, query, pages, rows)

    def _attend(self, query: Tensor, pages: Pages, rows: Rows, told: Told, tally: Tensor) -> Tensor:
        if isinstance(told, Held):
            return self._held(query, pages, rows, told, tally)
        assert told is not None
        full = (told == Kind.FULL) | (told == Kind.LOST)
        if full.all():
            return self._full(query, pages, rows, tally)
        if not full.any():
            return self._partial(query, pages, rows, told, tally)
        output = torch.empty_like(query)
        at = indices(full, query)
        output[at] = self._full(query[at], pages, rows.some(at), tally[: len(at)])
        at = indices(~full, query)
        output[at] = self._partial(query[at], pages, rows.some(at), told[~full], tally[: len(at)])
        return output

    def _held(self, query: Tensor, pages: Pages, rows: Rows, told: Held, tally: Tensor) -> Tensor:
        """Partial attention of all rows, and over it the full one of those heads that want it."""
        heads, asked = told.full[:, None].expand(-1, self.positions.shape[1]), None
        if self.asks:
            asked = self._ask(query, rows)
            heads = heads | (told.due[:, None] & asked.drifted)
        heads = heads.contiguous()
        output = self._listed(query, pages, rows, tally, heads)
        return self._full(query, pages, rows, tally, heads, output, asked)

    def _partial(
        self, query: Tensor, pages: Pages, rows: Rows, kinds: Kinds, tally: Tensor
    ) -> Tensor:
        """Attention over the lists; rows that are due ask their query, head by head, whether that will do."""
        due = indices(kinds == Kind.DUE, query)
        if not len(due):
            return self._listed(query, pages, rows, tally, None)
        own, again = query[due], rows.some(due)
        asked = self._ask(own, again)
        heads = query.new_zeros(len(rows), self.positions.shape[1], dtype=torch.bool)
        heads[due] = asked.drifted
        output = self._listed(query, pages, rows, tally, heads)
        if bool(asked.drifted.any()):
            given = own, pages, again, tally[: len(due)]
            output[due] = self._full(*given, asked.drifted, output[due], asked)
        return output

    def _listed(
        self, query: Tensor, pages: Pages, rows: Rows, tally: Tensor, full: Tensor | None
    ) -> Tensor:
        """The new token enters the lists, and attention over these; heads that are `full` `[B, Hkv]` count no reads."""
        assert rows.states is not None
        entries = pages.entries(rows.blocks, rows=rows.states)
        self.backend.push(entries, rows.ends, back=1, **self._ring(rows), full=full, tally=tally)
        listed = Entries(entries.keys, entries.values, rows.blocks, self.positions, rows.states)
        used = self.state[USED].index_select(0, rows.states)
        return self.backend.attend(query, listed, self.options.over(lengths=used)).output

    def _full(
        self,
        query: Tensor,
        pages: Pages,
        rows: Rows,
        tally: Tensor,
        heads: Tensor | None = None,
        output: Tensor | None = None,
        asked: Asked | None = None,
    ) -> Tensor:
        """Full attention of the `heads` `[B, Hkv]`, in the place of their `output` (`None`: all, anew); it selects."""
        options = self.options.over(lengths=rows.ends[:, None], heads=heads)
        attended, scored = self.backend.attend_and_score(
            query, pages.entries(rows.blocks), options, into=output
        )
        self._select(scored.scores, query, pages, rows, heads, tally, asked)
        return attended.output

    def _ask(self, query: Tensor, rows: Rows) -> Asked:
        """What the queries of these rows say."""
        assert rows.states is not None
        states = rows.states.long()
        before = self.reference[states]
        drifted, own = self.backend.drift(
            query,
            before,
            self.state[:, states].contiguous(),
            stride=1,  # the planner counts steps, so here every step is the due one
            threshold=self.config.threshold,
            per_head=self.config.decide == "head",
        )
        return Asked(states, before, own, drifted)

    def _select(
        self,
        scores: Tensor,
        query: Tensor,
        pages: Pages,
        rows: Rows,
        heads: Tensor | None = None,
        tally: Tensor | None = None,
        asked: Asked | None = None,
    ) -> None:
        """New lists for the `heads` `[B, Hkv]` (`None`: all) from `scores` `[B, Hkv, n]`; the query is remembered."""
        assert rows.states is not None
        selected = self.backend.select(
            scores,
            rows.budget,
            pool_kernel=self.config.pool_kernel,
            heads=heads,
            ends=rows.ends,
            slots=min(self.positions.shape[2], scores.shape[2]),
        )
        self.backend.refresh(
            pages.entries(rows.blocks, rows=rows.states),
            selected.positions,
            selected.filled,
            **self._ring(rows),
            heads=heads,
            ends=rows.ends,
            hidden=rows.first,
            tally=tally,
        )
        if self.asks:
            asked = asked or self._ask(query, rows)
            new = asked.own
            if heads is not None:
                new = torch.where(heads[..., None], new, asked.before)
            self.reference[asked.states] = new

    def _ring(self, rows: Rows) -> dict[str, Tensor | None]:
        return {
            "ring_keys": None,
            "ring_values": None,
            "ring_positions": self.positions,
            "state": self.state,
            "budget": rows.room,
        }


def parts(query: Tensor, rows: Rows, page: int) -> list[slice]:
    """The rows in as many parts as keep what the kernels put down of them within `SCRATCH`."""
    each = scratch(1, query.shape[1], rows.blocks.shape[1] * page)
    most = max(1, SCRATCH // max(1, each))
    return [slice(first, first + most) for first in range(0, len(rows), most)]


def scratch(rows: int, heads: int, length: int) -> int:
    """Bytes that the kernels put down of so many rows: a float32 of each query head and position."""
    return 4 * rows * heads * length


def indices(which: NDArray[np.bool_], like: Tensor) -> Tensor:
    """Where a host array is True, on the device of `like`."""
    return there(torch.from_numpy(np.flatnonzero(which)), like.device)
