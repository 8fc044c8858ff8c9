"""The rows of one step, sorted by what they do: which decode, which bring a prompt, which blocks they complete.

Host arrays decide, device tensors go to the kernels, and no loop goes over rows. `Common` is what is read of vLLM's
`CommonAttentionMetadata`. Letters: B rows, T tokens of a step, M pages of a row, R rows of state.

A CUDA graph is captured over tensors, and replayed without asking anybody. So a step that a graph may serve is *held*:
it is told in the same tensors each time, for all rows alike, with nothing that depends on what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refreshkv.config import BLOCK, RefreshConfig
from refreshkv.hosts.vllm.planner import NOWHERE, Batch, Kind, Numbers, Plan, Planner

Where = slice | Tensor  # an index of a first dimension: a view where it can be one
Flags = NDArray[np.bool_]


class Common(Protocol):
    """What is read of `vllm.v1.attention.backend.CommonAttentionMetadata`."""

    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    seq_lens_cpu_upper_bound: Tensor | None
    is_prefilling: Tensor | None
    block_table_tensor: Tensor
    slot_mapping: Tensor
    req_idx: NDArray[np.int64] | None


@dataclass(frozen=True)
class Rows:
    """Some rows of a step, in the order of the batch.

    Attributes:
        tokens: the last token of each among the T of the step.
        blocks: `[B, M]` int32, their pages, no more than the longest has.
        ends: `[B]` int64, tokens of each.
        first: `[B]` int64, where the first block of each begins: 0.
        finished: `[B]` int64, blocks of 64 tokens before its newest one.
        budget: `[B]` int64, K of each.
        states: `[B]` int32, their rows of state; `None` where there is none.
        room: `[R + 1]` int64, K of each row of state, and of one for padding; `None` likewise.
    """

    tokens: Where
    blocks: Tensor
    ends: Tensor
    first: Tensor
    finished: Tensor
    budget: Tensor
    states: Tensor | None
    room: Tensor | None

    def __len__(self) -> int:
        return len(self.ends)

    def some(self, at: Where) -> Rows:
        """Those at these places among them, with the pages of all; their `tokens` stay."""
        return replace(
            self,
            blocks=self.blocks[at],
            ends=self.ends[at],
            first=self.first[at],
            finished=self.finished[at],
            budget=self.budget[at],
            states=None if self.states is None else self.states[at],
        )


@dataclass(frozen=True)
class Fresh:
    """Blocks of 64 tokens that a step completes: `begin` to `end` `[B]` int64 of each row, at most `most` of one."""

    blocks: Tensor
    first: Tensor
    begin: Tensor
    end: Tensor
    most: int


@dataclass(frozen=True)
class Held:
    """What the rows of a held step do in the published mode, `[B]` bool each.

    Attributes:
        full: all heads read everything.
        due: those read everything whose query says so.
    """

    full: Tensor
    due: Tensor

    def __getitem__(self, at: slice) -> Held:
        return Held(self.full[at], self.due[at])


@dataclass(frozen=True)
class Step:
    """What our part of a step does.

    Attributes:
        decodes: rows of one token that is generated; `None`: there are none. In a held step all rows: also those that
            bring a prompt's last token by itself, and padding, which has no tokens.
        prompts: the others, by `Rows`, and how many tokens each has in this step; `None` likewise.
        fresh: blocks whose codes are due; `None` likewise.
        kinds: of the rows in `decodes`, in the published mode.
        held: the same of a held step; `None` in the others.
        count, entries: decode rows that are no padding, and tokens of all of them.
        begins: a prompt is among the rows, so that this is no trial of vLLM's before it serves anybody.
    """

    decodes: Rows | None
    prompts: Rows | None
    prompt_rows: Numbers
    fresh: Fresh | None
    kinds: NDArray[np.int8] | None
    held: Held | None
    count: int
    entries: int
    begins: bool


@dataclass(frozen=True)
class _Told:
    """What vLLM says of the B rows on the host.

    Attributes:
        starts: `[B + 1]`, where the tokens of each begin among those of the step.
        queries: tokens of each in the step.
        ends: tokens of each after it.
        prefilling: rows that had not reached the end of their prompt before.
    """

    starts: Numbers
    queries: Numbers
    ends: Numbers
    prefilling: Flags

    @classmethod
    def of(cls, common: Common) -> _Told:
        starts = common.query_start_loc_cpu.numpy().astype(np.int64)
        count = len(starts) - 1
        on_host = common.seq_lens_cpu_upper_bound
        lengths = common.seq_lens if common.seq_lens.device.type == "cpu" else on_host
        assert lengths is not None, "vLLM tells the lengths of its rows on the host"
        ends = _padded(lengths.numpy().astype(np.int64), count)
        told = np.zeros(0) if common.is_prefilling is None else common.is_prefilling.numpy()
        return cls(starts, np.diff(starts), ends, _padded(told, count).astype(bool))

    @property
    def single(self) -> bool:
        """No row has more than one token: a graph of the whole step may serve it."""
        return bool((self.queries <= 1).all())


class Sorter:
    """Makes a `Step` of what vLLM says.

    Args:
        page: tokens of a page.
        config: the settings.
        planner: of the published mode; `None` in the others.
        rows: the most that a step has.
        device: of the tensors.
    """

    def __init__(
        self,
        page: int,
        config: RefreshConfig,
        planner: Planner | None,
        *,
        rows: int,
        device: torch.device,
    ) -> None:
        self.page, self.config, self.planner, self.device = page, config, planner, device
        self._rows, self._captured = rows, 0
        self._room = None
        if planner is not None:
            self._room = torch.zeros(rows + 1, dtype=torch.int64, device=device)

    def capture(self, common: Common) -> Step:
        """The step that a CUDA graph is captured over. From here on steps that this graph may serve are held."""
        told = _Told.of(common)
        if told.single:
            if not self._captured:
                self._hold()
            self._captured = max(self._captured, len(told.queries))
        return self.sort(common)

    def sort(self, common: Common) -> Step:
        """The rows of a step by what they do."""
        told = _Told.of(common)
        plan = self._plan(common, told)
        if len(told.queries) <= self._captured and told.single:
            return self._held(common, told, plan)
        decodes = (told.queries == 1) & ~told.prefilling
        prompts = (told.queries > 0) & ~decodes
        return Step(
            decodes=self._some(common, decodes, told, plan),
            prompts=self._some(common, prompts, told, plan),
            prompt_rows=np.flatnonzero(prompts),
            fresh=self._fresh(common, told) if self.config.rounds else None,
            kinds=None if plan is None else plan.kinds[decodes],
            held=None,
            count=int(decodes.sum()),
            entries=int(told.ends[decodes].sum()),
            begins=bool(told.prefilling.any()),
        )

    def _some(self, common: Common, which: Flags, told: _Told, plan: Plan | None) -> Rows | None:
        if not which.any():
            return None
        at = place(np.flatnonzero(which), self.device)
        pages = -(-int(told.ends[which].max()) // self.page)
        states, lengths = None, told.ends
        if plan is not None:
            states, lengths = self._there(plan.states[which].astype(np.int32)), plan.lengths
        ends = common.seq_lens[at].long()
        return Rows(
            tokens=place(told.starts[1:][which] - 1, self.device),
            blocks=common.block_table_tensor[at][:, :pages].contiguous(),
            ends=ends,
            first=torch.zeros_like(ends),
            finished=(ends - 1) // BLOCK,
            budget=self._there(self._budgets(lengths[which])),
            states=states,
            room=self._room,
        )

    def _fresh(self, common: Common, told: _Told) -> Fresh | None:
        begin, end = (told.ends - told.queries) // BLOCK, told.ends // BLOCK
        which = (told.queries > 0) & (end > begin)
        if not which.any():
            return None
        at = place(np.flatnonzero(which), self.device)
        pages = -(-int(told.ends[which].max()) // self.page)
        ends = common.seq_lens[at].long()
        return Fresh(
            blocks=common.block_table_tensor[at][:, :pages].contiguous(),
            first=torch.zeros_like(ends),
            begin=(ends - self._there(told.queries[which])) // BLOCK,
            end=ends // BLOCK,
            most=int((end - begin)[which].max()),
        )

    def _hold(self) -> None:
        """Make the tensors of held steps."""
        numbers = torch.zeros(5, self._rows, dtype=torch.int64, device=self.device)
        self._ends, self._first, self._finished, self._complete, self._budget = numbers
        self._states = torch.zeros(self._rows, dtype=torch.int32, device=self.device)
        self._full, self._due = torch.zeros(2, self._rows, dtype=torch.bool, device=self.device)

    def _held(self, common: Common, told: _Told, plan: Plan | None) -> Step:
        """As `sort`, where every row has one token or none: all of it in the tensors of before."""
        count, real = len(told.queries), told.queries > 0
        ends, finished, complete = (
            part[:count] for part in (self._ends, self._finished, self._complete)
        )
        ends.copy_(common.seq_lens[:count])
        torch.div((ends - 1).clamp(min=0), BLOCK, rounding_mode="floor", out=finished)
        torch.div(ends, BLOCK, rounding_mode="floor", out=complete)
        states = held = None
        if plan is None:  # a prompt's last token by itself reads all there is, as other prompts do
            budgets = np.where(told.prefilling, told.ends, self._budgets(told.ends))
        else:
            budgets = self._budgets(plan.lengths)
            states, held = self._states[:count], Held(self._full[:count], self._due[:count])
            own = np.where(plan.states == NOWHERE, self._rows, plan.states)
            states.copy_(self._there(own.astype(np.int32)))
            held.full.copy_(self._there(np.isin(plan.kinds, (Kind.PROMPT, Kind.FULL, Kind.LOST))))
            held.due.copy_(self._there(plan.kinds == Kind.DUE))
        self._budget[:count].copy_(self._there(budgets))
        rows = Rows(
            tokens=slice(0, count),
            blocks=common.block_table_tensor[:count],
            ends=ends,
            first=self._first[:count],
            finished=finished,
            budget=self._budget[:count],
            states=states,
            room=self._room,
        )
        fresh = Fresh(rows.blocks, rows.first, begin=finished, end=complete, most=1)
        return Step(
            decodes=rows,
            prompts=None,
            prompt_rows=np.zeros(0, np.int64),
            fresh=fresh if self.config.rounds else None,
            kinds=None if plan is None else plan.kinds,
            held=held,
            count=int(real.sum()),
            entries=int(told.ends[real].sum()),
            begins=bool(told.prefilling.any()),
        )

    def _budgets(self, lengths: Numbers) -> Numbers:
        """K of rows with so many tokens: `RefreshConfig.resolve_budget` of many."""
        share = self.config.budget
        if isinstance(share, int):
            return np.full_like(lengths, share)
        return np.maximum(1, np.ceil(np.round(share * lengths, 9))).astype(np.int64)

    def _plan(self, common: Common, told: _Told) -> Plan | None:
        if self.planner is None:
            return None
        starts, queries, ends = told.starts, told.queries, told.ends
        requests = None
        if common.req_idx is not None:
            requests = _padded(np.asarray(common.req_idx, dtype=np.int64), len(ends))
        written = None
        if common.slot_mapping.device.type == "cpu":
            written = common.slot_mapping.numpy()[: starts[-1]].astype(np.int64)
            last = written[np.maximum(starts[1:] - 1, 0)]
            before = np.maximum(ends - queries - 1, 0)
            pages = common.block_table_tensor.numpy()[np.arange(len(ends)), before // self.page]
            previous = pages.astype(np.int64) * self.page + before % self.page
        else:  # the place is on the device, and the number of the request says as much
            assert requests is not None, "vLLM numbers the requests of a step"
            last = previous = requests
        plan = self.planner.plan(
            Batch(queries, ends, last, previous, told.prefilling, requests, written)
        )
        if plan.news:
            assert self._room is not None
            self._room[:-1].copy_(self._there(self._budgets(self.planner.lengths)))
        return plan

    def _there(self, numbers: NDArray[Any]) -> Tensor:
        return there(torch.from_numpy(numbers), self.device)


def place(numbers: Numbers, device: torch.device) -> Where:
    """An index of these numbers, which rise: a slice where they follow each other."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return there(torch.from_numpy(numbers), device)


def there(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the host on the device, which nobody waits for."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _padded(told: NDArray[Any], count: int) -> NDArray[Any]:
    """What is told of `count` rows; zeros for padding rows, of which vLLM says nothing."""
    return np.concatenate([told[:count], np.zeros(max(0, count - len(told)), told.dtype)])
