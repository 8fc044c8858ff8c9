"""`RefreshCache`: a `DynamicCache` whose full-attention layers keep a partial cache beside the full one."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.store import DenseStore
from refreshkv.config import Budgeted, make_config
from refreshkv.hosts.transformers.masks import newest_row
from refreshkv.hosts.transformers.served import Pass, ServedCache, ServedLayer, as_autocast
from refreshkv.hosts.transformers.support import exact_reason, may_serve
from refreshkv.methods import Method
from refreshkv.stats import Stats
from refreshkv.step import Algorithm


class LastMask:
    """The last mask of the host and the visible tokens in it, computed once for all layers of a pass."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None  # not kept alive: a prompt's is large
        self._visible: Tensor | None = None

    def visible(self, mask: Tensor | None, rows: int, length: int) -> Tensor | None:
        """`[B, L]` bool, what the newest query sees; `None` when it is everything."""
        if mask is None:
            return None
        if self._mask is None or self._mask() is not mask:
            row = newest_row(mask, length)
            self._visible = None if bool(row.all()) else row.expand(rows, -1)
            self._mask = weakref.ref(mask)
        return self._visible

    def __deepcopy__(self, memo: dict[int, Any]) -> LastMask:
        return LastMask()


class RefreshLayer(ServedLayer, DynamicLayer):
    """transformers' view of one `LayerCache` and what drives it. Reports the full length; knows no partial steps."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        inner: LayerCache,
        algorithm: Algorithm,
        current: Pass,
        last_mask: LastMask,
        window: int | None = None,
    ) -> None:
        # The parent's constructor only assigns `keys`, `values` and `is_initialized`, which are properties here.
        self.inner = inner
        self.algorithm = algorithm
        self.current = current
        self.window = window
        self._last_mask = last_mask

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[B, Hkv, L, D]`, or `None` before the first update."""
        return self.inner.store.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[B, Hkv, L, D]`, or `None` before the first update."""
        return self.inner.store.dense()[1] if self.is_initialized else None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer holds tokens."""
        return self.inner.store.is_allocated

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store allocates itself at the first append."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return the full keys and values; in the exact mode the algorithm decides what is written."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise RuntimeError(
                "RefreshCache is for inference and keeps no gradients: run under torch.no_grad()"
            )
        keys, values = as_autocast(key_states), as_autocast(value_states)
        if self.exact is not None:
            self._newest = keys, values
            return self._updated(keys, values)
        self.inner.append(keys, values)
        return self._updated(*self.inner.store.dense())

    def get_seq_length(self) -> int:
        """Tokens in the full store."""
        return self.inner.length

    def crop(self, tokens_to_remove: int) -> None:
        """Negative: remove that many tokens. Positive: keep that many (transformers up to 5.17). 0 does nothing."""
        if tokens_to_remove != 0 and self.is_initialized:
            keep = (
                tokens_to_remove if tokens_to_remove > 0 else self.inner.length + tokens_to_remove
            )
            if keep < self.inner.length:
                self.algorithm.crop(max(keep, 0))  # first: it may refuse
                self.inner.crop(max(keep, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues the old row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row: beams and several return sequences."""
        if self.is_initialized:
            rows = torch.arange(self.inner.rows, device=self.inner.store.device)
            self._take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (a bool mask over the rows works too)."""
        if self.is_initialized:
            indices = torch.as_tensor(indices, device=self.inner.store.device)
            self._take_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Back to empty; the statistics stay."""
        self.inner.reset()
        self.algorithm.reset()
        self.current.awaiting = None

    def offload(self) -> None:
        """Raises: moving whole layers every step is the wrong granularity for a cache that reads a part of them."""
        raise NotImplementedError(
            "RefreshCache cannot be offloaded by transformers; drop offloading=True"
        )

    prefetch = offload

    def _take_rows(self, rows: Tensor) -> None:
        self.inner.take_rows(rows)
        self.algorithm.take_rows(rows)

    def _visible(self, mask: Tensor | None) -> Tensor | None:
        return self._last_mask.visible(mask, self.inner.rows, self.inner.length)

    def _decodes(self) -> bool:
        return self.inner.length > 1


class RefreshCache(ServedCache, DynamicCache):
    """The KV cache of a model under RefreshKV, for `generate(..., past_key_values=cache)`.

    Sliding-window, linear and other special layers stay transformers' own. The model must be attached
    (`refreshkv.attach`): used on any other, the cache raises instead of silently being ordinary attention.

    Args:
        config: `model.config` of the attached model, the very object.
        refresh: the settings; `None` is the default preset.
        stats: where decode steps are counted; several caches may share one.
        reserve: tokens to allocate at once, if the final length is known.
        method: what drives the layers, one of `refreshkv.methods`; `None` is RefreshKV.

    Raises:
        RuntimeError: at the first forward pass, when the model is not attached.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        refresh: Budgeted | None = None,
        *,
        stats: Stats | None = None,
        reserve: int = 0,
        method: Method | None = None,
    ) -> None:
        super().__init__(config=config)
        settings = make_config() if refresh is None else refresh
        self._serve(config, settings.for_cache(), stats)
        last_mask = LastMask()

        def serve(index: int, algorithm: Algorithm, window: int | None = None) -> None:
            store = DenseStore(reserve)
            inner = LayerCache(self.refresh, index=index, stats=self.stats, store=store)
            self.layers[index] = RefreshLayer(inner, algorithm, self._current, last_mask, window)

        full = [
            index
            for index, layer in enumerate(self.layers)
            if type(layer) is DynamicLayer and may_serve(self._decoder, index)
        ]
        make = None if method is None else method.make
        below = None
        for order, index in enumerate(full):
            algorithm = Algorithm() if make is None else make(settings, order, len(full))
            algorithm.below, below = below, algorithm
            serve(index, algorithm)
        if self.refresh.mode == "exact" and exact_reason(config) is None:
            for index, layer in enumerate(self.layers):
                if isinstance(layer, DynamicSlidingWindowLayer):
                    serve(index, Algorithm(), layer.sliding_window)

    def __deepcopy__(self, memo: dict[int, Any]) -> RefreshCache:
        """A copy for another continuation of the same prefix, for the same model and into the same stats."""
        for shared in (self._decoder, self.stats, self.owner):
            memo[id(shared)] = shared
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`.

        Raises:
            RuntimeError: the model is not attached, or a layer hides the keys we returned from attention.
        """
        self._check()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
