"""A layer and its metadata builder, laid over vLLM's own: prompts go to the stock kernels, decode rows to ours.

`ServedBackend`, `ServedLayer` and `ServedBuilder` are mixed into the classes of a stock backend, which `super()` is
here. Layers that are not full attention (sliding windows, encoders) stay with it altogether. Letters as in `steps`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm import refusals, settings
from refreshkv.hosts.vllm.counters import Counter, Reporter, reporter_for
from refreshkv.hosts.vllm.decoding import SCRATCH, Decoding, Full, Mixed, Refresh, scratch
from refreshkv.hosts.vllm.pages import Pages, PageShape
from refreshkv.hosts.vllm.planner import Numbers, Planner
from refreshkv.hosts.vllm.steps import Sorter, Step, Where, place, there
from refreshkv.kernels.options import AttendOptions


@dataclass(frozen=True)
class Prompts:
    """Rows that the stock kernels attend together.

    Attributes:
        tokens: theirs among those of the step.
        stock: the metadata of the stock backend for them alone.
        more: what a subclass of `ServedBuilder` adds.
    """

    tokens: Where
    stock: Any
    more: Any = None


@dataclass(frozen=True)
class ServedMetadata:
    """What a served layer gets for one step."""

    step: Step
    prompts: Sequence[Prompts]
    counter: Counter


class ServedBackend:
    """Mixed into an attention backend of vLLM, before it."""

    # Of the codes, as the layers of this process were told: vLLM asks for the pages where its config is not at hand.
    rounding: ClassVar[RefreshConfig | None] = None
    widest: ClassVar[int]
    most_queries: ClassVar[int | None] = None  # of a KV head, where codes are read

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Rows share a GPU's programs among them, so sums are made in another order in another batch."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Rows are sorted by the lengths that the host knows."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages with room for codes, where the mode has codes."""
        if not is_full(spec) or spec.sliding_window is not None:
            return spec
        refusals.check_layer(spec.head_size, spec.head_size_v, widest=cls.widest)
        if cls.rounding is None:
            return spec
        dims = spec.head_size, spec.head_size_v
        shape = PageShape(spec.num_kv_heads, spec.block_size, dims, spec.dtype, cls.rounding)
        return replace(spec, page_size_padded=shape.bytes)


class ServedLayer:
    """Mixed into an attention implementation of vLLM, before it."""

    # Of vLLM's implementation:
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    logits_soft_cap: float | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    kv_sharing_target_layer_name: str | None

    served: bool

    def serve(self, backend: type[ServedBackend], vllm_config: Any, device: torch.device) -> None:
        """Begin to serve this layer, whose `backend` learns what its pages have to hold."""
        refusals.check_layer(
            self.head_size, alibi=self.alibi_slopes is not None, widest=backend.widest
        )
        told = settings.read(vllm_config.additional_config)
        refusals.check(vllm_config)
        config = told.config
        if config.mode == "mixed":
            refusals.check_group(self.num_heads // self.num_kv_heads, backend.most_queries)
        self.page_rounding = backend.rounding = config if config.rounds else None
        options = AttendOptions(
            scale=self.scale,
            softcap=self.logits_soft_cap or None,
            sinks=self.sinks,
            reduction=config.group_reduction,
        )
        rows, length = (
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
        )
        self.decoding: Decoding
        if config.mode == "refresh":
            self.decoding = Refresh(
                config,
                options,
                device,
                rows=rows,
                slots=config.resolve_budget(length),
                heads=self.num_kv_heads,
                dim=self.head_size,
            )
        else:
            self.decoding = {"mixed": Mixed, "full": Full}[config.mode](config, options, device)
        self.scratch = min(SCRATCH, scratch(rows, self.num_heads, length))
        # A layer that reads another's cache finds the codes there, but its selections are its own.
        shares = self.kv_sharing_target_layer_name is not None
        self.learns = config.mode == "refresh" or not shares
        self._forget()

    def _forget(self, *_: Any) -> None:
        self._cache: weakref.ref[Tensor] | None = None
        self._pages: Pages | None = None

    def pages(self, cache: Tensor) -> Pages:
        """The cache of this layer, `[N, Hkv, P, 2 D]`, for our kernels; it may be dropped and made anew."""
        if self._pages is None or self._cache is None or self._cache() is not cache:
            dim = cache.shape[3] // 2
            shape = PageShape(
                cache.shape[1], cache.shape[2], (dim, dim), cache.dtype, self.page_rounding
            )
            # vLLM has a small cache at first, to see what its graphs take. What views it must not outlive it.
            self._cache, self._pages = weakref.ref(cache, self._forget), Pages.of(cache, shape)
        return self._pages

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the T tokens of a step, `[T, Hq, D]` into `output`; the cache has their keys and values."""
        given = layer, query, key, value, kv_cache, attn_metadata
        if self.served and attn_metadata is None:  # vLLM finds out how much memory a step takes
            torch.empty(self.scratch, dtype=torch.uint8, device=query.device)
        if not self.served or attn_metadata is None:
            return super().forward(*given, output, output_scale, output_block_scale)  # type: ignore[misc]
        if not isinstance(attn_metadata, ServedMetadata):
            refusals.refuse("layers of which another builder tells", "serve this model without it")
        assert output_scale is None and output_block_scale is None
        step = attn_metadata.step
        pages = self.pages(kv_cache)
        for prompts in attn_metadata.prompts:
            self.attend_prompts(layer, query, key, value, kv_cache, prompts, output)
        if self.learns:
            self.decoding.learn(pages, step, query)
        if step.decodes is not None:
            at = step.decodes.tokens
            tally = attn_metadata.counter.rows_of(len(step.decodes))
            output[at] = self.decoding.attend(query[at], pages, step, tally)
        return output

    def attend_prompts(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        prompts: Prompts,
        output: Tensor,
    ) -> None:
        """The stock kernels' part; here over vLLM's cache as it is."""
        at = prompts.tokens
        of_rows = query[at], key[at], value[at]
        result = output[at]
        super().forward(layer, *of_rows, kv_cache, prompts.stock, result)  # type: ignore[misc]
        if not isinstance(at, slice):
            output[at] = result


class ServedBuilder:
    """Mixed into a metadata builder of vLLM, before it."""

    served: bool
    reorder_batch_threshold: int | None = 1  # decode rows first: then they are a slice of the step

    def serve(
        self, spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, report: Any
    ) -> None:
        """Begin to serve the layers of one group, unless it is of another kind; `report` takes a line of the log."""
        self.served = is_full(spec)
        if not self.served:
            return
        if spec.sliding_window is not None or spec.attention_chunk_size is not None:
            refusals.refuse(
                "sliding-window layers among the others of a cache group",
                "leave out --disable-hybrid-kv-cache-manager",
            )
        told = settings.read(vllm_config.additional_config)
        config, rows = told.config, vllm_config.scheduler_config.max_num_seqs
        planner = None
        if config.mode == "refresh":
            asks = config.threshold is not None
            planner = Planner(rows, config.stride, asks=asks, stagger=told.host.stagger)
        self.sorter = Sorter(spec.block_size, config, planner, rows=rows, device=device)
        self.counter = Counter(
            layers=len(layer_names),
            heads=spec.num_kv_heads,
            rows=rows,
            entry_bytes=2 * spec.head_size * spec.dtype.itemsize,
            device=device,
        )
        first = vllm_config.parallel_config.rank == 0
        self.reporter, new = reporter_for(
            vllm_config, lambda: Reporter(told.host.log_interval, report, first=first)
        )
        self.reporter.add(layer_names[0], self.counter)
        if new and first:
            dims = spec.head_size, spec.head_size_v
            rounding = config if config.rounds else None
            page = PageShape(spec.num_kv_heads, spec.block_size, dims, spec.dtype, rounding)
            lists = ""
            if config.mode == "refresh":
                slots = config.resolve_budget(vllm_config.model_config.max_model_len)
                size = 4 * rows * spec.num_kv_heads * slots * len(layer_names)
                lists = f"; lists of up to {slots:,} positions for {rows} requests take {size / 2**20:,.0f} MiB"
            report(f"RefreshKV is on: {told.words}; a layer's {page.words}{lists}")

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The metadata of a step; that of the stock backend for a group that is not served."""
        if not self.served:
            given = common_prefix_len, common_attn_metadata, fast_build
            return super().build(*given)  # type: ignore[misc]
        return self._metadata(common_attn_metadata, self.sorter.sort)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """The metadata of the step that a CUDA graph of the whole model is captured over."""
        if not self.served:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        return self._metadata(common_attn_metadata, self.sorter.capture)

    def _metadata(self, common: Any, sort: Callable[[Any], Step]) -> ServedMetadata:
        if common.causal is not True:
            refusals.refuse("attention that is not causal", "serve this model without it")
        step = sort(common)
        self.reporter.follow()
        self.counter.follow(step)
        prompts = [] if step.prompts is None else self.prompts(common, step.prompt_rows)
        return ServedMetadata(step, prompts, self.counter)

    def prompts(self, common: Any, rows: Numbers) -> list[Prompts]:
        """The rows of prompts; here all at once, over vLLM's cache as it is."""
        return [Prompts(tokens_of(common, rows), self.stock(only(common, rows)))]

    def stock(self, common: Any) -> Any:
        """The stock backend's metadata."""
        return super().build(0, common)  # type: ignore[misc]


def tokens_of(common: Any, rows: Numbers) -> Where:
    """All tokens of some rows among those of the step."""
    starts = common.query_start_loc_cpu.numpy()
    spans = [np.arange(starts[row], starts[row + 1]) for row in rows]
    return place(np.concatenate(spans), common.seq_lens.device)


def is_full(spec: Any) -> bool:
    """Whether a cache is that of full attention; what is derived of that class is of another kind."""
    return type(spec).__name__ == "FullAttentionSpec"


def only(common: Any, rows: Numbers) -> Any:
    """vLLM's description of a step in which there are these rows alone, which rise."""
    device = common.seq_lens.device
    at = place(rows, device)
    starts = common.query_start_loc_cpu.numpy()
    queries = np.diff(starts)[rows]
    begins = torch.from_numpy(np.concatenate([[0], np.cumsum(queries)]).astype(starts.dtype))
    tokens = tokens_of(common, rows)
    per_row = {
        name: None
        if (all_of := getattr(common, name)) is None
        else all_of[place(rows, all_of.device)]
        for name in ("seq_lens_cpu_upper_bound", "is_prefilling")
    }
    lengths, ranges = common.seq_lens[at], common.mm_req_doc_ranges
    return replace(
        common,
        query_start_loc=there(begins, device),
        query_start_loc_cpu=begins,
        seq_lens=lengths,
        num_reqs=len(rows),
        num_actual_tokens=int(queries.sum()),
        max_query_len=int(queries.max()),
        block_table_tensor=common.block_table_tensor[at],
        slot_mapping=common.slot_mapping[tokens],
        positions=None if common.positions is None else common.positions[tokens],
        mm_req_doc_ranges=ranges
        and {new: ranges[row] for new, row in enumerate(rows) if row in ranges},
        req_idx=None if common.req_idx is None else np.asarray(common.req_idx)[rows],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **per_row,
    )
