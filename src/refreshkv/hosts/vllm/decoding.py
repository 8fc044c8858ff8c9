"""One layer's decode rows, mode by mode: one operation over all rows, whatever the engine mixes in a step.

Letters: B rows, Hq query heads, Hkv KV heads, D head dim, R rows of state, K slots of a list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm.pages import Pages
from refreshkv.hosts.vllm.planner import Kind
from refreshkv.hosts.vllm.steps import Fresh, Rows, Step, there
from refreshkv.kernels.backend import Backend, backend_for
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.kernels.reference.rings import STATE
from refreshkv.mixed import COPY_COUNTS
from refreshkv.policy.selection import FREE
from refreshkv.stats import COUNTS

USED = STATE.index("used")
Kinds = NDArray[np.int8]


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

    @abstractmethod
    def attend(self, query: Tensor, pages: Pages, step: Step, tally: Tensor) -> Tensor:
        """Attention of the decode rows, `[B, Hq, D]` -> `[B, Hq, D]`.

        `tally` `[B, Hkv, 5]` int64 is added to, in the order of `stats.COUNTS`.
        """


class Full(Decoding):
    """`mode="full"`: our kernels read everything."""

    def attend(self, query: Tensor, pages: Pages, step: Step, tally: Tensor) -> Tensor:
        rows = step.decodes
        assert rows is not None
        tally[..., COUNTS.index("full")] += 1
        tally[..., COUNTS.index("read")] += rows.ends[:, None]
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
                first=torch.zeros_like(fresh.begin),
                begin=fresh.begin,
                end=fresh.end,
                most=fresh.most,
            )

    def attend(self, query: Tensor, pages: Pages, step: Step, tally: Tensor) -> Tensor:
        rows = step.decodes
        assert rows is not None
        return self.backend.attend_mixed(
            query,
            pages.entries(rows.blocks),
            pages.codes_at(rows.blocks),
            self.options.over(lengths=rows.ends[:, None]),
            first=torch.zeros_like(rows.ends),
            finished=rows.finished,
            budget=rows.budget,
            skip=self.config.skip,
            tally=tally[..., COPY_COUNTS],
        ).output


class Refresh(Decoding):
    """`mode="refresh"`: the published method over lists of positions, one for each row of state and KV head.

    Args:
        rows: R.
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
        self.positions = torch.full((rows, heads, slots), FREE, dtype=torch.int32, device=device)
        self.state = torch.zeros(len(STATE), rows, heads, dtype=torch.int64, device=device)
        self.budget = torch.zeros(rows, dtype=torch.int64, device=device)
        asks = config.threshold is not None and config.stride is not None
        # The query of the last full step of each row and head, averaged as the trigger compares it.
        self.reference = torch.zeros(rows, heads, dim if asks else 0, device=device)
        self.asks = asks

    def learn(self, pages: Pages, step: Step, query: Tensor) -> None:
        rows = step.prompts
        if rows is None:
            return
        own = query[rows.tokens]
        options = self.options.over(lengths=rows.ends[:, None])
        scores = self.backend.score(own, pages.entries(rows.blocks), options).scores
        self._allow(rows)
        self._select(scores, own, pages, rows)

    def attend(self, query: Tensor, pages: Pages, step: Step, tally: Tensor) -> Tensor:
        rows, kinds = step.decodes, step.kinds
        assert rows is not None and kinds is not None
        full = (kinds == Kind.FULL) | (kinds == Kind.LOST)
        output = torch.empty_like(query)
        for which, run in ((full, self._refresh), (~full, self._partial)):
            if which.all():
                return run(query, pages, rows, kinds, tally)
            if which.any():
                at = indices(which, query)
                given = query[at], pages, rows.some(at), kinds[which]
                output[at] = run(*given, tally[: len(at)])
        return output

    def _refresh(
        self, query: Tensor, pages: Pages, rows: Rows, kinds: Kinds, tally: Tensor
    ) -> Tensor:
        """Full attention, and what it scores highest is selected."""
        options = self.options.over(lengths=rows.ends[:, None])
        attended, scored = self.backend.attend_and_score(query, pages.entries(rows.blocks), options)
        if (kinds == Kind.LOST).any():
            self._allow(rows.some(indices(kinds == Kind.LOST, query)))
        self._select(scored.scores, query, pages, rows, tally=tally)
        return attended.output

    def _partial(
        self, query: Tensor, pages: Pages, rows: Rows, kinds: Kinds, tally: Tensor
    ) -> Tensor:
        """Attention over the lists; rows that are due ask their query, head by head, whether that will do."""
        assert rows.states is not None
        entries = pages.entries(rows.blocks, rows=rows.states)
        due, heads = indices(kinds == Kind.DUE, query), None
        if len(due):
            heads = query.new_zeros(len(rows), self.positions.shape[1], dtype=torch.bool)
            heads[due], _ = self._drift(query[due], rows.states[due].long())
        self.backend.push(entries, rows.ends, back=1, **self._ring(), full=heads, tally=tally)
        listed = Entries(entries.keys, entries.values, rows.blocks, self.positions, rows.states)
        used = self.state[USED].index_select(0, rows.states)
        output = self.backend.attend(query, listed, self.options.over(lengths=used)).output
        if heads is None or not bool(heads.any()):
            return output
        again, wanted, own = rows.some(due), heads[due], query[due]
        options = self.options.over(lengths=again.ends[:, None], heads=wanted)
        attended, scored = self.backend.attend_and_score(
            own, pages.entries(again.blocks), options, into=output[due]
        )
        output[due] = attended.output
        self._select(scored.scores, own, pages, again, heads=wanted, tally=tally[: len(due)])
        return output

    def _drift(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Whose query has moved away from that of the last full step, `[B, Hkv]` bool; what to remember of it."""
        return self.backend.drift(
            query,
            self.reference[states],
            self.state[:, states].contiguous(),
            stride=1,  # the planner counts steps, so here every step is the due one
            threshold=self.config.threshold,
            per_head=self.config.decide == "head",
        )

    def _allow(self, rows: Rows) -> None:
        """K of these rows, from here on."""
        assert rows.states is not None
        self.budget[rows.states.long()] = rows.budget.clamp(max=self.positions.shape[2])

    def _select(
        self,
        scores: Tensor,
        query: Tensor,
        pages: Pages,
        rows: Rows,
        heads: Tensor | None = None,
        tally: Tensor | None = None,
    ) -> None:
        """New lists for the `heads` `[B, Hkv]` (`None`: all) from `scores` `[B, Hkv, n]`; the query is remembered."""
        assert rows.states is not None
        states = rows.states.long()
        selected = self.backend.select(
            scores,
            self.budget[states],
            pool_kernel=self.config.pool_kernel,
            heads=heads,
            ends=rows.ends,
            slots=min(self.positions.shape[2], scores.shape[2]),
        )
        self.backend.refresh(
            pages.entries(rows.blocks, rows=rows.states),
            selected.positions,
            selected.filled,
            **self._ring(),
            heads=heads,
            ends=rows.ends,
            hidden=torch.zeros_like(rows.ends),
            tally=tally,
        )
        if self.asks:
            _, new = self._drift(query, states)
            if heads is not None:
                new = torch.where(heads[..., None], new, self.reference[states])
            self.reference[states] = new

    def _ring(self) -> dict[str, Tensor | None]:
        return {
            "ring_keys": None,
            "ring_values": None,
            "ring_positions": self.positions,
            "state": self.state,
            "budget": self.budget,
        }


def indices(which: NDArray[np.bool_], like: Tensor) -> Tensor:
    """Where a host array is True, on the device of `like`."""
    return there(torch.from_numpy(np.flatnonzero(which)), like.device)
