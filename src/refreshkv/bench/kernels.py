"""Each kernel of a decode step alone, on one layer: checked against the reference, then timed with cold caches.

Letters: B rows, Hq query heads, Hkv KV heads, L context, D head dim, K budget, s drafts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from refreshkv.bench import record as records
from refreshkv.bench.decode import TOLERANCE, WrongResultError
from refreshkv.bench.rivals import attention_rivals
from refreshkv.bench.shapes import config_of
from refreshkv.bench.timing import WARM_UP, captured, copies_for, milliseconds, read_bandwidth
from refreshkv.config import RefreshConfig, make_config
from refreshkv.kernels.backend import REFERENCE, Backend, backend_for

# In 16-bit dtypes logits that are nearly the same may change places.
_SAME_INDICES = 0.9

KERNELS = {
    "attend": "partial step over the K entries of a partial cache",
    "attend_and_rank": "the same, which also finds the most attended entries",
    "attend_at": "the same over K places of the full cache, gathered on the way",
    "attend_full": "plain dense decode over L entries",
    "attend_and_score": "full step: output and scores",
    "score": "scores from the keys alone",
    "select": "pool and take the K best",
    "gather": "copy the selected keys and values",
    "verify": "full pass over s + 1 tokens, with scores",
}


@dataclass(frozen=True)
class Job:
    """One layer of `shape`: `batch` rows of `context` tokens, K = `budget`, `draft` drafts; `repeats` timed turns."""

    shape: str
    context: int
    batch: int
    budget: int
    draft: int
    device: torch.device
    dtype: torch.dtype
    repeats: int


@dataclass(frozen=True)
class Operands:
    """What the kernels are given; those that follow come from these by the reference.

    query `[B, Hq, D]`, queries `[B, Hq, s + 1, D]`, keys and values `[B, Hkv, L, D]`, scores `[B, Hkv, L]`, positions
    `[B, Hkv, K]` int64, kept and kept_values `[B, Hkv, K, D]`, budget, starts `[B]`, newest `[B, Hkv]` int64; out
    `[2, B, Hkv, K, D]`, NaN, for what is gathered.
    """

    query: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor
    kept: Tensor
    kept_values: Tensor
    budget: Tensor
    starts: Tensor
    newest: Tensor
    out: Tensor


@dataclass(frozen=True)
class Case:
    """A kernel: the call, the bytes that it must move, and what others offer for the same work."""

    run: Callable[[Backend, Operands], Any]
    size: int
    rivals: dict[str, Callable[[Operands], Any]]


def run(
    *,
    shape: str = "llama-3.2-1b",
    context: int = 8192,
    batch: int = 1,
    budget: int | float = 0.125,
    draft: int = 8,
    device: str = "cpu",
    dtype: str = "bfloat16",
    repeats: int = 20,
    threads: int | None = None,
    results: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Check, then time; returns the record (`docs/bench.md`) and appends a row a kernel to `results` (CSV).

    Raises:
        ValueError: an unknown shape, a number out of range, a file that holds other columns.
        WrongResultError: a kernel disagrees with the reference.
    """
    place, kind = torch.device(device), getattr(torch, dtype)
    tokens = min(RefreshConfig(budget=budget).resolve_budget(context), context)
    job = Job(shape, context, batch, tokens, draft, place, kind, repeats)
    config_of(shape)
    if results is not None:
        records.check_file(results, _row(job, None, {"kernel": "attend"}))
    if threads is not None:
        torch.set_num_threads(threads)
    backend, bandwidth = backend_for(place), read_bandwidth(place)
    with torch.inference_mode():
        cases, found = cases_of(job), []
        first = operands(job, seed=0)
        errors = {name: check(name, case, backend, first, kind) for name, case in cases.items()}
        least, each = min(case.size for case in cases.values()), 2 * first.keys.nbytes
        cold = [first, *(operands(job, seed) for seed in range(1, copies_for(least, each, place)))]
        for name in tqdm(cases, desc="kernels", disable=not progress, leave=False):
            some = cold[: copies_for(cases[name].size, each, place)]
            found.append(_timed(name, cases[name], backend, some, job, bandwidth, errors[name]))
    if results is not None:
        records.append(results, [_row(job, bandwidth, one) for one in found])
    return {**_settings(job, bandwidth), "backend": backend.name, "kernels": found}


def cases_of(job: Job) -> dict[str, Case]:
    """The kernels on the shape of one layer."""
    config = config_of(job.shape)
    heads, dim = config.num_key_value_heads, config.head_dim
    item, options = job.dtype.itemsize, {"scale": dim**-0.5}
    entry = 2 * dim * item * heads * job.batch
    partial, full, weights = entry * job.budget, entry * job.context, 4 * heads * job.batch
    others = attention_rivals(job.device, job.batch)

    def over_kept(call: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
        return lambda x: call(x.query, x.kept, x.kept_values)

    def over_all(call: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
        return lambda x: call(x.query, x.keys, x.values)

    short = {name: over_kept(call) for name, call in others.items()}
    long = {name: over_all(call) for name, call in others.items()}
    rank = {"count": make_config("default").successor, **options}
    return {
        "attend": Case(
            lambda b, x: b.attend(x.query, x.kept, x.kept_values, **options), partial, short
        ),
        "attend_and_rank": Case(
            lambda b, x: b.attend_and_rank(x.query, x.kept, x.kept_values, newest=x.newest, **rank),
            partial,
            short,
        ),
        "attend_at": Case(
            lambda b, x: b.attend_at(
                x.query, x.keys, x.values, x.positions, newest=x.newest, **rank
            ),
            partial,
            short,
        ),
        "attend_full": Case(
            lambda b, x: b.attend(x.query, x.keys, x.values, **options), full, long
        ),
        "attend_and_score": Case(
            lambda b, x: b.attend_and_score(x.query, x.keys, x.values, **options),
            full + weights * job.context,
            long,
        ),
        "score": Case(
            lambda b, x: b.score(x.query, x.keys, **options),
            full // 2 + weights * job.context,
            {"torch matmul and softmax": _matmul_scores},
        ),
        "select": Case(
            lambda b, x: b.select(x.scores, x.budget),
            weights * job.context + 2 * weights * job.budget,
            {"torch topk": lambda x: x.scores.topk(job.budget, dim=-1)},
        ),
        "gather": Case(
            _gather,
            2 * partial,
            {"torch gather": _torch_gather},
        ),
        "verify": Case(
            lambda b, x: b.verify(x.queries, x.keys, x.values, starts=x.starts, **options),
            full + weights * job.context,
            {"torch sdpa": _sdpa_verify},
        ),
    }


def operands(job: Job, seed: int) -> Operands:
    """Random operands; what selects and what is selected follow from them by the reference."""
    config = config_of(job.shape)
    heads, dim = config.num_key_value_heads, config.head_dim
    generator = torch.Generator(device=job.device).manual_seed(seed)

    def noise(heads: int, tokens: int) -> Tensor:
        size = (job.batch, heads, tokens, dim)
        return torch.randn(*size, generator=generator, device=job.device, dtype=job.dtype)

    queries = noise(config.num_attention_heads, job.draft + 1)
    keys, values = noise(heads, job.context), noise(heads, job.context)
    size = (job.batch, heads, job.context)
    scores = torch.rand(size, generator=generator, device=job.device)
    budget = torch.full((job.batch,), job.budget, device=job.device)
    positions = scores.topk(job.budget, dim=-1).indices
    places = positions[..., None].expand(-1, -1, -1, dim)
    kept, kept_values = keys.gather(2, places), values.gather(2, places)
    return Operands(
        queries[:, :, 0].contiguous(),
        queries,
        keys,
        values,
        scores,
        positions,
        kept,
        kept_values,
        budget,
        torch.full_like(budget, max(job.context - job.draft - 1, 0)),
        torch.zeros(job.batch, heads, dtype=torch.int64, device=job.device),
        torch.full((2, *kept.shape), float("nan"), device=job.device, dtype=job.dtype),
    )


def check(name: str, case: Case, backend: Backend, given: Operands, dtype: torch.dtype) -> float:
    """The largest relative RMS of what the kernel gives against the reference; indices must be nearly the same sets.

    Raises:
        WrongResultError: they differ.
    """
    largest = 0.0
    given.out.fill_(float("nan"))
    found = [tensor.clone() for tensor in _tensors(case.run(backend, given))]
    for ours, expected in zip(found, _tensors(case.run(REFERENCE, given)), strict=True):
        if ours.is_floating_point():
            error = float((ours.double() - expected.double()).norm() / expected.double().norm())
            if not error < TOLERANCE[dtype]:
                raise WrongResultError(f"{name}: differs from the reference by {error:.2g}")
            largest = max(largest, error)
        elif (same := _overlap(ours, expected)) < _SAME_INDICES:
            raise WrongResultError(f"{name}: {same:.0%} of its indices are those of the reference")
    return largest


def _timed(
    name: str,
    case: Case,
    backend: Backend,
    cold: list[Operands],
    job: Job,
    bandwidth: float,
    error: float,
) -> dict[str, Any]:
    """The record of one kernel; with several rivals it is compared with the fastest."""
    ms, graph = _median(lambda x: case.run(backend, x), cold, job)
    others = {rival: _median(call, cold, job)[0] for rival, call in case.rivals.items()}
    best = min(others, key=others.__getitem__)
    return {
        "kernel": name,
        "ms": float(f"{ms:.5g}"),
        "bytes": case.size,
        "bandwidth_share": float(f"{case.size / (ms * 1e-3) / bandwidth:.4g}"),
        "rival": best,
        "rival_ms": float(f"{others[best]:.5g}"),
        "rival_over_ours": float(f"{others[best] / ms:.4g}"),
        "relative_rms_error": float(f"{error:.3g}"),
        "cuda_graph": graph,
    }


def _median(call: Callable[[Operands], Any], cold: list[Operands], job: Job) -> tuple[float, bool]:
    """Milliseconds a call, over operands that have left the caches; and whether a CUDA graph ran it."""

    def round_of_calls() -> None:
        for given in cold:
            call(given)

    replay = captured(round_of_calls, job.device)
    turn = replay or round_of_calls
    taken = [milliseconds(turn, job.device) for _ in range(WARM_UP + job.repeats)]
    return statistics.median(taken[WARM_UP:]) / len(cold), replay is not None


def _settings(job: Job, bandwidth: float | None) -> dict[str, Any]:
    about = records.machine(job.device)
    return {
        "time": about["time"],
        "shape": job.shape,
        "context": job.context,
        "batch": job.batch,
        "budget": job.budget,
        "draft": job.draft,
        "device": about["device"],
        "dtype": str(job.dtype).removeprefix("torch."),
        "threads": about["threads"],
        "bandwidth": None if bandwidth is None else round(bandwidth),
        "versions": about["versions"],
    }


_COLUMNS = ("kernel", "ms", "bytes", "bandwidth_share", "rival", "rival_ms", "rival_over_ours")


def _row(job: Job, bandwidth: float | None, found: dict[str, Any]) -> dict[str, Any]:
    """One kernel as a row; the columns are the same whatever was found."""
    names = (*_COLUMNS, "relative_rms_error", "cuda_graph")
    return {**records.flat(_settings(job, bandwidth)), **{name: found.get(name) for name in names}}


def _tensors(result: Any) -> Iterable[Tensor]:
    """The tensors of a result, however they are nested."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from _tensors(part)


def _overlap(one: Tensor, other: Tensor) -> float:
    """Share of the entries of `[B, Hkv, K]` that both hold."""
    both = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(one, other, strict=True)])
    return float(both.mean())


def _matmul_scores(given: Operands) -> Tensor:
    packed = given.query.unflatten(1, (given.keys.shape[1], -1))
    logits = packed @ given.keys.transpose(-1, -2) * given.keys.shape[-1] ** -0.5
    return F.softmax(logits, dim=-1, dtype=torch.float32).amax(2)


def _gather(backend: Backend, given: Operands) -> tuple[Tensor, Tensor]:
    backend.gather(given.keys, given.positions, given.out[0])
    backend.gather(given.values, given.positions, given.out[1])
    return given.out[0], given.out[1]


def _torch_gather(given: Operands) -> tuple[Tensor, Tensor]:
    places = given.positions[..., None].expand(-1, -1, -1, given.keys.shape[-1])
    return given.keys.gather(2, places), given.values.gather(2, places)


def _sdpa_verify(given: Operands) -> Tensor:
    """All tokens see everything: a causal mask would take torch off its fast path."""
    packed = given.queries.unflatten(1, (given.keys.shape[1], -1)).flatten(2, 3)
    return F.scaled_dot_product_attention(packed, given.keys, given.values)
