"""Milliseconds per decoded token of a whole model: ours in every mode, against eviction and transformers' caches.

First the logits are compared. Then all variants take turns, step by step, so that a drift of the machine's speed hits
them alike, and medians are reported beside the bytes that they had to move.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

import refreshkv
from refreshkv.bench import record as records
from refreshkv.bench import roofline, variants
from refreshkv.bench.checks import compare
from refreshkv.bench.cycle import Exact
from refreshkv.bench.job import Job
from refreshkv.bench.report import LEFT_OUT, report
from refreshkv.bench.shapes import build, config_of, outline
from refreshkv.bench.timing import read_bandwidth, take_turns
from refreshkv.config import check_names
from refreshkv.hosts.transformers.fallback import CACHES

# What full attention may be compared with, the most trusted first.
_YARDSTICKS = ("static", "default", "flash", "own_dense")


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
    check_names("variant", skip, variants.VARIANTS)
    job = Job(**settings)
    sizes = roofline.sizes_of(outline(config_of(job.shape), job.dtype))
    records.check_file(results, records.flat(report(job, sizes), LEFT_OUT))
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model, bandwidth = build(job.shape, job.device, job.dtype), read_bandwidth(job.device)
    with torch.no_grad(), refreshkv.attach(model) as session:
        caches = variants.caches(model, job, skip)
        turns = _Turns(model, session.implementation_below, caches, job, skip)
        errors = turns.check()
        times = turns.time(progress)
    found = report(job, sizes, times, errors, bandwidth, turns.notes)
    records.append(results, [records.flat(found, LEFT_OUT)])
    if job.device.type == "cuda":
        del turns, caches
        torch._dynamo.reset()  # compiled graphs hold on to the caches of this size
        torch.cuda.empty_cache()
    return found


class _Turns:
    """The variants of one run, but those to `skip`; `notes` says why one is missing or how it ran."""

    def __init__(
        self,
        model: PreTrainedModel,
        below: str,
        caches: dict[str, Cache],
        job: Job,
        skip: tuple[str, ...] = (),
    ) -> None:
        self.model, self.below, self.caches, self.job = model, below, caches, job
        self.notes: dict[str, str] = {}
        self.exact = Exact(model, below, caches["exact"], job) if "exact" in caches else None
        self.steps = {
            name: variants.step(model, below, name, cache, job)
            for name, cache in caches.items()
            if name != "exact" and name not in skip
        }

    def check(self) -> dict[str, float]:
        """Relative RMS of logits: full attention of ours against theirs, the lossless full pass against single steps.

        A mixed step is full attention where K is the whole context, so that is what is compared.

        Raises:
            WrongResultError: more than the tolerance of the dtype.
        """
        logits: dict[str, Tensor] = {}
        for name in list(self.steps):
            try:
                logits[name] = self.steps[name].once()
            except Exception as error:
                if self._is_ours(name):
                    raise
                # One that is not ours cannot be had, for example for want of memory.
                self.notes[name] = f"left out: {type(error).__name__}: {error}".splitlines()[0]
                del self.steps[name]
        trusted = next((name for name in _YARDSTICKS if name in logits), "")
        pairs = {
            name: (logits[name], logits[trusted], trusted)
            for name in ("own_dense", "full")
            if name in logits and name != trusted and trusted
        }
        if "mixed" in logits and trusted:
            pairs["mixed"] = self._mixed_over_everything(), logits[trusted], trusted
        if self.exact is not None:
            pairs["verify"] = (*self._verified(self.exact), "single steps")
        return {
            name: compare(f"{name}: logits differ from {other}", ours, theirs, self.job.dtype)
            for name, (ours, theirs, other) in pairs.items()
        }

    def time(self, progress: bool) -> dict[str, list[float]]:
        """Milliseconds of each timed turn."""
        timed, device = dict(self.steps), self.job.device
        for name, step in timed.items() if not self.job.compiled else ():
            if self._is_ours(name) and step.capture(device):
                self.notes[name] = "CUDA graph"
        if self.exact is not None:
            if self.exact.capture():
                self.notes["exact"] = "CUDA graphs of a draft and of a full pass"
            timed |= self.exact.timed()
        return take_turns(timed, device, progress)

    def _is_ours(self, name: str) -> bool:
        return isinstance(self.caches[name], CACHES)

    def _mixed_over_everything(self) -> Tensor:
        """Logits of a mixed step that may read every entry exactly."""
        budgets = [layer.inner.budget for layer in self.caches["mixed"].served]
        for budget in budgets:
            budget.fill_(self.job.context)
        logits: Tensor = self.steps["mixed"].once()
        for budget in budgets:
            budget.fill_(self.job.budget)
        return logits

    def _verified(self, exact: Exact) -> tuple[Tensor, Tensor]:
        """Logits of a full pass over random tokens, and of single steps over the same keys and values."""
        job, dense = self.job, self.caches["own_dense"]
        generator = torch.Generator(device=job.device).manual_seed(2)
        size, vocabulary = (job.batch, job.draft + 1), self.model.config.vocab_size
        tokens = torch.randint(vocabulary, size, generator=generator, device=job.device)
        exact.begin()  # the first selection, which decides on the anchors
        verified = exact.verify(tokens)
        exact.take_back()
        alone = [variants.forward(self.model, self.below, dense, one) for one in tokens.split(1, 1)]
        variants.take_back(dense, job.context)
        return verified, torch.cat(alone, 1)
