"""What the timings of decoding share: caches of random content, single passes, the check, the columns of a record.

The caches hold the same random keys and values: a prefill of 64K tokens would take longer than the benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaForCausalLM, PreTrainedModel

from refreshkv.bench.record import device_name, versions, wait_for
from refreshkv.integrations.transformers import RefreshCache

# Logits of one step against StaticCache, relative RMS. Measured on the demo shape: 4e-7 in float32, 1e-3 in float16. In
# bfloat16 on the 1B shape: 0.005 for our full attention, 0.032 for a full step, which rounds the attention logits to
# bfloat16 in each of 16 layers.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 0.05}
WARM_UP = 2  # turns that are not timed; the first selection of each of our caches happens in its first step


class WrongResultError(RuntimeError):
    """A variant does not compute what it should; nothing was timed."""


@dataclass(frozen=True)
class Job:
    """What to time, resolved: a model shape, `context` tokens in each of `batch` rows, a budget in tokens."""

    shape: str
    context: int
    batch: int
    budget: int
    device: torch.device
    dtype: torch.dtype


def fill(
    model: LlamaForCausalLM,
    caches: Mapping[str, Cache],
    job: Job,
    *,
    window: int = 1,
    single: str | None = None,
) -> None:
    """The same random content for all. Ours share the full store: they differ in policy alone.

    Args:
        window: queries at the end of the prompt that vote on the first selection.
        single: a cache of ours that gets one token, in a store of its own.
    """
    config = model.config
    generator = torch.Generator(device=job.device).manual_seed(1)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=job.device, dtype=job.dtype)

    for index in range(config.num_hidden_layers):
        keys = noise(job.batch, config.num_key_value_heads, job.context, config.head_dim)
        values = noise(job.batch, config.num_key_value_heads, job.context, config.head_dim)
        queries = noise(job.batch, config.num_attention_heads, window, config.head_dim)
        shared = None
        for name, cache in caches.items():
            if not isinstance(cache, RefreshCache):
                cache.update(keys, values, index)
                continue
            inner = cache.layers[index].inner
            if name == single:
                inner.append(keys[:, :, :1], values[:, :, :1])
            elif shared is None:
                inner.append(keys, values)
                shared = inner.store
            else:
                inner.store = shared
            inner.await_selection(queries)


def forward(
    model: LlamaForCausalLM,
    below: str,
    cache: Cache,
    tokens: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """`[B, T]` tokens -> logits `[B, T, V]`. transformers' own caches run on the implementation `below` ours."""
    config = model.config
    attached = config._attn_implementation_internal
    if not isinstance(cache, RefreshCache):
        config._attn_implementation_internal = below
    try:
        return model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
    finally:
        config._attn_implementation_internal = attached


def crop(cache: RefreshCache, length: int) -> None:
    """The store, which others may share, ends at `length`; what is selected from it stays."""
    for layer in cache.layers:
        layer.inner.store.crop(length)


def checked(name: str, ours: Tensor, expected: Tensor, other: str, job: Job) -> float:
    """The relative RMS by which logits differ from those of `other`.

    Raises:
        WrongResultError: it is more than the tolerance of the dtype.
    """
    expected = expected.float()
    error = float((ours.float() - expected).norm() / expected.norm())
    if not error < TOLERANCE[job.dtype]:
        raise WrongResultError(f"{name}: logits differ from {other} by {error:.2g} (relative RMS)")
    return error


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes on the device."""
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return (time.perf_counter() - start) * 1e3


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a pass reads: of an input embedding of its own it reads a row a token, not all."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight is not table:
        total -= table.numel() * table.element_size()
    return total


def entry_bytes(model: LlamaForCausalLM, batch: int) -> int:
    """Bytes of the K and V of one token, in all layers and rows."""
    config = model.config
    size = next(model.parameters()).element_size()
    heads = config.num_key_value_heads * config.num_hidden_layers
    return 2 * config.head_dim * size * heads * batch


def over(ms: Mapping[str, float], one: str, other: str) -> float | None:
    """How many times longer `one` takes than `other`; `None` where either was skipped."""
    return ms[one] / ms[other] if one in ms and other in ms else None


def describe(
    job: Job,
    settings: Mapping[str, Any],
    times: Mapping[str, list[float]],
    ms: Mapping[str, float | None],
    ratios: Mapping[str, float | None],
    errors: Mapping[str, float | None],
) -> dict[str, Any]:
    """The record of a run. `ms`, `ratios` and `errors` name what was skipped too, so that every run fits one file."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": job.shape,
        "context": job.context,
        "batch": job.batch,
        "budget": job.budget,
        **settings,
        "device": device_name(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ms": {name: _rounded(value, 3) for name, value in ms.items()},
        "ms_range": {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()
        },
        "ratios": {name: _rounded(value, 4) for name, value in ratios.items()},
        "relative_rms_error": {
            name: None if value is None else float(f"{value:.3g}") for name, value in errors.items()
        },
        "versions": versions(),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
