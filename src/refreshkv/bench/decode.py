"""Milliseconds per decoded token of a whole model: ours in every mode, against eviction and transformers' caches.

First the logits are compared. Then all variants take turns, step by step, so that a drift of the machine's speed hits
them alike, and medians are reported beside the bytes that they had to move.
"""

from __future__ import annotations

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
from refreshkv.bench.cycle import Exact, kept
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
        self.model, self.below, self.caches, self.job = model, below, caches, job
        self.notes: dict[str, str] = {}
        # Where our stores end: at the context, or earlier in those that are shorter by nature.
        self.ends = {
            name: end
            for name, cache in caches.items()
            if (end := variants.end_of(cache)) is not None
        }
        exact = caches.pop("exact", None)
        self.exact = None if exact is None else Exact(model, below, exact, job)
        self.steps = {
            name: variants.stepper(model, below, name, cache, job) for name, cache in caches.items()
        }

    def check(self) -> dict[str, float]:
        """Relative RMS of logits: full attention of ours against theirs, the lossless full pass against single steps.

        Raises:
            WrongResultError: more than the tolerance of the dtype.
        """
        logits = {
            name: found for name in list(self.steps) if (found := self._first(name)) is not None
        }
        trusted = next((name for name in _YARDSTICKS if name in logits), None)
        errors: dict[str, float] = {}
        for name in ("own_dense", "full"):
            if name in logits and trusted not in (None, name):
                errors[name] = self._compare(name, logits[name], logits[trusted], trusted)
        if self.exact is not None:
            errors["verify"] = self._check_exact()
        return errors

    def time(self, progress: bool) -> dict[str, list[float]]:
        """Milliseconds of each timed turn."""
        job = self.job
        calls = dict(self.steps)
        for name in self.ends.keys() & calls.keys() if not job.compiled else ():
            replay = captured(lambda name=name: self._step(name), job.device)
            self._take_back(name)  # of a call that broke off
            if replay is not None:
                calls[name], self.notes[name] = replay, "CUDA graph"
        if self.exact is not None and self.exact.capture():
            self.notes["exact"] = "CUDA graphs of a draft and of a full pass"
        times: dict[str, list[float]] = {name: [] for name in calls}
        turns = range(WARM_UP + max(job.steps, job.cycles if self.exact else 0))
        for turn in tqdm(turns, desc="steps", disable=not progress, leave=False):
            if turn < WARM_UP + job.steps:
                for name, call in calls.items():
                    taken = milliseconds(call, job.device)
                    self._take_back(name)
                    if turn >= WARM_UP:
                        times[name].append(taken)
            if self.exact is not None and turn < WARM_UP + job.cycles:
                for name, taken in self._exact_turn(self.exact, turn).items():
                    if turn >= WARM_UP:
                        times.setdefault(name, []).append(taken)
        return times

    def _first(self, name: str) -> Tensor | None:
        """Logits of the first step; `None` where one that is not ours cannot be had, for example for want of memory."""
        try:
            return self._step(name)
        except Exception as error:
            if name in self.ends:
                raise
            self.notes[name] = f"left out: {type(error).__name__}: {error}".splitlines()[0]
            del self.steps[name], self.caches[name]
            return None

    def _step(self, name: str) -> Tensor:
        logits = self.steps[name]()
        self._take_back(name)
        return logits

    def _take_back(self, name: str) -> None:
        if name in self.ends:
            variants.take_back(self.caches[name], self.ends[name])

    def _exact_turn(self, exact: Exact, turn: int) -> dict[str, float]:
        token = torch.ones(self.job.batch, 1, dtype=torch.int64, device=self.job.device)
        tokens = token.expand(-1, self.job.draft + 1)
        calls: dict[str, Callable[[], object]] = {
            "draft": lambda: exact.draft(token, 1),
            "verify": lambda: exact.verify(tokens),
            "cycle": lambda: exact.cycle(token, kept(turn, self.job)),
        }
        times = {}
        for name, call in calls.items():
            if name == "draft":
                exact.select()  # which is a part of the cycle
                exact.draft(token, 0)
            times[name] = milliseconds(call, self.job.device)
            exact.take_back()
        return times

    def _check_exact(self) -> float:
        """A full pass over random tokens against single steps over the same store."""
        exact, job = self.exact, self.job
        assert exact is not None
        generator = torch.Generator(device=job.device).manual_seed(2)
        size, vocabulary = (job.batch, job.draft + 1), self.model.config.vocab_size
        tokens = torch.randint(vocabulary, size, generator=generator, device=job.device)
        exact.draft(tokens[:, :1], 0)  # the first selection, which decides on the anchors
        verified = exact.verify(tokens)
        exact.take_back()
        alone = variants.over_same_store(exact.cache, self.model)
        steps = [
            variants.forward(self.model, self.below, alone, token) for token in tokens.split(1, 1)
        ]
        variants.take_back(alone, job.context)
        return self._compare("verify", verified, torch.cat(steps, 1), "single steps")

    def _compare(self, name: str, ours: Tensor, expected: Tensor, other: str) -> float:
        expected = expected.float()
        error = float((ours.float() - expected).norm() / expected.norm())
        if not error < TOLERANCE[self.job.dtype]:
            raise WrongResultError(
                f"{name}: logits differ from {other} by {error:.2g} (relative RMS)"
            )
        return error
