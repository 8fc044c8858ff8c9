"""What is timed against what: one cache a variant, all with the same random content, and one step over each.

A prefill of 64K tokens would take longer than the benchmark, so the caches are filled with noise. Ours share the
buffers of transformers' static cache, and every step is taken back, so that each begins where the context ends.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import is_flash_attn_2_available

from refreshkv.bench.job import Job
from refreshkv.bench.shapes import random_states
from refreshkv.bench.timing import Timed
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
    "flash": "transformers flash_attention_2 over its DynamicCache, on a GPU",
    "default": "transformers DynamicCache, the default of generate",
    "mixed": "step of the mixed mode: a copy of all entries in two bits, K of a head exactly at most",
    "draft": "one draft pass",
    "verify": "one full pass over all drafts and the token before them",
    "cycle": "selection, drafts, full pass, commit",
    "mix": "partial and full steps, at the stride",
    "exact": "a token of the lossless mode: cycle / tokens per pass",
}
# Those that can be left out, with what they are made of.
VARIANTS = (
    *("empty", "snapkv", "partial", "full", "mixed", "exact"),
    *("own_dense", "static", "flash", "default"),
)


def caches(model: PreTrainedModel, job: Job, skip: tuple[str, ...]) -> dict[str, Cache]:
    """The cache of each variant that is wanted and possible here, and of `own_dense` and `static` at any rate, filled.

    The keys and values of ours are those of `static`, or of a shorter one that holds the first of the same tokens.
    """
    full, config = RefreshConfig(mode="full"), model.config
    settings = {
        "own_dense": full,
        "empty": full,
        "snapkv": full,
        "partial": RefreshConfig(budget=job.budget, stride=None),
        "full": RefreshConfig(budget=job.budget, stride=1, threshold=None),
        "mixed": make_config("fast", budget=job.budget),
        "exact": make_config("default", budget=job.budget, draft=job.draft),
    }
    tokens = dict.fromkeys(settings, job.context)
    tokens |= {"empty": 1, "snapkv": min(job.budget, job.context)}
    room = {count: job.room - job.context + count for count in {*tokens.values()}}
    held = {count: StaticCache(config=config, max_cache_len=most) for count, most in room.items()}
    made: dict[str, Cache] = {}
    for name, refresh in settings.items():
        if name == "own_dense" or name not in skip:
            most = room[tokens[name]]
            made[name] = (
                StaticRefreshCache(config, refresh, max_cache_len=most)
                if job.static
                else RefreshCache(config, refresh)
            )
    made["static"] = held[job.context]
    flash = job.device.type == "cuda" and is_flash_attn_2_available()
    for name in ("flash", "default") if flash else ("default",):
        if name not in skip:
            made[name] = DynamicCache(config=config)
    _fill(model, made, job, tokens, held)
    return made


def _fill(
    model: PreTrainedModel,
    made: Mapping[str, Cache],
    job: Job,
    tokens: Mapping[str, int],
    held: Mapping[int, StaticCache],
) -> None:
    """Noise in every layer. Ours have so many `tokens` of it, in the buffers of the cache that holds as many."""
    config, window = model.config, make_config("default").window
    options = AttendOptions(scale=config.head_dim**-0.5)
    noise = functools.partial(random_states, job, torch.Generator(device=job.device).manual_seed(1))
    for index in range(config.num_hidden_layers):
        keys, values = (noise(config.num_key_value_heads, job.context) for _ in range(2))
        queries = noise(config.num_attention_heads, window)
        for count, static in held.items():
            static.update(keys[:, :, :count], values[:, :, :count], index)
        for name, cache in made.items():
            layer = cache.layers[index]
            if not isinstance(cache, CACHES):
                if name != "static":
                    cache.update(keys, values, index)
                continue
            buffers = held[tokens[name]].layers[index]
            if job.static:
                layer.share(buffers)
            else:
                layer.inner.store = DenseStore.over(buffers.keys, buffers.values, tokens[name])
            layer.observe(queries, options, None)
            if job.static:
                layer.begin_decoding()


def forward(
    model: PreTrainedModel,
    implementation: str,
    cache: Cache,
    tokens: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """`[B, T]` tokens -> logits `[B, T, V]`. transformers' own caches run on the `implementation` named."""
    config = model.config
    attached = config._attn_implementation_internal
    if not isinstance(cache, CACHES):
        config._attn_implementation_internal = implementation
    try:
        return model(
            input_ids=tokens, position_ids=positions, use_cache=True, **{CACHE: cache}
        ).logits
    finally:
        config._attn_implementation_internal = attached


def step(model: PreTrainedModel, below: str, name: str, cache: Cache, job: Job) -> Timed:
    """One decode step of a variant, `[B, V]` logits; one of ours is taken back. `below`: as in `attach`."""
    token = torch.ones(job.batch, 1, dtype=torch.int64, device=job.device)
    implementation = "flash_attention_2" if name == "flash" else below
    theirs = job.device.type == "cuda" and type(cache) is StaticCache
    ours = job.compiled and isinstance(cache, StaticRefreshCache)
    run: Any = _Compiled(model) if theirs or ours else model
    timed = Timed(lambda: forward(run, implementation, cache, token)[:, -1], job.steps)
    if isinstance(cache, CACHES):
        timed.after = functools.partial(take_back, cache, cache.served_length())
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
