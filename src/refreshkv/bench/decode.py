"""Milliseconds per decoded token of a whole model: ours in every mode, against eviction and transformers' caches.

First the results are compared with the truth. Then all variants take turns, step by step, so that a drift of the
machine's speed hits them alike, and medians are reported beside the bytes that they had to move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

import refreshkv
from refreshkv.bench import memory, roofline, variants
from refreshkv.bench import record as records
from refreshkv.bench.checks import within
from refreshkv.bench.cycle import Exact
from refreshkv.bench.job import Job
from refreshkv.bench.report import LEFT_OUT, report
from refreshkv.bench.shapes import build, config_of, outline
from refreshkv.bench.timing import OUT_OF_MEMORY, Timed, forget, read_bandwidth, take_turns
from refreshkv.bench.yardstick import Passed, Yardstick
from refreshkv.config import check_names
from refreshkv.hosts.transformers.fallback import CACHES


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
    needs, wanted = memory.needs_of(job, sizes), [x for x in variants.VARIANTS if x not in skip]
    notes = needs.fitting(wanted, memory.available(job.device))
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    memory.measured(job.device)  # from here on
    model, bandwidth = build(job.shape, job.device, job.dtype), read_bandwidth(job.device)
    with torch.no_grad(), refreshkv.attach(model) as session:
        context = variants.Context(model, job)
        caches = variants.caches(model, context, (*skip, *notes), notes)
        turns = _Turns(model, session.implementation_below, caches, context, notes)
        errors = turns.check()
        times = turns.time(progress)
    held = needs.as_dict() | memory.measured(job.device)
    found = report(job, sizes, times, errors, bandwidth, notes, held, turns.rounding)
    records.append(results, [records.flat(found, LEFT_OUT)])
    if job.device.type == "cuda":
        del turns, caches, context
        torch._dynamo.reset()  # compiled graphs hold on to the caches of this size
        torch.cuda.empty_cache()
    return found


class _Turns:
    """The variants of one run.

    Attributes:
        notes: why one is missing, or how it ran.
        rounding: the units of the checks (`yardstick`): of one token and of the full pass, logits and attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        below: str,
        caches: dict[str, Cache],
        context: variants.Context,
        notes: dict[str, str],
    ) -> None:
        self.model, self.below, self.caches, self.context = model, below, caches, context
        self.job, self.notes = context.job, notes
        self.rounding: dict[str, float] = {}
        self.exact = Exact(model, below, caches["exact"], self.job) if "exact" in caches else None
        self.steps = {
            name: variants.step(model, below, name, cache, context)
            for name, cache in caches.items()
            if name != "exact"
        }

    def check(self) -> dict[str, float]:
        """Relative RMS of logits against the truth: of full attention of ours, and of the lossless full pass.

        What attention gives in each layer is compared too (`yardstick`). A mixed step is full attention where K is the
        whole context, so that is what is compared.

        Raises:
            WrongResultError: more than rounding.
        """
        for name in list(self.steps):
            self._try(name, self.steps[name].once)
        errors: dict[str, float | None] = {}
        checked = [x for x in ("own_dense", "flash", "full", "mixed") if x in self.steps]
        if checked:
            size = (self.job.batch, 1)
            one = torch.ones(size, dtype=torch.int64, device=self.job.device)
            yardstick = self._yardstick("step", one)
            for name in checked:
                errors[name] = self._try(name, functools.partial(self._check, name, yardstick))
        if self.exact is not None:
            errors["verify"] = self._try("exact", functools.partial(self._check_exact, self.exact))
        return {name: error for name, error in errors.items() if error is not None}

    def time(self, progress: bool) -> dict[str, list[float]]:
        """Milliseconds of each timed turn."""
        device = self.job.device
        for name in list(self.steps):
            graph = name == "flash" or (self._is_ours(name) and not self.job.compiled)
            if graph and self._try(name, lambda x=name: self.steps[x].capture(device)):
                self.notes[name] = "CUDA graph"
        timed, parts = dict(self.steps), {}
        if self.exact is not None and self._try("exact", self.exact.capture):
            self.notes["exact"] = "CUDA graphs of a draft and of a full pass"
        if self.exact is not None:
            parts = self.exact.timed()

        def failed(name: str, error: Exception) -> None:
            forget("exact" if name in parts else name, error, self.notes, device)

        return take_turns(timed | parts, device, progress, failed)

    def _try(self, name: str, call: Any) -> Any:
        """What the call gives; the variant is dropped where it has no memory, one of others whatever the reason."""
        try:
            return call()
        except Exception as error:
            if self._is_ours(name) and not isinstance(error, OUT_OF_MEMORY):
                raise
            self.steps.pop(name, None)
            if name == "exact":
                self.exact = None
            del self.caches[name]
            forget(name, error, self.notes, self.job.device)
            return None

    def _is_ours(self, name: str) -> bool:
        return isinstance(self.caches[name], CACHES)

    def _yardstick(self, name: str, tokens: Tensor) -> Yardstick:
        """Of a pass over `[B, T]` tokens after the context."""
        made = Yardstick(self.model, self.below, self.context.held(), tokens)
        self.rounding |= {f"{name}_{part}": unit for part, unit in made.unit.items()}
        return made

    def _check(self, name: str, yardstick: Yardstick) -> float:
        """Of a single step."""
        about = self.model, self.below, name, self.caches[name], self.context
        eager = variants.step(*about, eager=True)
        logits = self._once(name, self.steps[name])
        return self._error(name, logits, lambda: self._once(name, eager), yardstick)

    def _check_exact(self, exact: Exact) -> float:
        """Of a full pass over random tokens."""
        device, generator = self.job.device, torch.Generator(device=self.job.device)
        size, most = (self.job.batch, self.job.draft + 1), self.model.config.vocab_size
        tokens = torch.randint(most, size, generator=generator.manual_seed(2), device=device)
        yardstick = self._yardstick("verify", tokens)

        def verified() -> Tensor:
            logits = exact.verify(tokens)
            exact.take_back()
            return logits

        exact.begin()  # the first selection, which decides on the anchors
        exact.take_back()
        return self._error("verify", verified(), verified, yardstick)

    def _error(
        self,
        name: str,
        logits: Tensor,
        again: Callable[[], object],
        yardstick: Yardstick,
    ) -> float:
        """Of `logits` that were computed; both errors are no more than rounding.

        `again` computes them once more, without anything compiled, for what attention gives.

        Raises:
            WrongResultError: they are more.
        """
        truth, logits = yardstick.truth, logits.clone()  # the next run of a graph overwrites them
        with yardstick.pinned() as attended:
            again()
        errors = Passed(logits.view_as(truth.logits), attended).errors(truth)
        for part, error in errors.items():
            within(f"{name}: {part} differ from the truth", error, yardstick.unit[part])
        return errors["logits"]

    def _once(self, name: str, step: Timed) -> Tensor:
        """Logits of a step; of a mixed one, where it may read every entry exactly."""
        if name != "mixed":
            return step.once()
        budgets = [layer.inner.budget for layer in self.caches[name].served]
        for budget in budgets:
            budget.fill_(self.job.context)
        logits: Tensor = step.once()
        for budget in budgets:
            budget.fill_(self.job.budget)
        return logits
