"""`attach`: one model runs under RefreshKV until `detach`, and is then exactly as it was."""

from __future__ import annotations

import contextvars
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import GenerationConfig

from refreshkv.config import Budgeted, RefreshConfig, make_config
from refreshkv.hosts.transformers import drafting
from refreshkv.hosts.transformers.attachment import attachment_of, join
from refreshkv.hosts.transformers.cache import RefreshCache
from refreshkv.hosts.transformers.captured import (
    CapturedModel,
    reason_against,
    under_way,
)
from refreshkv.hosts.transformers.fallback import CACHES, say_full
from refreshkv.hosts.transformers.graphs import recorder_for, say_without
from refreshkv.hosts.transformers.regions import Regions
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.support import (
    UnsupportedModelError,
    exact_reason,
    supported,
    unwrapped,
)
from refreshkv.hosts.transformers.versions import CACHE, check_version
from refreshkv.methods import Method, find
from refreshkv.stats import Stats

# The caches of the call of `generate` under way, each with its length before.
_caches: contextvars.ContextVar[list[tuple[Any, int | None]] | None] = contextvars.ContextVar(
    "refreshkv_caches", default=None
)


def attach(
    model: PreTrainedModel,
    config: RefreshConfig | None = None,
    *,
    method: str | None = None,
    preset: str | Mapping[str, Any] | None = None,
    stats: Stats | None = None,
    graphs: bool = True,
    compiled: bool = False,
    **overrides: Any,
) -> Session:
    """Run `model.generate` under RefreshKV, or under a method it is compared with.

        with refreshkv.attach(model, budget=0.125) as session:
            out = model.generate(**inputs, max_new_tokens=2048)
        print(session.stats)

    Args:
        model: a decoder-only transformers model, or a PEFT model around one.
        config: complete settings; or give `preset` and single settings (fields of `RefreshConfig`).
        method: a name in `refreshkv.methods.METHODS`, for a comparison; `None` is RefreshKV. It gives the algorithm and
            its settings; single settings still count.
        preset: a name of `refreshkv.PRESETS`, or the settings of `refreshkv.load_preset`; `None` is "default".
        stats: where decode steps are counted, for example a `RowStats`; `None` is a new `Stats`.
        graphs: on a GPU `generate` decodes by CUDA graphs, captured after the prompt. What cannot be captured runs as
            it is, and a warning says why. The cache of a call is kept for the next one, until the session ends.
        compiled: these graphs are of layers that torch compiles first, one for all, which takes some ten seconds.

    Raises:
        UnsupportedModelError: an architecture that cannot be served, with the reason.
        ValueError: an unknown method, preset or setting, a setting that the method does not have, a value out of
            range, or `compiled` without `graphs`.
        TypeError: settings that are no `RefreshConfig`.
        RuntimeError: a transformers outside the tested range.
    """
    if compiled and not graphs:
        raise ValueError("compiled=True without graphs has no effect; leave out graphs=False")
    check_version()
    if config is not None and not isinstance(config, RefreshConfig):
        raise TypeError(
            f"the second argument is a RefreshConfig, not {config!r}: name a preset as preset=..., and single"
            " settings as budget=..., stride=..., ..."
        )
    if config is not None and (method is not None or preset is not None or overrides):
        raise ValueError(
            "give either a RefreshConfig or a method or preset with single settings, not both"
        )
    found = None if method is None else find(method)
    make = make_config if found is None else found.config
    settings = make(preset, **overrides) if config is None else config
    model = unwrapped(model)
    support = supported(model)
    if not support.ok:
        raise UnsupportedModelError(support.reason)
    if support.reason:
        warnings.warn(support.reason, stacklevel=2)
    return Session(model, settings, method=found, stats=stats, graphs=graphs, compiled=compiled)


def detach(model: PreTrainedModel) -> None:
    """End every session of a model, whoever holds them. Does nothing where there is none."""
    attachment = attachment_of(unwrapped(model))
    if attachment is not None:
        attachment.end()


class Session:
    """An attachment. A context manager; or call `detach` yourself. The newest session of a thread counts.

    Attributes:
        model: the attached model.
        config: the settings; of a compared method its own.
        method: the method, where one was named.
        graphs: whether `generate` decodes by CUDA graphs, where there is a GPU.
        regions: the layers of the model, where they shall be compiled for these.
        kept: the captured cache that a call of `generate` has left for the next one.
        stats: what happened in all `generate` calls of this session; `stats.reset()` starts over.
        implementation_below: the attention implementation that serves prefill and the layers that are not ours.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Budgeted,
        *,
        method: Method | None = None,
        stats: Stats | None = None,
        graphs: bool = True,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.config = config
        self.method = method
        self.stats = Stats() if stats is None else stats
        self.graphs = graphs
        self.regions = Regions(model) if compiled else None
        self._key = object()  # marks the caches of this session
        self.kept: StaticRefreshCache | None = None
        self._attachment = join(model, self)
        self.implementation_below: str = self._attachment.below

    def new_cache(self, reserve: int = 0) -> RefreshCache:
        """A cache to pass as `past_key_values` yourself: several turns on one cache, a decode loop of your own."""
        cache = RefreshCache(
            self.model.config, self.config, stats=self.stats, reserve=reserve, method=self.method
        )
        cache.owner = self._key
        return cache

    def new_static_cache(self, max_cache_len: int) -> StaticRefreshCache:
        """A cache of fixed size for compiled decoding, as `generate(cache_implementation="static")` uses it.

        In the exact mode it is `config.draft + 1` positions longer than asked for, which drafts go through, where the
        model can draft at all.

        Raises:
            ValueError: a method other than RefreshKV.
        """
        if self.method is not None and self.method.make is not None:
            raise ValueError(
                f"method {self.method.name!r} has no static cache: drop cache_implementation='static'"
            )
        config = self.config.for_cache()
        if config.mode == "exact" and exact_reason(self.model.config) is None:
            max_cache_len += config.draft + 1  # of a row that has all but its last token
        cache = StaticRefreshCache(
            self.model.config, config, max_cache_len=max_cache_len, stats=self.stats
        )
        cache.owner = self._key
        return cache

    def detach(self) -> None:
        """End this session; the model is restored with its last one. Does nothing the second time."""
        self._attachment.end(self)
        self.kept = None

    def __enter__(self) -> Session:
        if not self._attachment.holds(self):
            raise RuntimeError("this session has ended: attach the model again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def on_generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate`: in the lossless mode with our loop, unless the caller brings one or a draft model."""
        given = {**kwargs, **inspect.signature(original).bind(*args, **kwargs).arguments}
        theirs = (
            given.get("custom_generate") is not None or given.get("assistant_model") is not None
        )
        if self.config.mode == "exact" and not theirs:
            kwargs = {**kwargs, "custom_generate": drafting.decode}
        caches: list[tuple[Any, int | None]] = []
        before, outer = _caches.set(caches), under_way.set(None)
        try:
            result = original(*args, **kwargs)
            captured = under_way.get()
        finally:
            _caches.reset(before)
            under_way.reset(outer)
        for cache, length in caches:
            _check_used(cache, length)
        if captured is not None and captured.may_be_kept and not hasattr(result, CACHE):
            self.kept = captured.cache
        return result

    def on_extract_generation_mode_kwargs(
        self, original: Callable[..., Any], custom_generate: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers keeps the streamer, the tokenizer and the like from a loop it does not know; not from ours."""
        ours = custom_generate is drafting.decode
        return original(None if ours else custom_generate, *args, **kwargs)

    def on_prepare_cache_for_generation(
        self,
        original: Callable[..., Any],
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Where `generate` makes its default cache: ours instead, or a clear error where it would be ignored."""
        given = model_kwargs.get(CACHE)
        if given is not None:
            self._check_given(given)
        if self._runs_plain(generation_config, given):
            return original(generation_config, model_kwargs, *args, **kwargs)
        name = generation_config.cache_implementation
        if name not in (None, "dynamic", "static") or given is not None:
            if name != self.model.generation_config.cache_implementation:
                raise ValueError(
                    f"cache_implementation={name!r} would replace RefreshKV's cache: drop it, or ask for 'static'"
                )
            # What the checkpoint ships (Gemma: "hybrid") is a default like DynamicCache, not a wish of the caller.
            # `generate` works on a copy, so this forgets nothing of the model's.
            generation_config.cache_implementation = None
        result = original(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE)
        if given is None:
            length = kwargs.get("max_cache_length", args[-1] if args else 0)
            mode = kwargs.get("generation_mode", args[0] if args else None)
            batch = kwargs.get("batch_size", args[-2] if len(args) > 1 else 0)
            rows = batch * (generation_config.num_return_sequences or 1)
            if type(made) is DynamicCache and self._captures(generation_config, mode):
                made = model_kwargs[CACHE] = self._captured_cache(rows, length)
            else:
                made = model_kwargs[CACHE] = self._in_place_of(made, length)
            if generation_config.is_assistant and isinstance(made, RefreshCache):
                made.activate_past_recording()  # a draft model rolls back
        caches = _caches.get()
        if caches is not None:
            caches.append((made, made.served_length()))
        return result

    def on_prefill(
        self,
        original: Callable[..., Any],
        input_ids: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """The prompt: a last chunk of one token must not be taken for a decode step."""
        cache = model_kwargs.get(CACHE)
        if not isinstance(cache, CACHES):
            return original(input_ids, generation_config, model_kwargs, **kwargs)
        captured = under_way.get()
        if captured is not None:
            embeds = model_kwargs.get("inputs_embeds")
            captured.make_room((input_ids if embeds is None else embeds).shape[1])
        length = cache.served_length()
        with cache.prompt():
            result = original(input_ids, generation_config, model_kwargs, **kwargs)
            _check_used(cache, length)
        return result

    def on_valid_auto_compile_criteria(
        self, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Whether `generate` asks for another call than the model's own: ours, where passes are captured.

        A prompt in chunks is not captured, and not compiled either.
        """
        captured = under_way.get()
        return original(*args, **kwargs) if captured is None else not captured.cache.in_prompt

    def on_get_compiled_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """That call."""
        return under_way.get() or original(*args, **kwargs)

    @property
    def captures(self) -> bool:
        """Whether `generate` decodes by graphs on this device, if the call allows it."""
        return self.graphs and recorder_for(self.model.device) is not None

    def _captures(self, config: GenerationConfig, mode: Any) -> bool:
        """Whether this call decodes by graphs over a static cache."""
        if not self.captures:
            return False
        reason = reason_against(self, config, mode)
        if reason is not None:
            say_without(reason)
        return reason is None

    def _captured_cache(self, rows: int, most: int) -> StaticRefreshCache:
        """A static cache with graphs, that of the call before where it fits."""
        cache, self.kept = self.kept, None
        if cache is None or cache.rows != rows:
            recorder = recorder_for(self.model.device)
            assert recorder is not None
            cache = self.new_static_cache(most)
            cache.capture(recorder)
            cache.is_kept = False
        cache.reset()
        under_way.set(CapturedModel(self.model, cache, most, self.regions))
        return cache

    def _check_given(self, cache: Any) -> None:
        """Raises `ValueError` for a cache that does not belong to this session."""
        remedy = "pass session.new_cache() of this session"
        if not isinstance(cache, CACHES):
            raise ValueError(
                f"this model is attached, but {CACHE} is a {type(cache).__name__}: {remedy}"
            )
        if not cache.is_for(self.model.config):
            raise ValueError(f"{CACHE} was made for another model: {remedy}")
        if cache.owner not in (None, self._key):
            raise ValueError(f"{CACHE} was made in another session: {remedy}")
        if cache.refresh.mode != self.config.mode:
            raise ValueError(
                f"{CACHE} was made for mode {cache.refresh.mode!r}, this session has {self.config.mode!r}: {remedy}"
            )

    def _runs_plain(self, generation_config: GenerationConfig, given: Any) -> bool:
        """Whether this call runs without a cache of ours: attention weights, or no cache at all, were asked for.

        Raises:
            ValueError: neither the cache that was given nor a lossy mode can do so.
        """
        mode = self.config.mode
        lossy = mode in ("mixed", "refresh")
        if generation_config.output_attentions:
            asked, served = "output_attentions=True", not lossy or self.method is None
        elif generation_config.use_cache is False:
            asked, served = "use_cache=False", not lossy
        else:
            return False
        if given is not None:
            raise ValueError(f"{asked} needs full attention without {CACHE}: leave one of them out")
        if not served:
            raise ValueError(f"{asked} needs full attention: leave it out, or attach mode='full'")
        if mode != "full":
            say_full(mode, f"{asked} was asked for")
        return True

    def _in_place_of(self, made: Any, length: int) -> RefreshCache | StaticRefreshCache:
        """Our cache instead of the one that `generate` has just made for `length` tokens."""
        cache: RefreshCache | StaticRefreshCache
        if type(made) is StaticCache:
            # Layers without keys and values have no such length.
            lengths = [getattr(layer, "max_cache_len", 0) for layer in made.layers]
            cache = self.new_static_cache(max(lengths))
        elif type(made) is DynamicCache:
            cache = self.new_cache(reserve=length)
        else:
            raise RuntimeError(
                f"generate made {'no cache' if made is None else f'a {type(made).__name__}'}, which RefreshKV cannot"
                f" stand in for: {type(self.model).__name__} is not supported in this way of generating"
            )
        cache.is_kept = False
        return cache


def _check_used(cache: Any, length: int | None) -> None:
    """Raises `RuntimeError` where our layers still hold the `length` tokens that they held before the prompt."""
    if length is not None and cache.served_length() <= length:
        raise RuntimeError(
            "generate never filled RefreshKV's cache, so this would be ordinary attention: gradient checkpointing in"
            " training mode switches caches off (call model.eval()), and prefix tuning or a wrapper may bring its own"
        )
