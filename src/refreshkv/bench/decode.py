"""Milliseconds per decode step of a whole model: partial and full steps of ours against transformers' caches.

All variants take turns step by step in one run, so that a drift of the machine's speed hits them alike; medians are
reported. The caches hold the same random keys and values: a prefill of 64K tokens would take longer than the benchmark.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

import refreshkv
from refreshkv.bench.record import append_row, device_name, read_bandwidth, versions, wait_for
from refreshkv.bench.shapes import build
from refreshkv.config import RefreshConfig, unknown
from refreshkv.integrations.transformers import RefreshCache

# Logits of one step against StaticCache, relative RMS. Measured on the demo shape: 4e-7 in float32, 1e-3 in float16. In
# bfloat16 on the 1B shape: 0.005 for our full attention, 0.032 for a full step, which rounds the attention logits to
# bfloat16 in each of 16 layers.
_TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 0.05}
_SPARE = 8  # tokens beyond context and timed steps that the preallocated caches have room for

# What the columns mean, in the order of the table.
VARIANTS = {
    "empty": "partial step, empty cache: weights and Python alone",
    "partial": "partial step",
    "full": "full step with re-selection",
    "own_dense": "our full attention without selection",
    "static": "transformers StaticCache",
    "default": "transformers DynamicCache, the default of generate",
}
CHECKED = ("own_dense", "full")


class WrongResultError(RuntimeError):
    """A variant does not compute what it should; nothing was timed."""


@dataclass(frozen=True)
class Job:
    """What to time, resolved."""

    shape: str
    context: int
    batch: int
    budget: int
    stride: int | None
    device: torch.device
    dtype: torch.dtype
    steps: int


def run(
    *,
    shape: str = "llama-3.2-1b",
    context: int = 8192,
    batch: int = 1,
    budget: int | float = 0.125,
    stride: int | None = 10,
    device: str = "cpu",
    dtype: str = "bfloat16",
    steps: int = 20,
    threads: int | None = None,
    skip: tuple[str, ...] = (),
    results: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Check, then time; returns the record and appends it to `results` (CSV).

    Args:
        shape: a name in `shapes.SHAPES`.
        context: tokens in the cache. `batch`: rows.
        budget, stride: as in `RefreshConfig`; `stride=None` gives a mix of partial steps only.
        steps: timed steps of each variant, after two for warming up.
        threads: CPU threads; `None` leaves torch's choice.
        skip: variants to leave out ("default" needs minutes at long contexts).

    Raises:
        ValueError: an unknown shape or variant. WrongResultError: our logits are not those of full attention.
    """
    for variant in skip:
        if variant not in VARIANTS:
            raise ValueError(unknown("variant", variant, VARIANTS))
    if threads is not None:
        torch.set_num_threads(threads)
    tokens = RefreshConfig(budget=budget).resolve_budget(context)
    job = Job(
        shape, context, batch, tokens, stride, torch.device(device), getattr(torch, dtype), steps
    )
    model = build(shape, job.device, job.dtype)
    with torch.inference_mode(), refreshkv.attach(model) as session:
        below = session.implementation_below
        caches = _caches(model, job, skip)
        error = _check(model, below, caches, job)
        times = _time(model, below, caches, job, progress)
    record = _record(job, times, error, model)
    if results is not None:
        append_row(results, record)
    return record


def _caches(model: LlamaForCausalLM, job: Job, skip: tuple[str, ...]) -> dict[str, Cache]:
    """One cache a variant, all with the same content. Ours share the full store: they differ in policy alone."""
    room = job.context + (len(VARIANTS) + 1) * (job.steps + _SPARE)
    settings = {
        "empty": RefreshConfig(budget=job.budget, stride=None),
        "partial": RefreshConfig(budget=job.budget, stride=None),
        "full": RefreshConfig(budget=job.budget, stride=1, threshold=None),
        "own_dense": RefreshConfig(mode="full"),
    }
    caches: dict[str, Cache] = {
        name: RefreshCache(model.config, c, reserve=room) for name, c in settings.items()
    }
    caches["static"] = StaticCache(config=model.config, max_cache_len=room)
    caches["default"] = DynamicCache(config=model.config)
    caches = {name: cache for name, cache in caches.items() if name not in skip}
    config = model.config
    generator = torch.Generator(device=job.device).manual_seed(1)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=job.device, dtype=job.dtype)

    for index in range(config.num_hidden_layers):
        keys = noise(job.batch, config.num_key_value_heads, job.context, config.head_dim)
        values = noise(job.batch, config.num_key_value_heads, job.context, config.head_dim)
        query = noise(job.batch, config.num_attention_heads, 1, config.head_dim)
        shared = None
        for name, cache in caches.items():
            if name in ("static", "default"):
                cache.update(keys, values, index)
                continue
            inner = cache.layers[index].inner
            if name == "empty":
                inner.append(keys[:, :, :1], values[:, :, :1])
            elif shared is None:
                inner.append(keys, values)
                shared = inner.store
            else:
                inner.store = shared
            inner.await_selection(query)
    return caches


def _step(model: LlamaForCausalLM, below: str, cache: Cache, batch: int) -> Tensor:
    """One decode step; `[B, V]` logits. transformers' own caches run on the implementation below ours."""
    token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    config = model.config
    attached = config._attn_implementation_internal
    if not isinstance(cache, RefreshCache):
        config._attn_implementation_internal = below
    try:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
    finally:
        config._attn_implementation_internal = attached


def _check(
    model: LlamaForCausalLM, below: str, caches: dict[str, Cache], job: Job
) -> dict[str, float]:
    """Relative RMS of the logits of our dense and full steps against a StaticCache step on the same content."""
    if "static" not in caches:
        return {}
    expected = _step(model, below, caches["static"], job.batch).float()
    errors = {}
    for name in CHECKED:
        if name in caches:
            ours = _step(model, below, caches[name], job.batch).float()
            # The next variant, on the same store, starts where this one did.
            for layer in caches[name].layers:
                layer.inner.store.crop(job.context)
            errors[name] = float((ours - expected).norm() / expected.norm())
            if not errors[name] < _TOLERANCE[job.dtype]:
                raise WrongResultError(
                    f"{name}: logits differ from StaticCache by {errors[name]:.2g} (relative RMS)"
                )
    return errors


def _time(
    model: LlamaForCausalLM, below: str, caches: dict[str, Cache], job: Job, progress: bool
) -> dict[str, list[float]]:
    """Milliseconds of each timed step."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    warm_up = 2  # the first selection of each of our caches happens in its first step
    for step in tqdm(range(warm_up + job.steps), desc="steps", disable=not progress, leave=False):
        for name, cache in caches.items():
            if name == "empty":
                cache.crop(1)  # keep it empty: one token, to which the step adds its own
                for layer in cache.layers:
                    layer.inner.await_selection(
                        layer.inner.store.keys.new_zeros(job.batch, *_query(model))
                    )
                _step(model, below, cache, job.batch)  # selects from that single token
            wait_for(job.device)
            start = time.perf_counter()
            _step(model, below, cache, job.batch)
            wait_for(job.device)
            if step >= warm_up:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _query(model: LlamaForCausalLM) -> tuple[int, int, int]:
    return model.config.num_attention_heads, 1, model.config.head_dim


def _record(
    job: Job, times: dict[str, list[float]], error: dict[str, float], model: LlamaForCausalLM
) -> dict[str, Any]:
    ms = {name: statistics.median(values) for name, values in times.items()}
    full_share = 0.0 if job.stride is None else 1.0 / job.stride
    if {"partial", "full"} <= ms.keys():
        ms["mix"] = (1 - full_share) * ms["partial"] + full_share * ms["full"]
    ratios = {
        "mix_over_static": _over(ms, "static", "mix"),
        "mix_over_default": _over(ms, "default", "mix"),
        "mix_over_own_dense": _over(ms, "own_dense", "mix"),
        "share_of_ideal": _ideal_ms(job, model, full_share) / ms["mix"] if "mix" in ms else None,
        "partial_over_empty": _over(ms, "partial", "empty"),
        "full_over_static": _over(ms, "full", "static"),
    }
    spread = {name: [min(values), max(values)] for name, values in times.items()}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": job.shape,
        "context": job.context,
        "batch": job.batch,
        "budget": job.budget,
        "stride": job.stride,
        "device": device_name(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "steps": job.steps,
        # Every column every time, so that runs with something skipped fit the same file.
        "ms": {name: round(ms[name], 3) if name in ms else None for name in (*VARIANTS, "mix")},
        "ms_range": {name: [round(value, 3) for value in ends] for name, ends in spread.items()},
        "ratios": {
            name: None if value is None else round(value, 4) for name, value in ratios.items()
        },
        "relative_rms_error": {
            name: float(f"{error[name]:.3g}") if name in error else None for name in CHECKED
        },
        "versions": versions(),
    }


def _over(ms: dict[str, float], one: str, other: str) -> float | None:
    return ms[one] / ms[other] if one in ms and other in ms else None


def _ideal_ms(job: Job, model: LlamaForCausalLM, full_share: float) -> float:
    """The mix at this machine's read bandwidth: every weight once, and the K and V that the steps attend to."""
    config, size = model.config, torch.finfo(job.dtype).bits // 8
    weights = sum(parameter.numel() for parameter in model.parameters()) * size
    if not config.tie_word_embeddings:
        # One row of the input embedding is read, not all.
        weights -= config.vocab_size * config.hidden_size * size
    entry = (
        2
        * config.head_dim
        * size
        * config.num_key_value_heads
        * config.num_hidden_layers
        * job.batch
    )
    entries = (1 - full_share) * min(job.budget, job.context) + full_share * job.context
    return (weights + entry * entries) / read_bandwidth(job.device) * 1e3
