"""What the growing and the static form of our cache share: a layer in each kind of pass, and the cache around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.exact import Cycle, ExactLayer, ExactMixedLayer, ExactWindowLayer
from refreshkv.kernels.options import AttendOptions
from refreshkv.stats import Stats
from refreshkv.step import Algorithm

IMPLEMENTATION_PREFIX = "refreshkv_"
_TAG = "_refreshkv"
# Whether the pass under way is one of `ServedCache.without_masks`; a mask function is not told of which cache it is.
_maskless: ContextVar[bool] = ContextVar("refreshkv_maskless", default=False)


@dataclass
class Pass:
    """State of the forward pass that is under way, shared by the layers of one cache.

    Attributes:
        prompt: the pass belongs to a prompt, however few tokens it holds.
        awaiting: the layer that was updated last and whose keys have not reached our attention function yet.
        drafting: the pass belongs to the exact mode: "draft" or "verify"; None otherwise.
        maskless: the host makes no masks in this pass, and the layers know themselves what is `visible`.
        visible: `[B, width]` bool, False for padding; `None` when everything is.
        captures: decode steps of the cache are graphs of ours, so the host knows its length and masks.
    """

    prompt: bool = False
    drafting: Literal["draft", "verify"] | None = None
    awaiting: ServedLayer | None = None
    maskless: bool = False
    visible: Tensor | None = None
    captures: bool = False


class ServedLayer:
    """A layer of transformers' cache that is ours: a `LayerCache` and what drives it.

    Attributes:
        inner: what the layer keeps.
        window: of a sliding-window layer, which is ours in the exact mode only.
        exact: while `generate` drafts and verifies.
    """

    inner: LayerCache
    algorithm: Algorithm
    current: Pass
    window: int | None = None
    exact: ExactLayer | None = None
    _newest: tuple[Tensor, Tensor] | None = None  # keys and values of a pass of the exact mode
    _options: AttendOptions | None = None  # of the newest pass over a prompt

    @property
    def index(self) -> int:
        """Which layer of the model this is."""
        return self.inner.index

    def begin_exact(self, visible: Tensor | None, cycle: Cycle) -> None:
        """From here on passes are drafts or verifications. `visible` `[B, L]`: the prompt's tokens, `None` for all."""
        assert self._options is not None
        given = self.inner, self._options, visible
        if self.window is not None:
            self.exact = ExactWindowLayer(*given, self.window, cycle)
        elif self.inner.config.rounds:
            self.exact = ExactMixedLayer(*given, cycle)
        else:
            self.exact = ExactLayer(*given, cycle)

    def end_exact(self, length: int) -> None:
        """Back to ordinary passes, with the first `length` tokens of every row."""
        assert self.exact is not None
        self.exact.close(length)
        self.exact = self._newest = None

    def attend(self, query: Tensor, options: AttendOptions, mask: Tensor | None) -> Tensor | None:
        """`[B, Hq, T, D]` -> the same where the pass is ours; `None` where the implementation below should attend."""
        if self.exact is not None:
            return self._exact_pass(self.exact, query)
        if self.window is not None:
            self._options = options
            return None  # over a window the implementation below, with the host's mask, is right
        visible = self.current.visible if self.current.maskless else self._visible(mask)
        if query.shape[2] == 1 and not self.current.prompt and self._decodes():
            return self.algorithm.step(self.inner, query[:, :, 0], options, visible)[:, :, None]
        return self.observe(query, options, visible)

    def observe(
        self, queries: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> Tensor | None:
        """A prompt, or a chunk of it, is in the cache; `queries` `[B, Hq, T, D]`, `visible` `[B, width]` or `None`.

        Returns what these tokens get, where it is not full attention.
        """
        self._options = options
        return self.algorithm.observe(self.inner, queries, options, visible)

    def lend(self) -> None:
        """Another layer attends to these keys in full. Raises `RuntimeError` in the exact mode."""
        if self.exact is not None:
            raise RuntimeError("the exact mode cannot serve layers that share another's keys")

    def _updated(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What `update` returns: the full keys and values, with a tag that leads the attention function here."""
        self.current.awaiting = self
        return tagged(keys, self), tagged(values, self)

    def _exact_pass(self, exact: ExactLayer, query: Tensor) -> Tensor:
        """What the pass of the exact mode under way asks of this layer."""
        assert self._newest is not None
        keys, values = self._newest
        self._newest = None
        if self.current.drafting == "draft":
            return exact.draft(query[:, :, 0], keys[:, :, 0], values[:, :, 0])[:, :, None]
        if self.current.drafting != "verify":
            raise RuntimeError("this cache is inside an exact `generate`: no other pass may use it")
        return exact.verify(query, keys, values)

    def _visible(self, mask: Tensor | None) -> Tensor | None:
        """`[B, width]` bool, what the newest query sees; `None` when it is everything."""
        raise NotImplementedError

    def _decodes(self) -> bool:
        """Whether a pass over one token that is no prompt is a decode step."""
        raise NotImplementedError


class ServedCache:
    """What both forms of the cache offer to `generate` and to the loop of the exact mode.

    Attributes:
        refresh: the settings.
        stats: where decode steps are counted.
        is_kept: somebody holds on to the cache after `generate`.
        owner: what marks the session that made the cache, if one did.
        cycle: in the exact mode, what its layers share.
    """

    layers: list[Any]
    cycle: Cycle | None = None

    def _serve(self, config: PreTrainedConfig, refresh: RefreshConfig, stats: Stats | None) -> None:
        self.refresh = refresh
        self.stats = Stats() if stats is None else stats
        self.is_kept = True
        self.owner: object = None
        self._decoder = config.get_text_config(decoder=True)
        self._current = Pass()

    def is_for(self, config: PreTrainedConfig) -> bool:
        """Whether the cache was made from the config, the very object, of a model."""
        return config.get_text_config(decoder=True) is self._decoder

    @property
    def served(self) -> list[ServedLayer]:
        """The layers that are ours."""
        return [layer for layer in self.layers if isinstance(layer, ServedLayer)]

    @property
    def in_prompt(self) -> bool:
        """Whether passes belong to a prompt now."""
        return self._current.prompt

    def served_length(self) -> int | None:
        """Tokens in the fullest of these layers; `None` where there is none."""
        return max((int(layer.get_seq_length()) for layer in self.served), default=None)  # type: ignore[attr-defined]

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Passes inside belong to a prompt even when they hold one token (the last chunk of a chunked prefill)."""
        self._current.prompt = True
        try:
            yield
        finally:
            self._current.prompt = False

    @contextmanager
    def without_masks(self) -> Iterator[None]:
        """No layer needs a mask in the passes inside, so transformers shall make none: it may wait for the device."""
        self._current.maskless = True
        before = _maskless.set(True)
        try:
            yield
        finally:
            _maskless.reset(before)
            self._current.maskless = False

    def begin_exact(self, visible: Tensor | None) -> Cycle:
        """From here on passes are drafts or verifications, `drafting`. `visible` `[B, L]`, `None` for no padding."""
        self.cycle = Cycle(self.served[0].inner.store.lengths)
        for layer in self.served:
            layer.begin_exact(visible, self.cycle)
        return self.cycle

    @contextmanager
    def drafting(self, kind: Literal["draft", "verify"]) -> Iterator[None]:
        """The pass inside is one of the exact mode; `cycle` says of which rows."""
        assert self.cycle is not None
        self._current.drafting = kind
        if kind == "draft":
            self.cycle.begin_draft(not self.served[0].inner.fixed)
        try:
            yield
        finally:
            self._current.drafting = None
            if kind == "draft":
                self.cycle.end_draft()

    def before_drafts(self) -> None:
        """A cycle begins in which some row drafts: select."""
        for layer in self.served:
            assert layer.exact is not None
            with without_autocast(layer.inner.store.device):
                layer.exact.select()

    def commit(self, kept: Tensor) -> None:
        """Each row keeps the first `kept` `[B]` tokens of the full pass: the end of a cycle."""
        assert self.cycle is not None
        first = self.served[0].inner
        with without_autocast(kept.device):
            if first.fixed:
                assert first.hidden is not None
                self.cycle.sums += self.cycle.counted_pass(kept, first.hidden)
            else:
                for layer in self.served:
                    assert layer.exact is not None
                    layer.exact.commit(kept)
            self.cycle.advance(kept)

    def settle(self) -> None:
        """What full passes counted for all layers goes to each: before somebody looks at the statistics."""
        assert self.cycle is not None
        for layer in self.served:
            if layer.exact is not None:
                layer.exact.settle()
        self.cycle.sums.zero_()

    def _check(self) -> None:
        """Raises `RuntimeError` before an update that our attention function would not learn of."""
        if not str(self._decoder._attn_implementation).startswith(IMPLEMENTATION_PREFIX):
            raise RuntimeError(
                "RefreshCache needs an attached model (here it would silently be ordinary attention):"
                " use it inside `with refreshkv.attach(model):`, made from that model's own config"
            )
        lost = self._current.awaiting
        if lost is not None:
            self._current.awaiting = None  # this pass is over
            raise RuntimeError(
                f"the keys of layer {lost.index} never reached RefreshKV's attention function:"
                " this architecture changes them after the cache; it is not supported"
            )


def tagged(states: Tensor, layer: ServedLayer) -> Tensor:
    """A view of keys or values that leads the attention function to `layer`.

    A tag on a buffer itself would be a circle, which keeps a cache alive for the garbage collector.
    """
    view = states.view_as(states)
    setattr(view, _TAG, layer)
    return view


def masks_are_wanted() -> bool:
    """Whether the host shall make masks in the pass under way; a pass that is compiled has them."""
    return torch.compiler.is_compiling() or not _maskless.get()


def layer_of(states: Tensor) -> ServedLayer | None:
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
