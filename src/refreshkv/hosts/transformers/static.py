"""`StaticRefreshCache`: a `StaticCache` whose full-attention layers keep a partial cache, for compiled decoding.

`generate(cache_implementation="static")` inside `attach` uses it: the prompt runs eagerly, then the forward pass is
compiled as over transformers' own static cache, on GPUs into CUDA graphs. The lossless mode has two of them, one for
drafts and one for full passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from refreshkv.cache.static import StaticLayerCache
from refreshkv.cache.static_exact import StaticExactLayer
from refreshkv.config import RefreshConfig
from refreshkv.hosts.transformers.cache import (
    Drafting,
    Pass,
    as_autocast,
    check_attached,
    check_reached,
    exact_step,
    tagged,
    without_autocast,
)
from refreshkv.hosts.transformers.masks import newest_row
from refreshkv.hosts.transformers.support import may_serve
from refreshkv.stats import Stats
from refreshkv.step import Attention, decode_step


class StaticRefreshLayer(StaticLayer):
    """transformers' view of one `StaticLayerCache`, which shares its keys, values and length."""

    inner: StaticLayerCache

    def __init__(
        self, max_cache_len: int, refresh: RefreshConfig, index: int, stats: Stats, current: Pass
    ) -> None:
        super().__init__(max_cache_len)
        self.index = index
        self.current = current
        self._refresh = refresh
        self._stats = stats
        self._prompt: tuple[Attention, Tensor | None] | None = None  # until decoding begins
        # Of the prompt, for the lossless mode.
        self._last: tuple[Tensor, Attention] | None = None
        self.exact: StaticExactLayer | None = None  # while `generate` drafts and verifies
        self.newest: tuple[Tensor, Tensor] | None = None  # keys and values of such a pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See `StaticLayer`; the partial cache is allocated with the full one."""
        super().lazy_initialization(key_states, value_states)
        self._allocate()

    def share(self, other: StaticLayer) -> None:
        """Take over the keys, the values and so far the length of another layer, whose buffers these stay too."""
        self.keys, self.values = other.keys, other.values
        self.device = other.device
        self.cumulative_length = other.cumulative_length.clone()
        self.is_initialized = True
        self._allocate()

    def _allocate(self) -> None:
        self.inner = StaticLayerCache(
            self._refresh,
            self.keys,
            self.values,
            self.cumulative_length,
            index=self.index,
            stats=self._stats,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `StaticLayer`; the result is tagged. In the lossless mode the algorithm decides what is written."""
        key_states, value_states = as_autocast(key_states), as_autocast(value_states)
        if self.exact is None:
            super().update(key_states, value_states, *args, **kwargs)
        else:
            self.newest = (key_states, value_states)
        self.current.awaiting = self
        return tagged(self.keys, self), tagged(self.values, self)

    def begin_exact(self, visible: Tensor | None) -> None:
        """From here on passes are drafts or verifications. `visible` `[B, prompt]`; `None` when everything is."""
        assert self._last is not None
        queries, attention = self._last
        prompt = int(self.cumulative_length)
        self.exact = StaticExactLayer(self.inner, queries, attention, visible, prompt)
        self._stay(self.inner.state() + self.exact.state())

    def end_exact(self, length: int) -> None:
        """Back to ordinary passes, with the first `length` places of every row."""
        assert self.exact is not None
        self.exact.close(length)
        self.exact = self.newest = None

    def attend(self, query: Tensor, attention: Attention, mask: Tensor | None) -> Tensor | None:
        """A decode step, `[B, Hq, 1, D]` -> the same; `None` for a prompt, which is not ours to attend."""
        if self.exact is not None:
            return exact_step(self, query, attention)
        visible = None
        if mask is not None:
            visible = newest_row(mask, self.max_cache_len).expand(query.shape[0], -1)
        if query.shape[2] > 1 or self.current.prompt:
            self.observe(query, attention, visible)
            return None
        if self._prompt is not None:
            raise RuntimeError(
                "the prompt is over: call begin_decoding() of the cache before the first decode step"
            )
        return decode_step(self.inner, query[:, :, 0], attention, visible)[:, :, None]

    def observe(self, queries: Tensor, attention: Attention, visible: Tensor | None) -> None:
        """A prompt, or a chunk of it, is in the cache; `queries` `[B, Hq, T, D]`, `visible` `[B, C]` bool or `None`."""
        self.current.awaiting = None
        self.inner.await_selection(queries)
        self._prompt = attention, visible

    def lend(self) -> None:
        """Another layer attends to these keys in full."""

    def begin_decoding(self) -> None:
        """The prompt is over: select from it."""
        if self._prompt is None:
            return
        (attention, visible), prompt = self._prompt, int(self.cumulative_length)
        visible = None if visible is None else visible[:, :prompt]
        assert self.inner.pending is not None
        self._last = self.inner.pending, attention
        with without_autocast(self.keys.device):
            self.inner.begin_decoding(attention, visible, prompt)
        self._stay(self.inner.state() + self._stats.count_on(self.index, self.keys.device))
        self._prompt = None

    @staticmethod
    def _stay(tensors: list[Tensor]) -> None:
        """A graph may write into these, because they never move."""
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        """Back to empty; the memory stays."""
        super().reset()
        if self.is_initialized:
            self.inner.reset()
        self._prompt = self._last = self.exact = self.newest = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues the old row `beam_idx[i]`."""
        self.inner.take_rows(beam_idx)


class StaticRefreshCache(Drafting, StaticCache):
    """The KV cache of a model under RefreshKV, in buffers for `max_cache_len` tokens.

    Args:
        config: `model.config` of the attached model, the very object.
        refresh: the settings.
        max_cache_len: tokens of prompt and answer together. The lossless mode needs `refresh.draft + 1` places more.
        stats: where decode steps are counted.

    Attributes:
        is_kept: somebody holds on to the cache after `generate`.
        owner: what marks the session that made the cache, if one did.
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
        self.refresh = refresh
        self.stats = Stats() if stats is None else stats
        self.is_kept = True
        self.owner: object = None
        self._decoder = config.get_text_config(decoder=True)
        self._current = Pass()
        for index, layer in enumerate(self.layers):
            if type(layer) is StaticLayer and may_serve(self._decoder, index):
                self.layers[index] = StaticRefreshLayer(
                    max_cache_len, refresh, index, self.stats, self._current
                )

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Passes inside belong to a prompt, however few tokens they hold; the first selection is made at the end."""
        self._current.prompt = True
        try:
            yield
        finally:
            self._current.prompt = False
        self.begin_decoding()

    def before_drafts(self) -> None:
        """See `Drafting`: selects, which drafts over tensors that stay cannot do themselves."""
        for layer in self.exact_layers:
            with without_autocast(layer.keys.device):
                layer.exact.select()

    def begin_decoding(self) -> None:
        """After the last pass over a prompt, in a loop of your own: what follows are decode steps."""
        for layer in self.layers:
            if isinstance(layer, StaticRefreshLayer):
                layer.begin_decoding()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`; raises `RuntimeError` where the model is not attached."""
        check_attached(self._decoder)
        check_reached(self._current)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
