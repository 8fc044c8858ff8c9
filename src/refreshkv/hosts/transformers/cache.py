"""`RefreshCache`: a `DynamicCache` whose full-attention layers keep a partial cache beside the full one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from refreshkv.cache.layer import LayerCache
from refreshkv.config import Budgeted, make_config
from refreshkv.exact import ExactLayer, ExactWindowLayer
from refreshkv.hosts.transformers.masks import newest_row
from refreshkv.hosts.transformers.support import exact_reason, may_serve
from refreshkv.methods import Method
from refreshkv.stats import Stats
from refreshkv.step import Algorithm, Attention

IMPLEMENTATION_PREFIX = "refreshkv_"
_TAG = "_refreshkv"


@dataclass
class Pass:
    """State of the forward pass that is under way, shared by the layers of one cache.

    Attributes:
        prompt: the pass belongs to a prompt, however few tokens it holds.
        awaiting: the layer that was updated last and whose keys have not reached our attention function yet.
        drafting: the pass belongs to the lossless mode: "draft" or "verify"; None otherwise.
        counts: `[B]` int64, in "verify": the tokens of each row that are real.
        mask, visible: the last mask of the host (not kept alive: a prompt's is large) and the visible tokens in it,
            computed once for all layers.
    """

    prompt: bool = False
    drafting: Literal["draft", "verify"] | None = None
    counts: Tensor | None = None
    awaiting: Any = None
    mask: weakref.ref[Tensor] | None = None
    visible: Tensor | None = None


class RefreshLayer(DynamicLayer):
    """transformers' view of one `LayerCache` and what drives it. Reports the full length; knows no partial steps."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self, inner: LayerCache, algorithm: Algorithm, current: Pass, window: int | None = None
    ) -> None:
        # The parent's constructor only assigns `keys`, `values` and `is_initialized`, which are properties here.
        self.inner = inner
        self.algorithm = algorithm
        self.current = current
        self.window = window  # of a sliding-window layer, which is ours in the lossless mode only
        self.exact: ExactLayer | None = None  # while `generate` drafts and verifies
        self.newest: tuple[Tensor, Tensor] | None = None  # keys and values of such a pass

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[B, Hkv, L, D]`, or `None` before the first update."""
        return self.inner.store.keys if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[B, Hkv, L, D]`, or `None` before the first update."""
        return self.inner.store.values if self.is_initialized else None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer holds tokens."""
        return self.inner.store.is_allocated

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store allocates itself at the first append."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return the full keys and values, with a tag that leads the attention function here."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise RuntimeError(
                "RefreshCache is for inference and keeps no gradients: run under torch.no_grad()"
            )
        key_states, value_states = as_autocast(key_states), as_autocast(value_states)
        if self.exact is not None:
            # What is written, and where, the algorithm decides.
            self.newest = keys, values = key_states, value_states
        else:
            self.inner.append(key_states, value_states)
            keys, values = self.inner.store.keys, self.inner.store.values
        self.current.awaiting = self
        return tagged(keys, self), tagged(values, self)

    def begin_exact(self, visible: Tensor | None) -> None:
        """From here on passes are drafts or verifications. `visible` `[B, L]`: the prompt's tokens, `None` for all."""
        if self.window is None:
            self.exact = ExactLayer(self.inner, visible)
        else:
            self.exact = ExactWindowLayer(self.inner, visible, self.window)

    def end_exact(self, length: int) -> None:
        """Back to ordinary passes, with the first `length` places of every row."""
        assert self.exact is not None
        self.exact.close(length)
        self.exact = self.newest = None

    def attend(self, query: Tensor, attention: Attention, mask: Tensor | None) -> Tensor | None:
        """`[B, Hq, T, D]` -> the same where the pass is ours; `None` where the implementation below should attend."""
        if self.exact is not None:
            return exact_step(self, query, attention)
        if self.window is not None:
            return None  # over a window the implementation below, with the host's mask, is right
        visible = self._visible(mask)
        if query.shape[2] == 1 and self.inner.length > 1 and not self.current.prompt:
            return self.algorithm.step(self.inner, query[:, :, 0], attention, visible)[:, :, None]
        self.algorithm.observe(self.inner, query, attention, visible)
        return None

    def lend(self) -> None:
        """Another layer attends to these keys in full. Raises `RuntimeError` in the lossless mode."""
        if self.exact is not None:
            raise RuntimeError("the lossless mode cannot serve layers that share another's keys")

    @property
    def index(self) -> int:
        """Which layer of the model this is."""
        return self.inner.index

    def _visible(self, mask: Tensor | None) -> Tensor | None:
        """`[B, L]` bool, what the newest query sees; `None` when it is everything. Read once for all layers."""
        current = self.current
        if mask is None:
            return None
        if current.mask is None or current.mask() is not mask:
            row = newest_row(mask, self.inner.length)
            current.visible = None if bool(row.all()) else row.expand(self.inner.rows, -1)
            current.mask = weakref.ref(mask)
        return current.visible

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
            rows = torch.arange(self.inner.rows, device=self.inner.store.keys.device)
            self._take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (a bool mask over the rows works too)."""
        if self.is_initialized:
            indices = torch.as_tensor(indices, device=self.inner.store.keys.device)
            self._take_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Back to empty; the statistics stay."""
        self.inner.reset()
        self.algorithm.reset()
        self.current.awaiting = None

    def _take_rows(self, rows: Tensor) -> None:
        self.inner.take_rows(rows)
        self.algorithm.take_rows(rows)

    def offload(self) -> None:
        """Raises: moving whole layers every step is the wrong granularity for a cache that reads a part of them."""
        raise NotImplementedError(
            "RefreshCache cannot be offloaded by transformers; drop offloading=True"
        )

    prefetch = offload


class Drafting:
    """What a cache of ours offers to the loop of the lossless mode."""

    layers: list[Any]
    _current: Pass
    _decoder: PreTrainedConfig

    def is_for(self, config: PreTrainedConfig) -> bool:
        """Whether the cache was made from the config, the very object, of a model."""
        return config.get_text_config(decoder=True) is self._decoder

    @property
    def exact_layers(self) -> list[Any]:
        """The layers that take part in the lossless mode."""
        return [layer for layer in self.layers if hasattr(layer, "begin_exact")]

    def served_length(self) -> int | None:
        """Tokens in the fullest of the layers that are ours; `None` where there is none."""
        return max((int(layer.get_seq_length()) for layer in self.exact_layers), default=None)

    @contextmanager
    def drafting(
        self, kind: Literal["draft", "verify"], counts: Tensor | None = None
    ) -> Iterator[None]:
        """The pass inside is one of the lossless mode; `counts` as in `ExactLayer.verify`."""
        self._current.drafting, self._current.counts = kind, counts
        try:
            yield
        finally:
            self._current.drafting = self._current.counts = None

    def before_drafts(self) -> None:
        """A cycle begins in which some row drafts."""


class RefreshCache(Drafting, DynamicCache):
    """The KV cache of a model under RefreshKV, for `generate(..., past_key_values=cache)`.

    Sliding-window, linear and other special layers stay transformers' own. The model must be attached
    (`refreshkv.attach`): used on any other, the cache raises instead of silently being ordinary attention.

    Args:
        config: `model.config` of the attached model, the very object.
        refresh: the settings; `None` is the default preset.
        stats: where decode steps are counted; several caches may share one.
        reserve: tokens to allocate at once, if the final length is known.
        method: what drives the layers, one of `refreshkv.methods`; `None` is RefreshKV.

    Attributes:
        is_kept: somebody holds on to the cache after `generate`.
        owner: what marks the session that made the cache, if one did.

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
        self.refresh = settings.for_cache()
        self.stats = Stats() if stats is None else stats
        self.is_kept = True
        self.owner: object = None
        self._decoder = config.get_text_config(decoder=True)
        self._current = Pass()
        served = [
            index
            for index, layer in enumerate(self.layers)
            if type(layer) is DynamicLayer and may_serve(self._decoder, index)
        ]
        for place, index in enumerate(served):
            inner = LayerCache(self.refresh, index=index, stats=self.stats, reserve=reserve)
            make = None if method is None else method.make
            algorithm = Algorithm() if make is None else make(settings, place, len(served))
            self.layers[index] = RefreshLayer(inner, algorithm, self._current)
        if self.refresh.mode == "exact" and exact_reason(config) is None:
            for index, layer in enumerate(self.layers):
                if isinstance(layer, DynamicSlidingWindowLayer):
                    inner = LayerCache(self.refresh, index=index, stats=self.stats, reserve=reserve)
                    window = layer.sliding_window
                    self.layers[index] = RefreshLayer(inner, Algorithm(), self._current, window)

    def __deepcopy__(self, memo: dict[int, Any]) -> RefreshCache:
        """A copy for another continuation of the same prefix, for the same model and into the same stats."""
        for shared in (self._decoder, self.stats, self.owner):
            memo[id(shared)] = shared
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Passes inside belong to a prompt even when they hold one token (the last chunk of a chunked prefill)."""
        self._current.prompt = True
        try:
            yield
        finally:
            self._current.prompt = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache.update`.

        Raises:
            RuntimeError: the model is not attached, or a layer hides the keys we returned from attention.
        """
        check_attached(self._decoder)
        check_reached(self._current)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def exact_step(layer: Any, query: Tensor, attention: Attention) -> Tensor:
    """`[B, Hq, T, D]` -> `[B, Hq, T, D]`: what the pass of the lossless mode under way asks of this layer."""
    keys, values = layer.newest
    layer.newest = None
    if layer.current.drafting == "draft":
        key, value = keys[:, :, 0], values[:, :, 0]
        return layer.exact.draft(query[:, :, 0], key, value, attention)[:, :, None]
    if layer.current.drafting != "verify" or layer.current.counts is None:
        raise RuntimeError("this cache is inside a lossless `generate`: no other pass may use it")
    return layer.exact.verify(query, keys, values, layer.current.counts, attention)


def check_attached(decoder: PreTrainedConfig) -> None:
    """Raises `RuntimeError` where the model of this config would not come to our attention function."""
    if not str(decoder._attn_implementation).startswith(IMPLEMENTATION_PREFIX):
        raise RuntimeError(
            "RefreshCache needs an attached model (here it would silently be ordinary attention):"
            " use it inside `with refreshkv.attach(model):`, made from that model's own config"
        )


def check_reached(current: Pass) -> None:
    """Raises `RuntimeError` where the layer updated last has not attended."""
    lost = current.awaiting
    if lost is not None:
        current.awaiting = None  # this pass is over
        raise RuntimeError(
            f"the keys of layer {lost.index} never reached RefreshKV's attention function:"
            " this architecture changes them after the cache; it is not supported"
        )


def tagged(states: Tensor, layer: Any) -> Tensor:
    """A view of keys or values that leads the attention function to `layer`.

    A tag on a buffer itself would be a circle, which keeps a cache alive for the garbage collector.
    """
    view = states.view_as(states)
    setattr(view, _TAG, layer)
    return view


def layer_of(states: Tensor) -> Any:
    """The layer of ours whose `update` returned this very tensor; `None` if it was no layer of ours."""
    return getattr(states, _TAG, None)


def as_autocast(states: Tensor) -> Tensor:
    """Queries, keys or values in the dtype in which attention runs under autocast, where RoPE leaves float32."""
    kind = states.device.type
    if states.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return states
    return states.to(torch.get_autocast_dtype(kind))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For our own arithmetic, which says itself what it does in float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
