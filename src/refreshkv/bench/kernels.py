"""Each kernel of a decode step alone, on one layer: checked against the reference, then timed with cold caches.

Letters: B rows, Hq query heads, Hkv KV heads, L context, D head dim, K budget, s drafts.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from refreshkv.bench import record as records
from refreshkv.bench.decode import TOLERANCE, WrongResultError
from refreshkv.bench.job import WARM_UP, Job
from refreshkv.bench.rivals import attention_rivals
from refreshkv.bench.shapes import config_of
from refreshkv.bench.timing import captured, copies_for, milliseconds, read_bandwidth
from refreshkv.config import make_config
from refreshkv.kernels import REFERENCE, Backend, backend_for

# In 16-bit dtypes logits that are nearly the same may change places.
_SAME_INDICES = 0.9


class Operands:
    """What the kernels are given: random, and what follows from that by the reference.

    queries `[B, Hq, s + 1, D]`, of which query `[B, Hq, D]` is the first; keys and values `[B, Hkv, L, D]`; scores
    `[B, Hkv, L]`, by which positions `[B, Hkv, K]` int64 are selected; kept and kept_values `[B, Hkv, K, D]`, the
    entries there; budget, starts `[B]`, newest `[B, Hkv]` int64; out `[2, B, Hkv, K, D]`, NaN, for what is gathered.
    """

    def __init__(self, job: Job, seed: int) -> None:
        config, device = config_of(job.shape), job.device
        heads, dim = config.num_key_value_heads, config.head_dim
        generator = torch.Generator(device=device).manual_seed(seed)

        def noise(heads: int, tokens: int) -> Tensor:
            size = (job.batch, heads, tokens, dim)
            return torch.randn(*size, generator=generator, device=device, dtype=job.dtype)

        self.queries = noise(config.num_attention_heads, job.draft + 1)
        self.query = self.queries[:, :, 0].contiguous()
        self.keys, self.values = noise(heads, job.context), noise(heads, job.context)
        size = (job.batch, heads, job.context)
        self.scores = torch.rand(size, generator=generator, device=device)
        self.positions = self.scores.topk(job.budget, dim=-1).indices
        self.kept, self.kept_values = _torch_gather(self)
        self.budget = torch.full((job.batch,), job.budget, device=device)
        self.starts = torch.full_like(self.budget, max(job.context - job.draft - 1, 0))
        self.newest = torch.zeros(job.batch, heads, dtype=torch.int64, device=device)
        self.out = torch.stack([self.kept, self.kept_values]).fill_(float("nan"))


Rivals = dict[str, Callable[[Operands], Any]]


@dataclass(frozen=True)
class Case:
    """A kernel: the call, the bytes that it must move, and what others offer for the same work."""

    run: Callable[[Backend, Operands], Any]
    size: int
    rivals: Rivals


def run(*, results: Path | None = None, progress: bool = True, **settings: Any) -> dict[str, Any]:
    """Check, then time; returns the record (`docs/bench.md`) and appends a row a kernel to `results` (CSV).

    `settings` are fields of `Job`, of which `steps` are the timed turns of each kernel.

    Raises:
        ValueError: an unknown shape, a number out of range, a file that holds other columns.
        WrongResultError: a kernel disagrees with the reference.
    """
    job = Job(**settings)
    job = replace(job, budget=min(job.budget, job.context))
    records.check_file(results, {**records.flat(_settings(job)), **dict.fromkeys(_COLUMNS)})
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    backend, bandwidth = backend_for(job.device), read_bandwidth(job.device)
    with torch.inference_mode():
        cases, first = cases_of(job), Operands(job, seed=0)
        errors = {
            name: check(name, case, backend, first, job.dtype) for name, case in cases.items()
        }
        found, each = [], 2 * first.keys.nbytes
        copies = {name: copies_for(case.size, each, job.device) for name, case in cases.items()}
        cold = [first, *(Operands(job, seed) for seed in range(1, max(copies.values())))]
        for name, case in tqdm(cases.items(), desc="kernels", disable=not progress, leave=False):
            numbers, about = _timed(case, backend, cold[: copies[name]], job)
            numbers["bandwidth_share"] = case.size / (numbers["ms"] * 1e-3) / bandwidth
            numbers["relative_rms_error"] = errors[name]
            found.append({"kernel": name, **records.rounded(numbers), **about})
    record = _settings(job, bandwidth)
    records.append(results, [{**records.flat(record), **one} for one in found])
    return {**record, "backend": backend.name, "kernels": found}


_LEFT_OUT = ("stride", "acceptance", "tokens_per_pass", "steps", "cycles", "form")
_COLUMNS = (
    *("kernel", "ms", "bytes", "bandwidth_share", "rival", "rival_ms", "rival_over_ours"),
    *("relative_rms_error", "cuda_graph"),
)


def _settings(job: Job, bandwidth: float | None = None) -> dict[str, Any]:
    """What a record says of the run: a kernel has no stride and no cycles."""
    found = records.settings(job, bandwidth)
    return {name: value for name, value in found.items() if name not in _LEFT_OUT}


def cases_of(job: Job) -> dict[str, Case]:
    """The kernels on the shape of one layer."""
    config = config_of(job.shape)
    heads, dim = config.num_key_value_heads, config.head_dim
    item, options = job.dtype.itemsize, {"scale": dim**-0.5}
    entry = 2 * dim * item * heads * job.batch
    partial, full, weights = entry * job.budget, entry * job.context, 4 * heads * job.batch
    others = attention_rivals(job.device, job.batch)

    short: Rivals = {
        name: lambda x, call=call: call(x.query, x.kept, x.kept_values)
        for name, call in others.items()
    }
    long: Rivals = {
        name: lambda x, call=call: call(x.query, x.keys, x.values) for name, call in others.items()
    }
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
    case: Case, backend: Backend, cold: list[Operands], job: Job
) -> tuple[dict[str, float], dict[str, Any]]:
    """The times of one kernel and of the fastest rival, and what is said beside them."""
    ms, graph = _median(functools.partial(case.run, backend), cold, job)
    others = {rival: _median(call, cold, job)[0] for rival, call in case.rivals.items()}
    rival = min(others, key=others.__getitem__)
    times = {"ms": ms, "rival_ms": others[rival], "rival_over_ours": others[rival] / ms}
    return times, {"bytes": case.size, "rival": rival, "cuda_graph": graph}


def _median(call: Callable[[Operands], Any], cold: list[Operands], job: Job) -> tuple[float, bool]:
    """Milliseconds a call, over operands that have left the caches; and whether a CUDA graph ran it."""

    def round_of_calls() -> None:
        for given in cold:
            call(given)

    replay = captured(round_of_calls, job.device)
    turn = replay or round_of_calls
    taken = [milliseconds(turn, job.device) for _ in range(WARM_UP + job.steps)]
    return statistics.median(taken[WARM_UP:]) / len(cold), replay is not None


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
