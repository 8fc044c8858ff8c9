"""What is timed against what: one cache a variant, all over the same random content, and one step over each.

A prefill of 64K tokens would take longer than the benchmark, so the caches are filled with noise. There is one full
store, the buffers of transformers' static cache: every other cache is made of views of them, a short one of their last
tokens, so that new tokens of all go to the same places behind the context. Every step is taken back, so that each
begins where the context ends.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from refreshkv.bench.job import Job
from refreshkv.bench.rivals import PACKED, InPlace
from refreshkv.bench.shapes import random_states
from refreshkv.bench.timing import OUT_OF_MEMORY, Timed, forget
from refreshkv.cache.store import DenseStore
from refreshkv.config import RefreshConfig, make_config
from refreshkv.hosts.transformers import RefreshCache
from refreshkv.hosts.transformers.fallback import CACHES
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.kernels.options import AttendOptions

# Every time that is reported, in the order of the table.
NAMES = {
    "empty": "full attention over one token: weights and Python alone",
    "snapkv": "eviction: full attention over K tokens, what SnapKV leaves",
    "partial": "partial step",
    "full": "full step with re-selection",
    "own_dense": "our full attention without selection",
    "static": "transformers StaticCache, compiled where there is a GPU",
    "flash": "full attention by torch's FlashAttention, the GQA group packed, appending in place",
    "default": "transformers DynamicCache, the default of generate",
    "mixed": "step of the mixed mode: a copy of all entries in two bits, K of a head exactly at most",
    "draft": "one draft pass",
    "verify": "one full pass over all drafts and the token before them",
    "cycle": "selection, drafts, full pass, commit",
    "mix": "partial and full steps, at the stride",
    "exact": "a token of the lossless mode: cycle / tokens per pass",
}
# Those that can be left out, the most important first: that is who gets memory.
VARIANTS = (
    *("own_dense", "flash", "static", "exact", "mixed", "partial", "full"),
    *("empty", "snapkv", "default"),
)


class Context:
    """Noise for the keys and values of `job.context` tokens in every layer.

    Attributes:
        static: transformers' static cache, whose buffers hold it.
        queries: `[B, Hq, T, D]`, the last of a prompt that never was.
    """

    def __init__(self, model: PreTrainedModel, job: Job) -> None:
        config, device = model.config, job.device
        self.job = job
        generator = torch.Generator(device=device).manual_seed(1)
        self.static = StaticCache(config=config, max_cache_len=job.room)
        shape = (job.batch, config.num_key_value_heads, config.head_dim)
        self.static.early_initialization(*shape, job.dtype, device)
        for part in (part for both in self.held() for part in both):
            part.normal_(generator=generator)
        heads, window = config.num_attention_heads, make_config("default").window
        self.queries = random_states(job, generator, heads, window)
        self.options = AttendOptions(scale=config.head_dim**-0.5)
        self.take_back(self.static)

    def held(self, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, keys and values `[B, Hkv, count, D]`: views of the last `count` tokens, `None` for all."""
        end = self.job.context
        begin = 0 if count is None else end - count
        return [
            (layer.keys[:, :, begin:end], layer.values[:, :, begin:end])
            for layer in self.static.layers
        ]

    def serve(self, cache: RefreshCache | StaticRefreshCache, count: int) -> None:
        """One of ours gets the last `count` tokens, and selects from them."""
        begin = self.job.context - count
        for layer, buffers in zip(cache.layers, self.static.layers, strict=True):
            keys, values = buffers.keys[:, :, begin:], buffers.values[:, :, begin:]
            if isinstance(cache, StaticRefreshCache):
                layer.share(keys, values, count)
            else:
                layer.inner.store = DenseStore.over(keys, values, count)
            layer.observe(self.queries, self.options, None)
            if isinstance(cache, StaticRefreshCache):
                layer.begin_decoding()

    def in_place(self) -> DynamicCache:
        """A cache of `rivals.InPlace`."""
        cache = DynamicCache()
        cache.layers = [
            InPlace(layer.keys, layer.values, self.job.context) for layer in self.static.layers
        ]
        return cache

    def take_back(self, cache: Cache) -> None:
        """One of transformers' caches holds the context and nothing else."""
        for layer, (keys, values) in zip(cache.layers, self.held(), strict=True):
            if isinstance(cache, StaticCache):
                layer.cumulative_length.fill_(self.job.context)
            else:
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values


def caches(
    model: PreTrainedModel,
    context: Context,
    skip: tuple[str, ...] = (),
    notes: dict[str, str] | None = None,
) -> dict[str, Cache]:
    """The cache of each variant but those to `skip`, over the context.

    `notes` gets the reason where there is no memory for one.
    """
    job, config = context.job, model.config
    full = RefreshConfig(mode="full")
    settings = {
        "own_dense": full,
        "empty": full,
        "snapkv": full,
        "partial": RefreshConfig(budget=job.budget, stride=None),
        "full": RefreshConfig(budget=job.budget, stride=1, threshold=None),
        "mixed": make_config("fast", budget=job.budget),
        "exact": make_config("default", budget=job.budget, draft=job.draft),
    }
    tokens = {"empty": 1, "snapkv": min(job.budget, job.context)}
    made: dict[str, Cache] = {}
    for name in VARIANTS:
        if name in skip:
            continue
        if name == "static":
            made[name] = context.static
        elif name == "flash":
            made[name] = context.in_place()
        elif name not in settings:
            made[name] = DynamicCache(config=config)
            context.take_back(made[name])
        else:
            count = tokens.get(name, job.context)
            try:
                made[name] = _ours(config, settings[name], context, count)
            except OUT_OF_MEMORY as error:
                forget(name, error, {} if notes is None else notes, job.device)
    return made


def _ours(
    config: Any, refresh: RefreshConfig, context: Context, count: int
) -> RefreshCache | StaticRefreshCache:
    job, cache = context.job, RefreshCache(config, refresh)
    if job.static:
        room = job.room - job.context + count
        cache = StaticRefreshCache(config, refresh, max_cache_len=room)
    context.serve(cache, count)
    return cache


def forward(
    model: PreTrainedModel,
    implementation: str,
    cache: Cache,
    tokens: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """`[B, T]` tokens -> logits `[B, T, V]`. transformers' own caches run on the `implementation` named.

    Over ours transformers makes no masks, as in the passes that `generate` captures: nobody is padded.
    """
    config = model.config
    attached = config._attn_implementation_internal
    ours = isinstance(cache, CACHES)
    if not ours:
        config._attn_implementation_internal = implementation
    try:
        with cache.without_masks() if ours else nullcontext():  # type: ignore[attr-defined]
            return model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                **{CACHE: cache},
            ).logits
    finally:
        config._attn_implementation_internal = attached


def step(
    model: PreTrainedModel,
    below: str,
    name: str,
    cache: Cache,
    context: Context,
    eager: bool = False,
) -> Timed:
    """One decode step of a variant, `[B, V]` logits, which is taken back. `below`: as in `attach`.

    `eager`: not compiled, whatever the job says.
    """
    job = context.job
    token = torch.ones(job.batch, 1, dtype=torch.int64, device=job.device)
    implementation = PACKED if name == "flash" else below
    theirs = job.device.type == "cuda" and type(cache) is StaticCache
    ours = job.compiled and isinstance(cache, StaticRefreshCache)
    run: Any = _Compiled(model) if (theirs or ours) and not eager else model
    timed = Timed(lambda: forward(run, implementation, cache, token)[:, -1], job.steps)
    if isinstance(cache, StaticRefreshCache):
        for _ in range(2):  # the host knows what a step is; the first may complete a block
            cache.next_step()
    if isinstance(cache, CACHES):
        timed.after = functools.partial(take_back, cache, int(cache.served_length() or 0))
    elif name != "flash":  # which keeps no token
        timed.after = functools.partial(context.take_back, cache)
    return timed


class _Compiled:
    """A model whose forward pass is compiled, as `generate` does it: on a GPU into CUDA graphs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self._call = torch.compile(model.__call__, mode="reduce-overhead", dynamic=False)

    def __call__(self, **inputs: Any) -> Any:
        out = self._call(**inputs)
        out.logits = out.logits.clone()  # the next replay overwrites them
        return out


def take_back(cache: RefreshCache | StaticRefreshCache, length: int) -> None:
    """The store of one of ours ends at `length` again; what was selected from it stays, and so do its codes.

    No code covers a token that is taken back: a step encodes what is complete without the new token.
    """
    for layer in cache.served:
        layer.inner.store.level(length)
