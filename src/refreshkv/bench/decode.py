"""Milliseconds per decoded token of a whole model: ours in every mode, against eviction and transformers' caches.

First the logits are compared. Then all variants take turns, step by step, so that a drift of the machine's speed hits
them alike, and medians are reported beside the bytes that they had to move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

import refreshkv
from refreshkv.bench import record as records
from refreshkv.bench import roofline, variants
from refreshkv.bench.cycle import Exact
from refreshkv.bench.job import WARM_UP, Job
from refreshkv.bench.report import LEFT_OUT, report
from refreshkv.bench.shapes import build, config_of, outline
from refreshkv.bench.timing import captured, milliseconds, read_bandwidth

# Logits against those of another path, relative RMS. Measured on the demo shape: 4e-7 in float32, 1e-3 in float16. In
# bfloat16 on the 1B shape: 0.005 for our full attention, 0.032 for a full step, which rounds the attention logits to
# bfloat16 in each of 16 layers.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 0.05}
# What full attention may be compared with, the most trusted first.
_YARDSTICKS = ("static", "default", "flash", "own_dense")


class WrongResultError(RuntimeError):
    """A variant does not compute what it should; nothing was timed."""


def run(
    *,
    skip: tuple[str, ...] = (),
    results: Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Check, then time; returns the record (`docs/bench.md`).

    Args:
        skip: variants to leave out ("default" needs minutes at long contexts).
        results: the CSV file that gets its row. `progress`: a bar on stderr.
        settings: the fields of `Job`.

    Raises:
        ValueError: an unknown shape or variant, a number out of range, a file that holds other columns.
        WrongResultError: our logits are not those of full attention.
    """
    variants.check_names(skip)
    job = Job(**settings)
    sizes = roofline.sizes_of(outline(config_of(job.shape), job.dtype))
    records.check_file(results, records.flat(report(job, sizes), LEFT_OUT))
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model, bandwidth = build(job.shape, job.device, job.dtype), read_bandwidth(job.device)
    with torch.no_grad(), refreshkv.attach(model) as session:
        below = session.implementation_below
        turns = _Turns(model, below, variants.caches(model, job, skip), job)
        errors = turns.check()
        times = turns.time(progress)
    found = report(job, sizes, times, errors, bandwidth, turns.notes)
    records.append(results, [records.flat(found, LEFT_OUT)])
    if job.device.type == "cuda":
        del turns
        torch._dynamo.reset()  # compiled graphs hold on to the caches of this size
        torch.cuda.empty_cache()
    return found


class _Turns:
    """The variants of one run, one step at a time; `notes` says why one is missing or how it ran."""

    def __init__(
        self, model: PreTrainedModel, below: str, caches: dict[str, Cache], job: Job
    ) -> None:
        self.model, self.below, self.job = model, below, job
        self.notes: dict[str, str] = {}
        exact = caches.get("exact")
        self.exact = None if exact is None else Exact(model, below, exact, job)
        self.calls = {
            name: variants.stepper(model, below, name, cache, job)
            for name, cache in caches.items()
            if name != "exact"
        }
        # Ours end where they did before: at the context, or earlier in those that are shorter by nature.
        self.resets: dict[str, Callable[[], None]] = {
            name: functools.partial(variants.take_back, cache, end)
            for name, cache in caches.items()
            if (end := variants.end_of(cache)) is not None
        }

    def check(self) -> dict[str, float]:
        """Relative RMS of logits: full attention of ours against theirs, the lossless full pass against single steps.

        Raises:
            WrongResultError: more than the tolerance of the dtype.
        """
        logits: dict[str, Tensor] = {}
        for name in list(self.calls):
            try:
                logits[name] = self.step(name)
            except Exception as error:
                if name in self.resets:
                    raise
                # One that is not ours cannot be had, for example for want of memory.
                self.notes[name] = f"left out: {type(error).__name__}: {error}".splitlines()[0]
                del self.calls[name]
        trusted = next((name for name in _YARDSTICKS if name in logits), None)
        errors: dict[str, float] = {}
        for name in ("own_dense", "full"):
            if name in logits and trusted not in (None, name):
                errors[name] = self._compare(name, logits[name], logits[trusted], trusted)
        if self.exact is not None:
            errors["verify"] = self._compare("verify", *self._verified(self.exact), "single steps")
        return errors

    def time(self, progress: bool) -> dict[str, list[float]]:
        """Milliseconds of each timed turn."""
        job = self.job
        for name in self.resets.keys() & self.calls.keys() if not job.compiled else ():
            replay = captured(functools.partial(self.step, name), job.device)
            self.resets[name]()  # of a call that broke off
            if replay is not None:
                self.calls[name], self.notes[name] = replay, "CUDA graph"
        counts = dict.fromkeys(self.calls, job.steps)
        if self.exact is not None:
            if self.exact.capture():
                self.notes["exact"] = "CUDA graphs of a draft and of a full pass"
            parts = self.exact.calls()
            self.calls |= parts
            self.resets |= dict.fromkeys(parts, self.exact.take_back)
            counts |= dict.fromkeys(parts, job.cycles)
        times: dict[str, list[float]] = {name: [] for name in counts}
        turns = range(-WARM_UP, max(counts.values(), default=0))
        for turn in tqdm(turns, desc="steps", disable=not progress, leave=False):
            for name in [name for name, count in counts.items() if turn < count]:
                if name == "draft" and self.exact is not None:
                    self.exact.begin()  # which is a part of the cycle
                taken = milliseconds(self.calls[name], job.device)
                self._reset(name)
                times[name] += [taken] if turn >= 0 else []
        return times

    def step(self, name: str) -> Tensor:
        """The logits `[B, V]` of a variant's step, which is taken back."""
        logits = self.calls[name]()
        self._reset(name)
        return logits

    def _reset(self, name: str) -> None:
        if name in self.resets:
            self.resets[name]()

    def _verified(self, exact: Exact) -> tuple[Tensor, Tensor]:
        """Logits of a full pass over random tokens, and of single steps over the same store."""
        job = self.job
        generator = torch.Generator(device=job.device).manual_seed(2)
        size, vocabulary = (job.batch, job.draft + 1), self.model.config.vocab_size
        tokens = torch.randint(vocabulary, size, generator=generator, device=job.device)
        exact.begin()  # the first selection, which decides on the anchors
        verified = exact.verify(tokens)
        exact.take_back()
        alone = variants.over_same_store(exact.cache, self.model)
        steps = [
            variants.forward(self.model, self.below, alone, token) for token in tokens.split(1, 1)
        ]
        variants.take_back(alone, job.context)
        return verified, torch.cat(steps, 1)

    def _compare(self, name: str, ours: Tensor, expected: Tensor, other: str) -> float:
        expected = expected.float()
        error = float((ours.float() - expected).norm() / expected.norm())
        if not error < TOLERANCE[self.job.dtype]:
            raise WrongResultError(
                f"{name}: logits differ from {other} by {error:.2g} (relative RMS)"
            )
        return error
