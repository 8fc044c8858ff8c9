"""`StaticRefreshCache`: a `StaticCache` whose full-attention layers keep a partial cache, for compiled decoding.

`generate(cache_implementation="static")` inside `attach` uses it: the prompt runs eagerly, then the forward pass is
compiled as over transformers' own static cache, on GPUs into CUDA graphs. The exact mode has two of them, one for
drafts and one for full passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.static import StaticStore
from refreshkv.config import BLOCK, RefreshConfig
from refreshkv.exact import Cycle
from refreshkv.hosts.transformers.graphs import Graphs, Recorder
from refreshkv.hosts.transformers.masks import newest_row
from refreshkv.hosts.transformers.regions import apart
from refreshkv.hosts.transformers.served import (
    Pass,
    ServedCache,
    ServedLayer,
    as_autocast,
    without_autocast,
)
from refreshkv.hosts.transformers.support import may_serve
from refreshkv.kernels.options import AttendOptions
from refreshkv.stats import Stats
from refreshkv.step import Algorithm, begin_decoding


class StaticRefreshLayer(ServedLayer, StaticLayer):
    """transformers' view of one `LayerCache` of the fixed form, which shares its keys, values and length."""

    algorithm = Algorithm()

    def __init__(
        self, max_cache_len: int, refresh: RefreshConfig, index: int, stats: Stats, current: Pass
    ) -> None:
        super().__init__(max_cache_len)
        self.current = current
        self._refresh = refresh
        self._index = index
        self._stats = stats
        self._prompt: tuple[AttendOptions, Tensor | None] | None = None  # until decoding begins
        self._told = 0  # tokens of the prompt so far, of a cache that is captured

    @property
    def index(self) -> int:
        return self._index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See `StaticLayer`; the partial cache is allocated with the full one."""
        super().lazy_initialization(key_states, value_states)
        self._allocate()

    def share(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Take over `length` tokens in buffers `[B, Hkv, C, D]` that somebody else may go on using."""
        self.keys, self.values, self.device = keys, values, keys.device
        self.is_initialized = True
        self._stay([keys, values])
        self._allocate()
        self.inner.store.level(length)

    def _allocate(self) -> None:
        ends = torch.zeros(len(self.keys), dtype=torch.int64, device=self.keys.device)
        store = StaticStore(self.keys, self.values, ends)
        self._stay([ends])
        self.inner = LayerCache(
            self._refresh, index=self._index, stats=self._stats, store=store, fixed=True
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `StaticLayer`; the result is tagged. In the exact mode the algorithm decides what is written."""
        keys, values = as_autocast(key_states), as_autocast(value_states)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        if self.exact is None:
            one = keys.shape[2] == 1 and not self.current.prompt and self._prompt is None
            self.inner.append(keys, values, decodes=one and self.inner.hidden is not None)
        else:
            self._newest = keys, values
        if not self._is_told:
            return self._updated(self.keys, self.values)
        self._told += keys.shape[2]
        return self._updated(self.keys[:, :, : self._told], self.values[:, :, : self._told])

    @property
    def _is_told(self) -> bool:
        """The pass is one over a prompt, and the host counts its tokens.

        It attends as it does over a cache that grows: over what there is, without a mask where nobody is padded. Over
        all positions of a fixed one it would need a mask of as many numbers for each token of the prompt.
        """
        return self.current.captures and self.current.prompt

    def get_seq_length(self) -> Any:
        """Tokens of the first row: an int64 scalar on the device, or a number."""
        if self._is_told:
            return self._told
        return self.inner.store.lengths[0] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `StaticLayer`."""
        if self._is_told:
            return self._told + query_length, 0
        return super().get_mask_sizes(query_length)

    def begin_exact(self, visible: Tensor | None, cycle: Cycle) -> None:
        super().begin_exact(visible, cycle)
        assert self.exact is not None
        self._stay(self.inner.tensors() + self.exact.tensors())

    def observe(self, queries: Tensor, options: AttendOptions, visible: Tensor | None) -> None:
        self.current.awaiting = None
        super().observe(queries, options, visible)
        self._prompt = options, visible

    def lend(self) -> None:
        """Another layer attends to these keys in full."""

    def begin_decoding(self) -> None:
        """The prompt is over: select from it, and let what decoding writes stay where it is."""
        if self._prompt is None:
            return
        options, visible = self._prompt
        with without_autocast(self.keys.device):
            begin_decoding(self.inner, options, visible)
        self._stay(self.inner.tensors())
        self._prompt = None

    @staticmethod
    def _stay(tensors: list[Tensor]) -> None:
        """A graph may write into these, because they never move."""
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens, elsewhere in memory; whatever is kept stays as it is."""
        self.max_cache_len = capacity
        if self.is_initialized:
            self.inner.grow(capacity)
            if self.exact is not None:
                self.exact.grow()
            self.keys, self.values = self.inner.store.dense()

    def reset(self) -> None:
        """Back to empty; the memory stays."""
        super().reset()
        if self.is_initialized:
            self.inner.reset()
        self._prompt = self.exact = self._newest = None
        self._told = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues the old row `beam_idx[i]`."""
        self.inner.take_rows(beam_idx)

    def _visible(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        width = self._told if self._is_told else self.max_cache_len
        row = F.pad(newest_row(mask, width), (0, self.max_cache_len - width), value=True)
        return row.expand(self.inner.rows, -1)

    def _decodes(self) -> bool:
        if self._prompt is not None:
            raise RuntimeError(
                "the prompt is over: call begin_decoding() of the cache before the first decode step"
            )
        return True


class RollingWindow(StaticSlidingWindowLayer):
    """A window beside our layers whose step a graph can hold, once it is full: no index comes from the host."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `StaticSlidingWindowLayer`."""
        if self.cumulative_length_int < self.max_cache_len or key_states.shape[2] != 1:
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length_int += 1
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer.copy_(torch.cat([buffer[:, :, 1:], new], 2))
        return self.keys, self.values


class StaticRefreshCache(ServedCache, StaticCache):
    """The KV cache of a model under RefreshKV, in buffers for `max_cache_len` tokens.

    Args:
        config: `model.config` of the attached model, the very object.
        refresh: the settings.
        max_cache_len: tokens of prompt and answer together. The exact mode needs `refresh.draft + 1` more.
        stats: where decode steps are counted.

    Attributes:
        capacity: the `max_cache_len` of now.
        graphs: of its passes, where we capture them (`CapturedModel`); `generate` need not make masks for these.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        refresh: RefreshConfig,
        *,
        max_cache_len: int,
        stats: Stats | None = None,
    ) -> None:
        super().__init__(config=config, max_cache_len=max_cache_len)
        self._serve(config, refresh, stats)
        self.capacity = max_cache_len
        self.graphs: Graphs | None = None
        self._in_pass = False
        self._padding: Tensor | None = None  # stays where it is, for graphs
        self._steps = 0  # since the prompt
        self._blocks: list[int] | None = (
            None  # positions of the prompt that blocks can lie in, of each row
        )
        for index, layer in enumerate(self.layers):
            if type(layer) is StaticLayer and may_serve(self._decoder, index):
                self.layers[index] = StaticRefreshLayer(
                    max_cache_len, refresh, index, self.stats, self._current
                )

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Passes inside belong to a prompt, however few tokens they hold; the first selection is made at the end."""
        with super().prompt():
            yield
        self.begin_decoding()

    def begin_decoding(self) -> None:
        """After the last pass over a prompt, in a loop of your own: what follows are decode steps."""
        self._steps, self._blocks = 0, None
        for layer in self.served:
            assert isinstance(layer, StaticRefreshLayer)
            layer.inner.due = None
            layer.begin_decoding()

    def capture(self, recorder: Recorder) -> None:
        """From here on our own graphs run its passes. It has no tokens yet."""
        self.graphs = Graphs(recorder)
        self._current.captures = True
        self.capacity = 0  # room is made for the prompt, when its length is known
        for index, layer in enumerate(self.layers):
            if type(layer) is StaticSlidingWindowLayer:
                self.layers[index] = RollingWindow(layer.max_cache_len, layer.max_cache_len)

    @property
    def is_compileable(self) -> bool:
        """See `Cache`. `generate` makes masks for such a cache before each pass, which ours need not."""
        return self.graphs is None or self._in_pass or self._current.prompt

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """The pass inside is one of a captured decode."""
        self._in_pass = True
        try:
            yield
        finally:
            self._in_pass = False

    def show(self, visible: Tensor | None) -> None:
        """`[B, L]` bool, False for padding; `None` for none. Later tokens are visible."""
        if visible is not None:
            visible = F.pad(visible, (0, self.capacity - visible.shape[1]), value=True)
            if self._padding is None or self._padding.shape != visible.shape:
                self._padding = visible.clone()
            visible = self._padding.copy_(visible)
        self._current.visible = visible

    @property
    def rows(self) -> int | None:
        """Batch size; `None` before the first token."""
        layer = self.layers[0]
        return layer.keys.shape[0] if layer.is_initialized else None

    @property
    def hides(self) -> bool:
        """Whether there is padding."""
        return self._current.visible is not None

    def next_step(self) -> str | None:
        """A decode step begins: its kind, as far as the host knows the schedule; `None`: each is like the others."""
        self._steps += 1
        first = self.served[0].inner
        kind = None
        if self.refresh.mode == "refresh":
            kind = first.trigger.kind(self._steps)
        elif self.refresh.mode == "mixed" and not self._completes():
            kind = "partial"
        for layer in self.served:
            layer.inner.due = kind
        return kind

    def _completes(self) -> bool:
        """Whether a block of some row is complete before the token of this step, and has no codes yet."""
        if self._blocks is None:  # at the prompt's end the device is asked once
            copy, ends = self.served[0].inner.copy, self.served[0].inner.store.ends
            assert copy is not None and copy.first is not None and ends is not None
            self._blocks = (ends - copy.first).tolist()
        return any((tokens + self._steps - 1) % BLOCK == 0 for tokens in self._blocks)

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens a row. What a graph has captured is elsewhere then, so each is made anew."""
        for layer in self.served:
            assert isinstance(layer, StaticRefreshLayer)
            layer.grow(capacity)
        self.capacity = capacity
        self.show(self._current.visible)
        if self.graphs is not None:
            self.graphs.forget()

    def reset(self) -> None:
        """Back to empty, for a prompt of as many rows; the memory stays, and so do the graphs."""
        super().reset()
        self._current.visible = None

    @apart
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`; raises `RuntimeError` where the model is not attached."""
        self._check()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
