"""`attach`: one model runs under RefreshKV until `detach`, and is then exactly as it was."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import GenerationConfig

from refreshkv.config import RefreshConfig, make_config
from refreshkv.integrations.transformers import exact
from refreshkv.integrations.transformers.attention import register
from refreshkv.integrations.transformers.cache import IMPLEMENTATION_PREFIX, RefreshCache
from refreshkv.integrations.transformers.static import StaticRefreshCache
from refreshkv.integrations.transformers.support import UnsupportedModelError, supported
from refreshkv.methods import Method, find
from refreshkv.stats import Stats

_ABSENT = object()


def attach(
    model: PreTrainedModel,
    config: RefreshConfig | None = None,
    *,
    method: str | None = None,
    preset: str | None = None,
    stats: Stats | None = None,
    **overrides: Any,
) -> Session:
    """Run `model.generate` under RefreshKV, or under a method it is compared with.

        with refreshkv.attach(model, budget=0.125) as session:
            out = model.generate(**inputs, max_new_tokens=2048)
        print(session.stats)

    Args:
        model: a decoder-only transformers model.
        config: complete settings; or give `preset` and single settings (fields of `RefreshConfig`).
        method: a name in `refreshkv.methods.METHODS`, for a comparison; `None` is RefreshKV. It gives the algorithm and
            its settings; single settings still count.
        preset: see `refreshkv.PRESETS`; `None` is "default".
        stats: where decode steps are counted, for example a `RowStats`; `None` is a new `Stats`.

    Raises:
        UnsupportedModelError: an architecture that cannot be served, with the reason.
        ValueError: an unknown method, preset or setting, a setting that the method does not have, or a value out of
            range.
    """
    if config is not None and (method is not None or preset is not None or overrides):
        raise ValueError(
            "give either a RefreshConfig or a method or preset with single settings, not both"
        )
    found = None if method is None else find(method)
    if config is None:
        config = (
            make_config(preset, **overrides) if found is None else found.config(preset, **overrides)
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"attach needs a transformers PreTrainedModel, got {type(model).__name__}"
        )
    support = supported(model)
    if not support.ok:
        raise UnsupportedModelError(support.reason)
    if support.reason:
        warnings.warn(support.reason, stacklevel=2)
    return Session(model, config, method=found, stats=stats)


class Session:
    """An attachment. A context manager; or call `detach` yourself. Nested sessions end in reverse order.

    Attributes:
        config: the settings.
        method: the method, where one was named.
        stats: what happened in all `generate` calls of this session; `stats.reset()` starts over.
        implementation_below: the attention implementation that serves prefill and the layers that are not ours.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: RefreshConfig,
        *,
        method: Method | None = None,
        stats: Stats | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.method = method
        self.stats = Stats() if stats is None else stats
        self._decoder = model.config.get_text_config(decoder=True)
        self._implementation = self._decoder._attn_implementation_internal
        # Name -> what the instance had under it, and ours.
        self._replaced: dict[str, tuple[Any, Callable[..., Any]]] = {}
        outer = getattr(vars(model).get("_prefill"), "__self__", None)
        self._outer: Session | None = outer if isinstance(outer, Session) else None
        # The implementation below every session: nesting must not stack our own functions.
        self.implementation_below: str = (
            self._outer.implementation_below if self._outer else (self._implementation or "eager")
        )
        if self.implementation_below.startswith(IMPLEMENTATION_PREFIX):
            raise RuntimeError(
                "this model shares its config with an attached model: give it a copy of its own"
            )
        self._attached = True
        self._decoder._attn_implementation_internal = register(self.implementation_below)
        self._replace("_prepare_cache_for_generation", self._prepare_cache)
        self._replace("_prefill", self._prefill)
        if config.mode == "exact":
            self._replace("generate", self._generate)
            self._replace("_extract_generation_mode_kwargs", self._extract_kwargs)

    def new_cache(self, reserve: int = 0) -> RefreshCache:
        """A cache to pass as `past_key_values` yourself: several turns on one cache, a decode loop of your own."""
        return RefreshCache(
            self.model.config, self.config, stats=self.stats, reserve=reserve, method=self.method
        )

    def new_static_cache(self, max_cache_len: int) -> StaticRefreshCache:
        """A cache of fixed size for compiled decoding, as `generate(cache_implementation="static")` uses it.

        Raises:
            ValueError: a method other than RefreshKV.
        """
        if self.method is not None and self.method.make is not None:
            raise ValueError(f"method {self.method.name!r} has no static cache: drop it")
        if self.config.mode == "exact":
            max_cache_len += self.config.draft + 1  # of a row that has all but its last token
        return StaticRefreshCache(
            self.model.config, self.config, max_cache_len=max_cache_len, stats=self.stats
        )

    def detach(self) -> None:
        """Restore the model. Does nothing the second time.

        Raises:
            RuntimeError: a session attached to the same model later is still active.
        """
        if not self._attached:
            return
        for name, (_, ours) in self._replaced.items():
            if vars(self.model).get(name) is not ours:
                raise RuntimeError("detach the sessions attached to this model later first")
        for name, (before, _) in self._replaced.items():
            if before is _ABSENT:
                delattr(self.model, name)
            else:
                setattr(self.model, name, before)
        self._decoder._attn_implementation_internal = self._implementation
        self._attached = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _replace(self, name: str, ours: Callable[..., Any]) -> None:
        self._replaced[name] = (vars(self.model).get(name, _ABSENT), ours)
        setattr(self.model, name, ours)

    def _original(self, name: str) -> Callable[..., Any]:
        """The model's own method, below every session."""
        session, before = self, _ABSENT
        while session is not None:  # one in between may have left this method alone
            before = session._replaced.get(name, (before,))[0]
            session = session._outer
        return getattr(type(self.model), name).__get__(self.model) if before is _ABSENT else before

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` with the lossless loop, unless the caller brings a loop or a draft model of their own."""
        original = self._original("generate")
        given = {**kwargs, **inspect.signature(original).bind(*args, **kwargs).arguments}
        if given.get("custom_generate") is not None or given.get("assistant_model") is not None:
            return original(*args, **kwargs)
        return original(*args, **{**kwargs, "custom_generate": exact.decode})

    def _extract_kwargs(self, custom_generate: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers keeps the streamer, the tokenizer and the like from a loop it does not know; not from ours."""
        ours = custom_generate is exact.decode
        original = self._original("_extract_generation_mode_kwargs")
        return original(None if ours else custom_generate, *args, **kwargs)

    def _prepare_cache(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Where `generate` makes its default cache: ours instead, or a clear error where it would be ignored."""
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, RefreshCache | StaticRefreshCache):
            raise ValueError(
                f"this model is attached, but past_key_values is a {type(given).__name__}: pass session.new_cache()"
            )
        if generation_config.use_cache is False:
            raise ValueError(
                "RefreshKV needs the KV cache: use_cache=True (or set it in model.generation_config)"
            )
        name = generation_config.cache_implementation
        if name == self.model.generation_config.cache_implementation:
            # What the checkpoint ships (Gemma: "hybrid") is a default like DynamicCache, not a wish of the caller.
            # `generate` works on a copy, so this forgets nothing of the model's.
            generation_config.cache_implementation = None
        elif name not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={name!r} would replace RefreshKV's cache: drop it, or ask for 'static'"
            )
        result = self._original("_prepare_cache_for_generation")(
            generation_config, model_kwargs, *args, **kwargs
        )
        made = model_kwargs.get("past_key_values")
        if type(made) is StaticCache:
            longest = max(layer.max_cache_len for layer in made.layers)
            model_kwargs["past_key_values"] = self.new_static_cache(longest)
            model_kwargs["past_key_values"].is_kept = False
        elif given is None and type(made) is DynamicCache:
            final_length = kwargs.get("max_cache_length", args[-1] if args else 0)
            model_kwargs["past_key_values"] = self.new_cache(reserve=final_length)
            model_kwargs["past_key_values"].is_kept = False
            if generation_config.is_assistant:  # a draft model rolls back
                model_kwargs["past_key_values"].activate_past_recording()
        return result

    def _prefill(
        self,
        input_ids: Any,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> Any:
        """The prompt: a last chunk of one token must not be taken for a decode step."""
        original = self._original("_prefill")
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, RefreshCache | StaticRefreshCache):
            return original(input_ids, generation_config, model_kwargs, **kwargs)
        with cache.prompt():
            return original(input_ids, generation_config, model_kwargs, **kwargs)
