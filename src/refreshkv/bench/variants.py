"""What is timed against what: one cache a variant, all with the same random content, and one step over each.

A prefill of 64K tokens would take longer than the benchmark, so the caches are filled with noise. Ours share one full
store with transformers' static cache, and every step is taken back, so that each begins where the context ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import is_flash_attn_2_available

from refreshkv.bench.job import Job
from refreshkv.cache.store import DenseStore
from refreshkv.config import RefreshConfig, make_config, unknown
from refreshkv.hosts.transformers import RefreshCache
from refreshkv.hosts.transformers.fallback import CACHES
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.kernels.options import AttendOptions

_NEVER = 1e9  # nats that no log-sum-exp falls

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
    "fast_partial": "partial step of fast, which fetches successors and watches the log-sum-exp",
    "fast_full": "full step of fast, which reads keys only",
    "draft": "one draft pass",
    "verify": "one full pass over all drafts and the token before them",
    "cycle": "selection, drafts, full pass, commit",
    "mix": "partial and full steps, at the stride",
    "fast": "the preset fast, at the share of full steps that it had on the demo's tasks",
    "exact": "a token of the lossless mode: cycle / tokens per pass",
}
# Those that can be left out, with what they are made of.
VARIANTS = (
    *("empty", "snapkv", "partial", "full", "fast", "exact"),
    *("own_dense", "static", "flash", "default"),
)


def check_names(skip: tuple[str, ...]) -> None:
    """Raises `ValueError` for a variant that does not exist."""
    for name in skip:
        if name not in VARIANTS:
            raise ValueError(unknown("variant", name, VARIANTS))


def caches(model: PreTrainedModel, job: Job, skip: tuple[str, ...]) -> dict[str, Cache]:
    """The cache of each variant that is wanted and possible here, filled."""
    full = RefreshConfig(mode="full")
    ours = {
        "own_dense": full,
        "empty": full,
        "snapkv": full,
        "partial": RefreshConfig(budget=job.budget, stride=None),
        "full": RefreshConfig(budget=job.budget, stride=1, threshold=None),
        "fast_partial": make_config("fast", budget=job.budget, drop=_NEVER),
        "fast_full": make_config("fast", budget=job.budget, stride=1),
        "exact": make_config("default", budget=job.budget, draft=job.draft),
    }
    wanted = [name for name in ours if name.split("_")[0] not in skip and name not in skip]
    shorter = {"empty": 1, "snapkv": min(job.budget, job.context)}
    made: dict[str, Cache] = {}
    for name in wanted:
        if job.static:
            room = job.room - job.context + shorter.get(name, job.context)
            made[name] = StaticRefreshCache(model.config, ours[name], max_cache_len=room)
        else:
            made[name] = RefreshCache(model.config, ours[name])
    if "static" not in skip:
        made["static"] = StaticCache(config=model.config, max_cache_len=job.room)
    if "flash" not in skip and job.device.type == "cuda" and is_flash_attn_2_available():
        made["flash"] = DynamicCache(config=model.config)
    if "default" not in skip:
        made["default"] = DynamicCache(config=model.config)
    _fill(model, made, job, shorter)
    return made


def _fill(
    model: PreTrainedModel, made: Mapping[str, Cache], job: Job, shorter: Mapping[str, int]
) -> None:
    """Noise in every layer; the first so many tokens of it, in a store of its own, where a variant is `shorter`."""
    config, kept = model.config, make_config("default").window
    generator = torch.Generator(device=job.device).manual_seed(1)

    def noise(heads: int, tokens: int) -> Tensor:
        size = (job.batch, heads, tokens, config.head_dim)
        return torch.randn(*size, generator=generator, device=job.device, dtype=job.dtype)

    for index in range(config.num_hidden_layers):
        keys, values = (noise(config.num_key_value_heads, job.context) for _ in range(2))
        queries = noise(config.num_attention_heads, kept)
        shared = DenseStore(job.room)
        for name in sorted(made, key=lambda name: name != "static"):  # its buffers are shared
            cache, tokens = made[name], shorter.get(name, job.context)
            if not isinstance(cache, CACHES):
                cache.update(keys, values, index)
                continue
            layer, static = cache.layers[index], made.get("static")
            if name in shorter or (job.static and static is None):
                into = layer.update if job.static else layer.inner.append
                into(keys[:, :, :tokens], values[:, :, :tokens])
            elif job.static:
                layer.share(static.layers[index])
            else:
                if (
                    static is not None
                ):  # four rows of 128K tokens of an 8B model fit a GPU once, not twice
                    buffers = static.layers[index]
                    shared = DenseStore.over(buffers.keys, buffers.values, job.context)
                elif not shared.is_allocated:
                    shared.append(keys, values)
                layer.inner.store = copy.copy(shared)
            layer.observe(queries, AttendOptions(scale=config.head_dim**-0.5), None)
            if job.static:
                layer.begin_decoding()


def over_same_store(cache: Cache, model: PreTrainedModel) -> Cache:
    """A cache of full attention over what one of ours holds."""
    full, config = RefreshConfig(mode="full"), model.config
    if isinstance(cache, StaticRefreshCache):
        twin = StaticRefreshCache(config, full, max_cache_len=cache.layers[0].max_cache_len)
        for ours, theirs in zip(twin.layers, cache.layers, strict=True):
            ours.share(theirs)
        return twin
    twin = RefreshCache(config, full)
    for ours, theirs in zip(twin.layers, cache.layers, strict=True):
        store = theirs.inner.store
        ours.inner.store = copy.copy(store)
        ours.inner.store.level(store.width)
    return twin


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


def stepper(
    model: PreTrainedModel, below: str, name: str, cache: Cache, job: Job
) -> Callable[[], Tensor]:
    """One decode step of a variant, `[B, V]` logits. `below`: the implementation under the attached one."""
    token = torch.ones(job.batch, 1, dtype=torch.int64, device=job.device)
    implementation = "flash_attention_2" if name == "flash" else below

    def step() -> Tensor:
        return forward(run, implementation, cache, token)[:, -1]

    theirs = job.device.type == "cuda" and type(cache) is StaticCache
    ours = job.compiled and isinstance(cache, StaticRefreshCache)
    run: Any = _Compiled(model) if theirs or ours else model
    return step


class _Compiled:
    """A model whose forward pass is compiled, as `generate` does it: on a GPU into CUDA graphs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self._call = torch.compile(model.__call__, mode="reduce-overhead", dynamic=False)

    def __call__(self, **inputs: Any) -> Any:
        out = self._call(**inputs)
        out.logits = out.logits.clone()  # the next replay overwrites them
        return out


def end_of(cache: Cache) -> int | None:
    """Where the store of one of ours ends; `None` for one of transformers'."""
    return int(cache.layers[0].get_seq_length()) if isinstance(cache, CACHES) else None


def take_back(cache: Cache, length: int) -> None:
    """The store of one of ours ends at `length` again; what was selected from it stays."""
    for layer in cache.layers:
        if isinstance(cache, StaticRefreshCache):
            layer.cumulative_length.fill_(length)
        else:
            layer.inner.store.crop(length)
