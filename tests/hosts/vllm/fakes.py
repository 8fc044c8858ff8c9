"""What vLLM gives a layer, without vLLM: a cache in pages, the description of a step, and a server of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm.decoding import Decoding, Full, Mixed, Refresh
from refreshkv.hosts.vllm.pages import Pages, PageShape
from refreshkv.hosts.vllm.planner import Planner
from refreshkv.hosts.vllm.steps import Sorter, Step
from refreshkv.kernels.operators import OPERATORS
from refreshkv.kernels.options import AttendOptions
from refreshkv.stats import COUNTS
from tests.helpers import Tokens
from tests.tape import Tape

CPU = torch.device("cpu")
# Order of heads, tokens and dims in a page, and layers that a block has before the next block begins.
LAYOUTS = {
    "LBHNC": ((0, 1, 2), 1),
    "LBNHC": ((1, 0, 2), 1),
    "BLHNC": ((0, 1, 2), 3),
    "BLNHC": ((1, 0, 2), 3),
}


@dataclass
class Common:
    """`vllm.v1.attention.backend.CommonAttentionMetadata`, what is touched of it."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    positions: Tensor | None = None
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    req_idx: Any = None
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None = None
    _num_computed_tokens_cache: Tensor | None = None
    _token_to_req_indices_cache: Tensor | None = None


@dataclass
class Row:
    """`queries` tokens of a row in a step, after which it has `end`, in these pages."""

    queries: int
    end: int
    blocks: list[int] = field(default_factory=lambda: [0])
    prefilling: bool = False
    request: int | None = None


def describe(rows: list[Row], page: int, *, padding: int = 0) -> Common:
    """The step of these rows; of the `padding` rows behind them nothing is told but that they have no tokens."""
    starts = np.cumsum([0, *[row.queries for row in rows], *[0] * padding])
    ends = torch.tensor([row.end for row in rows] + [0] * padding, dtype=torch.int32)
    table = torch.zeros(
        len(rows) + padding, max(len(row.blocks) for row in rows), dtype=torch.int32
    )
    slots = []
    for index, row in enumerate(rows):
        table[index, : len(row.blocks)] = torch.tensor(row.blocks)
        slots += [
            row.blocks[p // page] * page + p % page for p in range(row.end - row.queries, row.end)
        ]
    begins = torch.tensor(starts, dtype=torch.int32)
    told = [row.request for row in rows if row.request is not None]
    return Common(
        query_start_loc=begins.clone(),
        query_start_loc_cpu=begins,
        seq_lens=ends,
        num_reqs=len(rows) + padding,
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(row.queries for row in rows),
        max_seq_len=int(ends.max()),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        is_prefilling=torch.tensor([row.prefilling for row in rows]),
        seq_lens_cpu_upper_bound=ends.clone(),
        req_idx=np.array(told) if told else None,
    )


def into_place(common: Common, ends: Tensor, blocks: Tensor) -> Common:
    """As vLLM does it: what a graph reads lies in the same place in all steps."""
    count, pages = common.block_table_tensor.shape
    ends[:count] = common.seq_lens
    blocks[:count, :pages] = common.block_table_tensor  # behind them is what was there
    common.seq_lens, common.block_table_tensor = ends[:count], blocks[:count]
    return common


def cache_of(
    shape: PageShape, pages: int, layout: str = "LBNHC", layer: int = 0
) -> tuple[Tensor, Tensor]:
    """The cache of one layer `[N, Hkv, P, D + Dv]` and all bytes behind it `[N, layers, bytes of a page]`."""
    order, layers = LAYOUTS[layout]
    raw = torch.zeros(pages, layers, shape.bytes, dtype=torch.uint8)
    sizes = shape.heads, shape.tokens, sum(shape.dims)
    strides, reach = [0, 0, 0], 1
    for axis in reversed(order):
        strides[axis], reach = reach, reach * sizes[axis]
    page = layers * shape.bytes // shape.dtype.itemsize
    begin = layer * shape.bytes // shape.dtype.itemsize
    return raw.flatten().view(shape.dtype).as_strided((pages, *sizes), (page, *strides), begin), raw


class Server:
    """One layer and the requests it serves, each a row of `tokens`; a step is a list of requests and token counts.

    Args:
        tokens: of each request, as long as it will ever be.
        prompts: tokens of each prompt.
        slots: most requests of a step.
        numbered: the engine numbers its requests.
        graphs: rows of which steps of decode rows are recorded once, and then replayed for as many rows and fewer.
    """

    def __init__(
        self,
        config: RefreshConfig,
        tokens: Tokens,
        prompts: list[int],
        *,
        page: int = 64,
        layout: str = "LBNHC",
        stagger: bool = False,
        numbered: bool = False,
        slots: int = 8,
        graphs: tuple[int, ...] = (),
        options: AttendOptions | None = None,
    ) -> None:
        self.tokens, self.prompts, self.page, self.numbered = tokens, prompts, page, numbered
        rows, heads, length, dim = tokens.keys.shape
        each = -(-length // page)
        mixed = config if config.rounds else None
        self.shape = PageShape(heads, page, (dim, dim), tokens.keys.dtype, mixed)
        cache, _ = cache_of(self.shape, rows * each + 1, layout)
        cache.fill_(torch.nan)  # what a new page holds counts for nothing
        self.pages = Pages.of(cache, self.shape)
        mixed_up = torch.randperm(rows * each, generator=torch.Generator().manual_seed(1)) + 1
        self.blocks = mixed_up.reshape(rows, each).tolist()
        self.ends = [0] * rows
        planner = None
        options = options or AttendOptions(scale=dim**-0.5, reduction=config.group_reduction)
        if config.mode == "refresh":
            planner = Planner(
                slots, config.stride, asks=config.threshold is not None, stagger=stagger
            )
            size = config.resolve_budget(length)
            self.decoding: Decoding = Refresh(
                config, options, CPU, rows=slots, slots=size, heads=heads, dim=dim
            )
        else:
            self.decoding = {"mixed": Mixed, "full": Full}[config.mode](config, options, CPU)
        self.sorter = Sorter(page, config, planner, rows=slots, device=CPU)
        self.tally = torch.zeros(slots, heads, len(COUNTS), dtype=torch.int64)
        query_heads = tokens.queries.shape[1]
        self.inputs = (
            torch.zeros(slots, query_heads, dim),
            torch.zeros(slots, dtype=torch.int32),
            torch.zeros(slots, each, dtype=torch.int32),
        )
        if graphs:  # as operators, which a tape sees
            self.decoding.backend = OPERATORS
        self.replayed = 0
        self.graphs = {count: self._recorded(count) for count in sorted(graphs, reverse=True)}

    def step(self, *scheduled: tuple[int, int], padding: int = 0) -> dict[int, Tensor]:
        """The outputs `[Hq, D]` of the requests that decode."""
        rows, queries = [], []
        for request, count in scheduled:
            begin, end = self.ends[request], self.ends[request] + count
            blocks = self.blocks[request][: -(-end // self.page)]
            prefilling = begin < self.prompts[request]
            number = request if self.numbered else None
            rows.append(Row(count, end, blocks, prefilling, number))
            queries.append(self.tokens.queries[request, :, begin:end].transpose(0, 1))
            self._write(request, begin, end)
            self.ends[request] = end
        query = torch.cat(queries)
        captured = [count for count in self.graphs if count >= len(rows)]
        if captured and len(query) == len(rows):
            outputs = self._replay(rows, query, min(captured))
            given = zip(scheduled, rows, outputs, strict=False)
            return {request: out for (request, _), row, out in given if not row.prefilling}
        step: Step = self.sorter.sort(describe(rows, self.page, padding=padding))
        self.decoding.learn(self.pages, step, query)
        if step.decodes is None:
            return {}
        at = step.decodes.tokens
        output = self.decoding.attend(query[at], self.pages, step, self.tally[: len(step.decodes)])
        decoding = [
            r for (r, n), row in zip(scheduled, rows, strict=True) if n == 1 and not row.prefilling
        ]
        return dict(zip(decoding, output, strict=True))

    def _recorded(self, count: int) -> Any:
        """What replays a step of so many rows, over `inputs`; it is recorded with rows of one token in page 0."""
        rows = [Row(1, 1, [0], request=row if self.numbered else None) for row in range(count)]
        step = self.sorter.capture(into_place(describe(rows, self.page), *self.inputs[1:]))
        query, tally = self.inputs[0][:count], self.tally[:count]
        assert step.decodes is not None and step.prompts is None

        def run() -> Tensor:
            self.decoding.learn(self.pages, step, query)
            return self.decoding.attend(query, self.pages, step, tally)

        return Tape().record(run)

    def _replay(self, rows: list[Row], query: Tensor, count: int) -> Tensor:
        common = describe(rows, self.page, padding=count - len(rows))
        self.inputs[0][: len(rows)] = query
        self.sorter.sort(into_place(common, *self.inputs[1:]))
        self.replayed += 1
        return self.graphs[count]().clone()

    def _write(self, request: int, begin: int, end: int) -> None:
        for position in range(begin, end):
            page, inside = self.blocks[request][position // self.page], position % self.page
            self.pages.keys[page, :, inside] = self.tokens.keys[request, :, position]
            self.pages.values[page, :, inside] = self.tokens.values[request, :, position]
