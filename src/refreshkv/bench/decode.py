"""Milliseconds per decode step of a whole model: partial and full steps of ours against transformers' caches.

All variants take turns step by step in one run, so that a drift of the machine's speed hits them alike; medians are
reported.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

import refreshkv
from refreshkv.bench import common
from refreshkv.bench.common import WARM_UP, over
from refreshkv.bench.record import append_row, read_bandwidth
from refreshkv.bench.shapes import build
from refreshkv.config import RefreshConfig, unknown
from refreshkv.integrations.transformers import RefreshCache

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
DERIVED = {"mix": "partial and full steps, at the stride"}
CHECKED = ("own_dense", "full")


@dataclass(frozen=True)
class Job(common.Job):
    """`steps` timed ones of each variant; a mix of one full step in `stride`, or of partial steps only."""

    stride: int | None
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
        shape, context, batch, tokens, torch.device(device), getattr(torch, dtype), stride, steps
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
    common.fill(model, caches, job, single="empty")
    return caches


def _step(model: LlamaForCausalLM, below: str, cache: Cache, batch: int) -> Tensor:
    """One decode step; `[B, V]` logits."""
    token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    return common.forward(model, below, cache, token)[:, -1]


def _check(
    model: LlamaForCausalLM, below: str, caches: dict[str, Cache], job: Job
) -> dict[str, float]:
    """Relative RMS of the logits of our dense and full steps against a StaticCache step on the same content."""
    if "static" not in caches:
        return {}
    expected = _step(model, below, caches["static"], job.batch)
    errors = {}
    for name in CHECKED:
        if name in caches:
            ours = _step(model, below, caches[name], job.batch)
            # The next variant, on the same store, starts where this one did.
            common.crop(caches[name], job.context)
            errors[name] = common.checked(name, ours, expected, "StaticCache", job)
    return errors


def _time(
    model: LlamaForCausalLM, below: str, caches: dict[str, Cache], job: Job, progress: bool
) -> dict[str, list[float]]:
    """Milliseconds of each timed step."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in tqdm(range(WARM_UP + job.steps), desc="steps", disable=not progress, leave=False):
        for name, cache in caches.items():
            if name == "empty":
                cache.crop(1)  # keep it empty: one token, to which the step adds its own
                for layer in cache.layers:
                    layer.inner.await_selection(
                        layer.inner.store.keys.new_zeros(job.batch, *_query(model))
                    )
                _step(model, below, cache, job.batch)  # selects from that single token
            taken = common.milliseconds(
                lambda cache=cache: _step(model, below, cache, job.batch), job.device
            )
            if step >= WARM_UP:
                times[name].append(taken)
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
        "mix_over_static": over(ms, "static", "mix"),
        "mix_over_default": over(ms, "default", "mix"),
        "mix_over_own_dense": over(ms, "own_dense", "mix"),
        "share_of_ideal": _ideal_ms(job, model, full_share) / ms["mix"] if "mix" in ms else None,
        "partial_over_empty": over(ms, "partial", "empty"),
        "full_over_static": over(ms, "full", "static"),
    }
    # Every column every time, so that runs with something skipped fit the same file.
    return common.describe(
        job,
        {"stride": job.stride, "steps": job.steps},
        times,
        {name: ms.get(name) for name in (*VARIANTS, *DERIVED)},
        ratios,
        {name: error.get(name) for name in CHECKED},
    )


def _ideal_ms(job: Job, model: LlamaForCausalLM, full_share: float) -> float:
    """The mix at this machine's read bandwidth: every weight once, and the K and V that the steps attend to."""
    entries = (1 - full_share) * min(job.budget, job.context) + full_share * job.context
    read = common.weight_bytes(model) + common.entry_bytes(model, job.batch) * entries
    return read / read_bandwidth(job.device) * 1e3
