"""`CapturedModel`: what `generate` calls for each new token in place of the model, one replay of a CUDA graph."""

from __future__ import annotations

import contextvars
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import StaticSlidingWindowLayer
from transformers.generation import GenerationMode
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from refreshkv.hosts.transformers.graphs import say_without
from refreshkv.hosts.transformers.masks import padding
from refreshkv.hosts.transformers.regions import Regions
from refreshkv.hosts.transformers.static import StaticRefreshCache, StaticRefreshLayer
from refreshkv.hosts.transformers.support import exact_reason
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.stats import RowStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refreshkv.hosts.transformers.attach import Session

_STEP = 2048  # tokens by which a captured cache grows
_GRAIN = 256  # its length is a multiple of this, so that calls of about the same length share it
# That of the call of `generate` under way.
under_way: contextvars.ContextVar[CapturedModel | None] = contextvars.ContextVar(
    "refreshkv_captured", default=None
)


def capacity_for(tokens: int, most: int) -> int:
    """Positions of a cache that holds `tokens` and shall hold `most`: enough for a while, and then it grows."""
    wanted = max(tokens, min(most, tokens + _STEP))
    return -(-wanted // _GRAIN) * _GRAIN


class CapturedModel:
    """The model over one static cache that has graphs; each pass after the prompt is a replay.

    Args:
        model: the attached model.
        cache: whose foreign layers, if any, are sliding windows.
        most: the tokens that this call of `generate` may reach.
        regions: its layers, where they shall be compiled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: StaticRefreshCache,
        most: int,
        regions: Regions | None = None,
    ) -> None:
        self.model, self.cache, self.most = model, cache, most
        self.regions = regions
        self._foreign = [x for x in cache.layers if not isinstance(x, StaticRefreshLayer)]
        self._length: int | None = None  # tokens in the cache, once the prompt is over
        self._said = False

    def __call__(self, **inputs: Any) -> Any:
        """A pass over one token a row; inputs and output as those of the model's own `forward`."""
        mask = inputs.pop("attention_mask", None)
        if self._length is None:
            self._begin(mask)
        self.make_room(1)
        assert self._length is not None and self.cache.graphs is not None
        kind = self.cache.next_step()
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        settings = {n: x for n, x in inputs.items() if n not in tensors and n != CACHE}
        if self._is_plain(settings):
            with self.cache.decoding():
                output = self.model(**inputs, attention_mask=mask)
        else:
            what = (kind, self.cache.hides, repr(sorted(settings.items())))
            logits = self.cache.graphs.run(what, self._pass(settings), tensors)
            output = CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)
        self._length += 1
        for layer in self._foreign:  # a replay does not count for them
            layer.cumulative_length_int = self._length
        return output

    @property
    def may_be_kept(self) -> bool:
        """Whether the next call may go on with this cache; one that could not be captured leaves nothing."""
        return self.cache.graphs is not None and self.cache.graphs.reason is None

    def make_room(self, more: int, tokens: int | None = None) -> None:
        """Positions for `more` tokens after `tokens` (`None`: those of the passes so far)."""
        tokens = ((self._length or 0) if tokens is None else tokens) + more
        if tokens > self.cache.capacity:
            self.cache.grow(capacity_for(tokens, self.most))

    def _begin(self, mask: Tensor | None) -> None:
        """The prompt is over: the host looks how long it was, and at its padding, once."""
        self._length = self.cache.served_length()
        self.cache.show(padding(mask))

    def _pass(self, settings: dict[str, Any]) -> Any:
        def run(**tensors: Tensor) -> Tensor:
            with self.cache.decoding(), self.cache.without_masks(), self.compiled():
                output = self.model(**tensors, **settings, **{CACHE: self.cache})
            logits: Tensor = output.logits
            return logits

        return run

    def compiled(self) -> AbstractContextManager[None]:
        """The passes inside run compiled layers, where that was asked for."""
        return nullcontext() if self.regions is None else self.regions.use()

    def _is_plain(self, settings: dict[str, Any]) -> bool:
        """Whether this pass is not for a graph."""
        reason = None
        if any(value for name, value in settings.items() if name.startswith("output_")):
            reason = "more than logits is asked for"
        elif self._foreign and self.cache.hides:
            reason = "windows beside our layers need masks where rows are padded"
        if reason is not None and not self._said:
            self._said = True
            say_without(reason)
        # A window that is full sees all that it holds; one that is not needs a mask which grows.
        filling = any(x.cumulative_length_int < x.max_cache_len for x in self._foreign)
        return reason is not None or filling


def reason_against(session: Session, config: GenerationConfig, mode: Any) -> str | None:
    """Why a call of `generate` keeps a growing cache and decodes without graphs; `None` where it need not."""
    model, refresh = session.model, session.config.for_cache()
    decoder = model.config.get_text_config(decoder=True)
    devices = {parameter.device for parameter in model.parameters()}
    quantizer = getattr(model, "hf_quantizer", None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or config.is_assistant:
        return "only greedy search and sampling are captured"
    if session.method is not None and session.method.make is not None:
        return f"method {session.method.name!r} has no static form"
    if isinstance(session.stats, RowStats):
        return "RowStats counts every step by itself"
    if len(devices) > 1:
        return "the model lies on several devices"
    if quantizer is not None and not quantizer.is_compileable:
        return "the quantised weights cannot be captured"
    if config.disable_compile:
        return "disable_compile was asked for"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "the model takes no position_ids"
    if getattr(decoder, "num_kv_shared_layers", None):
        return "layers share their keys"
    if refresh.mode == "exact" and exact_reason(model.config) is not None:
        return "the lossless mode cannot draft with this model"
    layers = StaticRefreshCache(model.config, refresh, max_cache_len=1).layers
    ours = [isinstance(layer, StaticRefreshLayer) for layer in layers]
    windows = [type(layer) is StaticSlidingWindowLayer for layer in layers]
    if not any(ours) or not all(a or b for a, b in zip(ours, windows, strict=True)):
        return "it has layers of a kind that cannot be captured"
    if refresh.mode == "exact" and not all(ours):
        return "windows of a static cache cannot take a draft back"
    return None
