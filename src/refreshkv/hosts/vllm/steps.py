"""The rows of one step, sorted by what they do: which decode, which bring a prompt, which blocks they complete.

Host arrays decide, device tensors go to the kernels, and no loop goes over rows. `Common` is what is read of vLLM's
`CommonAttentionMetadata`. Letters: B rows, T tokens of a step, M pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refreshkv.config import BLOCK, RefreshConfig
from refreshkv.hosts.vllm.planner import Batch, Numbers, Plan, Planner

Where = slice | Tensor  # an index of a first dimension: a view where it can be one


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
        budget: `[B]` int64, K of each, a share taken of its tokens.
        finished: `[B]` int64, blocks of 64 tokens before its newest one.
        states: `[B]` int32, their rows of state; `None` where there is none.
        total: tokens of all of them.
    """

    tokens: Where
    blocks: Tensor
    ends: Tensor
    budget: Tensor
    finished: Tensor
    states: Tensor | None
    total: int

    def __len__(self) -> int:
        return len(self.ends)

    def some(self, at: Tensor) -> Rows:
        """Those at these places among them, with the pages of all; their `tokens` and `total` stay."""
        return replace(
            self,
            blocks=self.blocks[at],
            ends=self.ends[at],
            budget=self.budget[at],
            finished=self.finished[at],
            states=None if self.states is None else self.states[at],
        )


@dataclass(frozen=True)
class Fresh:
    """Blocks of 64 tokens that a step completes: `begin` to `end` `[B]` int64 of each row, at most `most` of one."""

    blocks: Tensor
    begin: Tensor
    end: Tensor
    most: int


@dataclass(frozen=True)
class Step:
    """What our part of a step does.

    Attributes:
        decodes: rows of one token that is generated; `None`: there are none.
        prompts: the others, by `Rows`, and how many tokens each has in this step; `None` likewise.
        fresh: blocks whose codes are due; `None` likewise.
        kinds: of the decoding rows, in the published mode.
    """

    decodes: Rows | None
    prompts: Rows | None
    prompt_rows: Numbers
    fresh: Fresh | None
    kinds: NDArray[np.int8] | None = None


class Sorter:
    """Makes a `Step` of what vLLM says.

    Args:
        page: tokens of a page.
        config: the settings.
        planner: of the published mode; `None` in the others.
    """

    def __init__(self, page: int, config: RefreshConfig, planner: Planner | None) -> None:
        self.page, self.config, self.planner = page, config, planner

    def sort(self, common: Common) -> Step:
        """The rows of a step by what they do."""
        starts = common.query_start_loc_cpu.numpy().astype(np.int64)
        queries = np.diff(starts)
        on_host = common.seq_lens_cpu_upper_bound
        lengths = common.seq_lens if common.seq_lens.device.type == "cpu" else on_host
        assert lengths is not None, "vLLM tells the lengths of its rows on the host"
        ends = lengths[: len(queries)].numpy().astype(np.int64)
        told = np.zeros(0) if common.is_prefilling is None else common.is_prefilling.numpy()
        prefilling = _padded(told, len(queries)).astype(bool)
        decodes = (queries == 1) & ~prefilling
        prompts = (queries > 0) & ~decodes
        plan = self._plan(common, starts, queries, ends, prefilling)
        return Step(
            self._rows(common, decodes, starts, ends, plan),
            self._rows(common, prompts, starts, ends, plan),
            np.flatnonzero(prompts),
            self._fresh(common, queries, ends) if self.config.rounds else None,
            None if plan is None else plan.kinds[decodes],
        )

    def _rows(
        self,
        common: Common,
        which: NDArray[np.bool_],
        starts: Numbers,
        ends: Numbers,
        plan: Plan | None,
    ) -> Rows | None:
        if not which.any():
            return None
        device = common.seq_lens.device
        at = place(np.flatnonzero(which), device)
        pages = -(-int(ends[which].max()) // self.page)
        states = None
        if plan is not None:
            states = there(torch.from_numpy(plan.states[which].astype(np.int32)), device)
        lengths = common.seq_lens[at].long()
        return Rows(
            place(starts[1:][which] - 1, device),
            common.block_table_tensor[at][:, :pages].contiguous(),
            lengths,
            there(torch.from_numpy(self._budgets(ends[which])), device),
            (lengths - 1) // BLOCK,
            states,
            int(ends[which].sum()),
        )

    def _budgets(self, ends: Numbers) -> Numbers:
        """K of rows with so many tokens: `RefreshConfig.resolve_budget` of many."""
        share = self.config.budget
        if isinstance(share, int):
            return np.full_like(ends, share)
        return np.maximum(1, np.ceil(np.round(share * ends, 9))).astype(np.int64)

    def _fresh(self, common: Common, queries: Numbers, ends: Numbers) -> Fresh | None:
        begin, end = (ends - queries) // BLOCK, ends // BLOCK
        which = (queries > 0) & (end > begin)
        if not which.any():
            return None
        device = common.seq_lens.device
        at = place(np.flatnonzero(which), device)
        pages = -(-int(ends[which].max()) // self.page)
        lengths = common.seq_lens[at].long()
        new = there(torch.from_numpy(queries[which]), device)
        return Fresh(
            common.block_table_tensor[at][:, :pages].contiguous(),
            (lengths - new) // BLOCK,
            lengths // BLOCK,
            int((end - begin)[which].max()),
        )

    def _plan(
        self,
        common: Common,
        starts: Numbers,
        queries: Numbers,
        ends: Numbers,
        prefilling: NDArray[np.bool_],
    ) -> Plan | None:
        if self.planner is None:
            return None
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
        return self.planner.plan(
            Batch(queries, ends, last, previous, prefilling, requests, written)
        )


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
