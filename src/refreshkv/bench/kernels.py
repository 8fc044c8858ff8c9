"""Each kernel of a decode step alone, on one layer: checked against the reference, then timed with cold caches.

Letters: B rows, Hq query heads, Hkv KV heads, L context, D head dim, K budget, s drafts.
"""

from __future__ import annotations

import contextlib
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
from refreshkv.bench.checks import WrongResultError, relative_rms, rounding, within
from refreshkv.bench.job import Job
from refreshkv.bench.rivals import attention_rivals
from refreshkv.bench.roofline import Reads, Sizes
from refreshkv.bench.shapes import config_of, random_states
from refreshkv.bench.timing import (
    OUT_OF_MEMORY,
    Timed,
    copies_for,
    forget,
    read_bandwidth,
    take_turns,
)
from refreshkv.config import make_config
from refreshkv.kernels.backend import OPERATIONS, REFERENCE, Backend, backend_for
from refreshkv.kernels.codes import Codes, restored_keys, restored_values
from refreshkv.kernels.options import Attended, AttendOptions, Entries
from refreshkv.policy.rounding import BLOCK

_OURS = "ours"
_SETTINGS = ("shape", "context", "batch", "budget", "draft")
_COLUMNS = (
    *("kernel", "ms", "bytes", "bandwidth_share", "rival", "rival_ms", "rival_over_ours"),
    *("relative_rms_error", "cuda_graph"),
)
# In 16-bit dtypes logits that are nearly the same may change places.
_SAME_INDICES = 0.9


class Operands:
    """What the kernels are given: random, and what follows from that by the reference.

    queries `[B, Hq, s + 1, D]`, of which query `[B, Hq, D]` is the first; full: keys and values `[B, Hkv, L, D]`;
    scores `[B, Hkv, L]`, by which positions `[B, Hkv, K]` int32 (index: int64) are selected; kept: copies of the
    entries there; listed: those of full at the positions; budget, starts, first, finished `[B]`, newest `[B, Hkv]`
    int64; ring: as kept, for what is gathered, and room: for the codes of all whole blocks of full, both of NaN; codes:
    those codes.
    """

    def __init__(self, job: Job, seed: int) -> None:
        config, device = config_of(job.shape), job.device
        heads = config.num_key_value_heads
        generator = torch.Generator(device=device).manual_seed(seed)

        noise = functools.partial(random_states, job, generator)
        self.queries = noise(config.num_attention_heads, job.draft + 1)
        self.query = self.queries[:, :, 0].contiguous()
        self.full = Entries(noise(heads, job.context), noise(heads, job.context))
        size = (job.batch, heads, job.context)
        self.scores = torch.rand(size, generator=generator, device=device)
        self.index = self.scores.topk(job.budget, dim=-1).indices
        self.positions = self.index.int()
        self.kept = Entries(*_torch_gather(self))
        self.listed = Entries(self.full.keys, self.full.values, positions=self.positions)
        self.budget = torch.full((job.batch,), job.budget, device=device)
        self.starts = torch.full_like(self.budget, max(job.context - job.draft - 1, 0))
        self.newest = torch.zeros(job.batch, heads, dtype=torch.int64, device=device)
        self.state = torch.zeros(6, *self.newest.shape, dtype=torch.int64, device=device)
        self.ring_positions = torch.zeros_like(self.positions)
        self.ring = [torch.full_like(kept, float("nan")) for kept in _both(self.kept)]
        self.first = torch.zeros_like(self.budget)
        self.finished = torch.full_like(self.budget, job.context // BLOCK)
        self.tally = self.budget.new_zeros(len(self.budget), self.full.kv_heads, 2)
        self.room = self._new_room()

    @functools.cached_property
    def codes(self) -> Codes:
        """Made by the kernel that is timed as "encode", because the reference takes seconds."""
        return _encode_into(self._new_room(), backend_for(self.full.keys.device), self)

    @functools.cached_property
    def lse(self) -> Tensor:
        """`[B, Hq, s + 1]`, of each query: the lossless mode has a guess of it from its drafts."""
        options = AttendOptions(scale=self.query.shape[-1] ** -0.5)
        backend = backend_for(self.full.keys.device)
        found: Tensor = backend.verify(self.queries, self.full, options, starts=self.starts)[0].lse
        return found

    def forget(self) -> None:
        """What kernels wrote is NaN again."""
        for ring in self.ring:
            ring.fill_(float("nan"))
        for grids in (self.room.key_grids, self.room.value_grids):
            grids.fill_(torch.iinfo(grids.dtype).min)

    def _new_room(self) -> Codes:
        keys, config = self.full.keys, make_config("fast")
        dims, blocks = (keys.shape[-1], keys.shape[-1]), keys.shape[2] // BLOCK
        return Codes.room(keys, dims, blocks, config.key_bits, config.value_bits)


@dataclass(frozen=True)
class Case:
    """A kernel: the call, the bytes that it must move, and what others offer for the same work.

    `checked` is called instead of `run` where results are compared, if what is timed may differ by more than rounding.
    """

    run: Callable[[Backend, Operands], Any]
    size: int
    rivals: dict[str, Callable[[Operands], Any]]
    checked: Callable[[Backend, Operands], Any] | None = None


def run(*, results: Path | None = None, progress: bool = True, **settings: Any) -> dict[str, Any]:
    """Check, then time; returns the record (`docs/bench.md`) and appends a row a kernel to `results` (CSV).

    Each row is appended when it is made, so what cuts a run off takes nothing that was timed. `settings` are fields of
    `Job`, of which `steps` are the timed turns of each kernel.

    Raises:
        ValueError: an unknown shape, a number out of range, a file that holds other columns.
        WrongResultError: a kernel disagrees with the reference.
    """
    job = Job(**settings)
    job = replace(job, budget=min(job.budget, job.context))
    records.check_file(
        results, {**records.flat(records.settings(job, names=_SETTINGS)), **dict.fromkeys(_COLUMNS)}
    )
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    backend, bandwidth = backend_for(job.device), read_bandwidth(job.device)
    record = records.settings(job, bandwidth, _SETTINGS)
    found: list[dict[str, Any]] = []
    notes: dict[str, str] = {}
    with torch.inference_mode():
        cases, first = cases_of(job, backend), Operands(job, seed=0)
        errors = _errors(cases, backend, first, job, notes)
        each = 2 * first.full.keys.nbytes
        copies = {name: copies_for(cases[name].size, each, job.device) for name in errors}
        cold = [first, *(Operands(job, seed) for seed in range(1, max(copies.values(), default=1)))]
        for name, error in tqdm(errors.items(), desc="kernels", disable=not progress, leave=False):
            case = _with_working(cases[name], first, notes)
            try:
                row = _timed(case, backend, cold[: copies[name]], job)
            except OUT_OF_MEMORY as missing:
                forget(name, missing, notes, job.device)
                continue
            share = case.size / (row["ms"] * 1e-3) / bandwidth
            numbers = {"bandwidth_share": share, "relative_rms_error": error}
            found.append({"kernel": name, "bytes": case.size, **row, **records.rounded(numbers)})
            records.append(results, [{**records.flat(record), **found[-1]}])
    return {**record, "backend": backend.name, "kernels": found, "notes": notes}


def cases_of(job: Job, backend: Backend) -> dict[str, Case]:
    """The kernels on the shape of one layer; without those that the shape gives no work, or a GPU has no kernel for."""
    config = config_of(job.shape)
    heads, dim = config.num_key_value_heads, config.head_dim
    options = AttendOptions(scale=dim**-0.5)
    entry = 2 * dim * job.dtype.itemsize * heads * job.batch
    partial, full, weights = entry * job.budget, entry * job.context, 4 * heads * job.batch
    short, long = (
        {
            name: lambda x, call=call, over=over: call(x.query, *_both(getattr(x, over)))
            for name, call in attention_rivals(job.device, job.batch).items()
        }
        for over in ("kept", "full")
    )
    count, sizes = make_config("default").successor, Sizes(0, entry, 0, job.dtype.itemsize)
    blocks = job.context // BLOCK * BLOCK

    def rank(backend: Backend, x: Operands, entries: Entries) -> Any:
        return backend.attend_and_rank(x.query, entries, options, newest=x.newest, count=count)

    cases = {
        "attend": Case(lambda b, x: b.attend(x.query, x.kept, options), partial, short),
        "attend_and_rank": Case(lambda b, x: rank(b, x, x.kept), partial, short),
        "attend_at": Case(lambda b, x: rank(b, x, x.listed), partial, short),
        "attend_full": Case(lambda b, x: b.attend(x.query, x.full, options), full, long),
        "attend_and_score": Case(
            lambda b, x: b.attend_and_score(x.query, x.full, options),
            full + weights * job.context,
            long,
        ),
        "score": Case(
            lambda b, x: b.score(x.query, x.full, options),
            full // 2 + weights * job.context,
            {"torch matmul and softmax": _matmul_scores},
        ),
        "select": Case(
            lambda b, x: b.select(x.scores, x.budget, slots=job.budget),
            weights * job.context + 2 * weights * job.budget,
            {"torch topk": lambda x: x.scores.topk(job.budget, dim=-1)},
        ),
        "refresh": Case(_refresh, 2 * partial, {"torch gather": _torch_gather}),
        "verify": Case(
            lambda b, x: b.verify(x.queries, x.full, options, starts=x.starts, expected=x.lse),
            full + weights * job.context,
            {"torch sdpa": _sdpa_verify},
        ),
        "attend_mixed": Case(
            _attend_mixed,
            round(Reads(0, job.budget + job.context - blocks, blocks).cache_bytes(sizes)),
            long,
            _mixed_at_both_ends,
        ),
        "encode": Case(
            lambda b, x: _encode_into(x.room, b, x),
            round(Reads(0, blocks, blocks).cache_bytes(sizes)),
            {"torch aminmax": _torch_ranges},
        ),
    }
    left_out = [] if blocks else ["attend_mixed", "encode"]
    if job.device.type != "cpu":
        left_out += [x for x in OPERATIONS if getattr(backend, x) is getattr(REFERENCE, x)]
    return {name: case for name, case in cases.items() if name not in left_out}


def check(name: str, case: Case, backend: Backend, given: Operands, dtype: torch.dtype) -> float:
    """The largest relative RMS of what the kernel gives against the reference; indices must be nearly the same sets.

    Raises:
        WrongResultError: they differ.
    """
    largest, run = 0.0, case.checked or case.run
    given.forget()
    found = [tensor.clone() for tensor in _tensors(run(backend, given))]
    for ours, expected in zip(found, _tensors(run(REFERENCE, given)), strict=True):
        if ours.is_floating_point():
            error = relative_rms(ours, expected)
            what = f"{name}: differs from the reference"
            largest = max(largest, within(what, error, rounding(dtype)))
        elif (same := _overlap(ours, expected)) < _SAME_INDICES:
            raise WrongResultError(f"{name}: {same:.0%} of its indices are those of the reference")
    return largest


def _errors(
    cases: dict[str, Case],
    backend: Backend,
    given: Operands,
    job: Job,
    notes: dict[str, str],
) -> dict[str, float]:
    """Of each kernel for which, and for whose reference, there is memory."""
    errors = {}
    for name, case in cases.items():
        try:
            errors[name] = check(name, case, backend, given, job.dtype)
        except OUT_OF_MEMORY as missing:
            forget(name, missing, notes, job.device)
    return errors


def _with_working(case: Case, given: Operands, notes: dict[str, str]) -> Case:
    """With those rivals that run; `notes` says why others do not: a library may lack a dtype, or a compiler."""
    rivals = {}
    for name, call in case.rivals.items():
        try:
            call(given)
        except Exception as error:
            forget(name, error, notes, given.query.device)
        else:
            rivals[name] = call
    return replace(case, rivals=rivals)


def _timed(case: Case, backend: Backend, cold: list[Operands], job: Job) -> dict[str, Any]:
    """Median milliseconds of ours and of the fastest rival, over operands that have left the caches."""
    calls = {_OURS: functools.partial(case.run, backend), **case.rivals}
    rounds = {
        name: Timed(functools.partial(_each, call, cold), job.steps) for name, call in calls.items()
    }
    graph = rounds[_OURS].capture(job.device)
    for name in case.rivals:
        # A library may do what no graph can hold; then it is timed as it is.
        with contextlib.suppress(RuntimeError):
            rounds[name].capture(job.device)
    times = take_turns(rounds, job.device)
    ms = {name: statistics.median(turns) / len(cold) for name, turns in times.items()}
    rival = min(case.rivals, key=ms.__getitem__)
    numbers = {
        "ms": ms[_OURS],
        "rival_ms": ms[rival],
        "rival_over_ours": ms[rival] / ms[_OURS],
    }
    return {**records.rounded(numbers), "rival": rival, "cuda_graph": graph}


def _each(call: Callable[[Operands], Any], operands: list[Operands]) -> None:
    for given in operands:
        call(given)


def _tensors(result: Any) -> Iterable[Tensor]:
    """The tensors of a result, however they are nested."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Codes):
        yield from (restored_keys(result), restored_values(result))
    else:
        for part in result:
            yield from _tensors(part)


def _overlap(one: Tensor, other: Tensor) -> float:
    """Share of the entries of `[B, Hkv, K]` that both hold."""
    both = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(one, other, strict=True)])
    return float(both.mean())


def _both(entries: Entries) -> tuple[Tensor, Tensor]:
    """Keys and values."""
    assert entries.values is not None
    return entries.keys, entries.values


def _matmul_scores(given: Operands) -> Tensor:
    packed, keys = given.query.unflatten(1, (given.full.kv_heads, -1)), given.full.keys
    logits = packed @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5
    return F.softmax(logits, dim=-1, dtype=torch.float32).amax(2)


def _refresh(backend: Backend, given: Operands) -> list[Tensor]:
    keys, values = given.ring
    backend.refresh(
        given.full,
        given.positions,
        given.newest,
        ring_keys=keys,
        ring_values=values,
        ring_positions=given.ring_positions,
        state=given.state,
        budget=given.budget,
    )
    return given.ring


def _attend_mixed(backend: Backend, given: Operands, budget: Tensor | None = None) -> Attended:
    """With K entries exact, or `budget` `[B]`; without the counts of what was read."""
    rows = {"first": given.first, "finished": given.finished}
    rows["budget"] = given.budget if budget is None else budget
    options = AttendOptions(scale=given.query.shape[-1] ** -0.5)
    return backend.attend_mixed(
        given.query, given.full, given.codes, options, **rows, tally=given.tally
    )


def _mixed_at_both_ends(backend: Backend, given: Operands) -> list[Attended]:
    """By codes alone, and exactly; between them two entries of nearly the same weight may change places."""
    exact = torch.full_like(given.budget, given.full.keys.shape[2])
    return [_attend_mixed(backend, given, budget) for budget in (exact * 0, exact)]


def _encode_into(codes: Codes, backend: Backend, given: Operands) -> Codes:
    rows = {"first": given.first, "begin": torch.zeros_like(given.first), "end": given.finished}
    backend.encode(given.full, codes, **rows, most=given.full.keys.shape[2] // BLOCK)
    return codes


def _torch_ranges(given: Operands) -> list[Tensor]:
    """The least and the greatest number of each channel of a block: a part of the work, in one pass."""
    blocks = given.full.keys.shape[2] // BLOCK
    both = [part[:, :, : blocks * BLOCK].unflatten(2, (-1, BLOCK)) for part in _both(given.full)]
    return [ends for part in both for ends in torch.aminmax(part, dim=3)]


def _torch_gather(given: Operands) -> tuple[Tensor, Tensor]:
    keys, values = _both(given.full)
    index = given.index[..., None].expand(-1, -1, -1, keys.shape[-1])
    return keys.gather(2, index), values.gather(2, index)


def _sdpa_verify(given: Operands) -> Tensor:
    """All tokens see everything: a causal mask would take torch off its fast path."""
    packed = given.queries.unflatten(1, (given.full.kv_heads, -1)).flatten(2, 3)
    return F.scaled_dot_product_attention(packed, *_both(given.full))
