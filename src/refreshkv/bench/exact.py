"""Milliseconds per token of the lossless mode: cycles of drafts and a verification against full attention.

How many tokens a full pass yields is a matter of text, and random weights write none: it is measured elsewhere and
given here, and each timed cycle commits as many tokens. All variants take turns in one run, so that a drift of the
machine's speed hits them alike; medians are reported. Letters: B batch, S drafts of a cycle, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, LlamaForCausalLM, StaticCache

import refreshkv
from refreshkv.bench import common
from refreshkv.bench.common import WARM_UP, over
from refreshkv.bench.record import append_row
from refreshkv.bench.shapes import build
from refreshkv.config import RefreshConfig, make_config, unknown
from refreshkv.integrations.transformers import RefreshCache
from refreshkv.speculation import accept_greedy

_SPARE = 8  # places beyond those that a run needs

# What the columns mean, in the order of the table.
VARIANTS = {
    "own_dense": "our full attention, one step",
    "static": "transformers StaticCache, one step",
    "draft": "one draft pass",
    "verify": "one full pass over all drafts and the token before them",
    "cycle": "selection, drafts, full pass, commit",
}
DERIVED = {"exact": "a token of the lossless mode: cycle / tokens per pass"}
SKIPPABLE = ("static",)
CHECKED = ("own_dense", "verify")


@dataclass(frozen=True)
class Job(common.Job):
    """Cycles of `draft` tokens that commit `tokens_per_pass` in the mean; `cycles` timed ones."""

    draft: int
    tokens_per_pass: float
    cycles: int

    def kept(self, cycle: int) -> int:
        """Tokens that this cycle commits, the mean rounded down or up."""
        return math.floor((cycle + 1) * self.tokens_per_pass) - math.floor(
            cycle * self.tokens_per_pass
        )


def run(
    *,
    tokens_per_pass: float,
    shape: str = "llama-3.2-1b",
    context: int = 8192,
    batch: int = 1,
    budget: int | float = 0.0625,
    draft: int = 7,
    device: str = "cpu",
    dtype: str = "bfloat16",
    cycles: int = 6,
    threads: int | None = None,
    skip: tuple[str, ...] = (),
    results: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Check, then time; returns the record and appends it to `results` (CSV).

    Args:
        tokens_per_pass: mean tokens that a full pass yields, from 1 to `draft` + 1.
        shape: a name in `shapes.SHAPES`.
        context: tokens in the cache. `batch`: rows, all of this length.
        budget: as in `RefreshConfig`; the other settings of the selection are those of the default preset.
        draft: tokens that each cycle drafts.
        cycles: timed turns of each variant, after two for warming up.
        threads: CPU threads; `None` leaves torch's choice.
        skip: variants to leave out, of `SKIPPABLE`.

    Raises:
        ValueError: an unknown shape or variant, a number out of range. WrongResultError: the logits of the full pass
            are not those of single steps.
    """
    for variant in skip:
        if variant not in SKIPPABLE:
            raise ValueError(unknown("variant", variant, SKIPPABLE))
    settings = make_config("default", budget=budget, draft=draft)
    if not 1 <= tokens_per_pass <= draft + 1:
        raise ValueError(
            f"a full pass over {draft} drafts yields 1 to {draft + 1} tokens; got {tokens_per_pass!r} tokens per pass"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    job = Job(
        shape,
        context,
        batch,
        settings.resolve_budget(context),
        torch.device(device),
        getattr(torch, dtype),
        draft,
        tokens_per_pass,
        cycles,
    )
    model = build(shape, job.device, job.dtype)
    with torch.inference_mode(), refreshkv.attach(model) as session:
        below = session.implementation_below
        caches = _caches(model, settings, job, skip)
        exact = _Exact(model, below, caches["exact"], job)
        errors = _check(model, below, caches, exact, job)
        times = _time(model, below, caches, exact, job, progress)
    record = _record(job, times, errors, model)
    if results is not None:
        append_row(results, record)
    return record


def _caches(
    model: LlamaForCausalLM, settings: RefreshConfig, job: Job, skip: tuple[str, ...]
) -> dict[str, Cache]:
    """All with the same content; ours share one store, which is cropped to the context after each turn."""
    room = job.context + max(job.draft + 1, WARM_UP + job.cycles) + _SPARE
    caches: dict[str, Cache] = {
        "own_dense": RefreshCache(model.config, RefreshConfig(mode="full"), reserve=room),
        "exact": RefreshCache(model.config, settings, reserve=room),
    }
    if "static" not in skip:
        caches["static"] = StaticCache(config=model.config, max_cache_len=room)
    common.fill(model, caches, job, window=settings.window)
    return caches


class _Exact:
    """The lossless mode at the end of the context, driven as `generate` drives it but for what is accepted."""

    def __init__(self, model: LlamaForCausalLM, below: str, cache: RefreshCache, job: Job) -> None:
        self.model, self.below, self.cache, self.job = model, below, cache, job
        self.counts = torch.full((job.batch,), job.draft, device=job.device)
        for layer in cache.exact_layers:
            layer.begin_exact(None)

    def draft(self, token: Tensor, ahead: int) -> Tensor:
        """One draft pass over `[B, 1]`, `ahead` places after the context; logits `[B, V]`."""
        with self.cache.drafting("draft"):
            return self._forward(token, ahead)[:, 0]

    def verify(self, tokens: Tensor) -> Tensor:
        """The full pass over `[B, S + 1]`; logits `[B, S + 1, V]`."""
        with self.cache.drafting("verify", self.counts + 1):
            return self._forward(tokens, 0)

    def cycle(self, token: Tensor, kept: int) -> None:
        """Drafts after `token` `[B, 1]`, and the full pass; whatever is right, `kept` tokens are committed."""
        tokens, confidence = [token], self.cache.refresh.confidence
        for ahead in range(self.job.draft):
            scores = self.draft(tokens[-1], ahead).float()
            tokens.append(scores.argmax(-1, keepdim=True))
            # What `generate` looks at before it drafts on.
            bool((scores.softmax(-1).amax(-1) >= confidence).any())
        logits = self.verify(torch.cat(tokens, 1))
        accept_greedy(torch.cat(tokens[1:], 1), logits.float().argmax(-1), self.counts)
        self._commit(kept)

    def take_back(self) -> None:
        """The end is that of the context again. The last votes stay: the next draft selects from them."""
        self._commit(0)  # of drafts without a full pass
        for layer in self.cache.exact_layers:
            layer.exact.take_back(torch.full_like(self.counts, self.job.context))
        common.crop(self.cache, self.job.context)

    def _commit(self, kept: int) -> None:
        for layer in self.cache.exact_layers:
            layer.exact.commit(torch.full_like(self.counts, kept))

    def _forward(self, tokens: Tensor, ahead: int) -> Tensor:
        first = self.job.context + ahead
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        positions = positions.expand(len(tokens), -1)
        return common.forward(self.model, self.below, self.cache, tokens, positions)


def _check(
    model: LlamaForCausalLM, below: str, caches: dict[str, Cache], exact: _Exact, job: Job
) -> dict[str, float]:
    """Relative RMS of a full pass's logits against those of single steps, and of such a step against StaticCache."""
    generator = torch.Generator(device=job.device).manual_seed(2)
    size = (job.batch, job.draft + 1)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator, device=job.device)
    steps = [
        common.forward(model, below, caches["own_dense"], token) for token in tokens.split(1, 1)
    ]
    common.crop(caches["own_dense"], job.context)
    errors = {}
    if "static" in caches:
        static = common.forward(model, below, caches["static"], tokens[:, :1])
        errors["own_dense"] = common.checked("own_dense", steps[0], static, "StaticCache", job)
    exact.draft(tokens[:, :1], 0)  # the first selection, which decides on the anchors
    verified = exact.verify(tokens)
    exact.take_back()
    errors["verify"] = common.checked("verify", verified, torch.cat(steps, 1), "single steps", job)
    return errors


def _time(
    model: LlamaForCausalLM,
    below: str,
    caches: dict[str, Cache],
    exact: _Exact,
    job: Job,
    progress: bool,
) -> dict[str, list[float]]:
    """Milliseconds of each timed turn."""
    token = torch.ones(job.batch, 1, dtype=torch.int64, device=job.device)
    tokens = token.expand(-1, job.draft + 1)

    def step(name: str) -> Callable[[], object]:
        return lambda: common.forward(model, below, caches[name], token)

    times: dict[str, list[float]] = {
        name: [] for name in VARIANTS if name not in SKIPPABLE or name in caches
    }
    for turn in tqdm(range(WARM_UP + job.cycles), desc="cycles", disable=not progress, leave=False):
        calls: dict[str, Callable[[], object]] = {
            "own_dense": step("own_dense"),
            "static": step("static"),
            "draft": lambda: exact.draft(token, 1),
            "verify": lambda: exact.verify(tokens),
            "cycle": lambda turn=turn: exact.cycle(token, job.kept(turn)),
        }
        for name, taken in times.items():
            if name == "draft":
                exact.draft(token, 0)  # selects, which is a part of the cycle
            passed = common.milliseconds(calls[name], job.device)
            if turn >= WARM_UP:
                taken.append(passed)
            exact.take_back()
    return times


def _record(
    job: Job, times: dict[str, list[float]], errors: dict[str, float], model: LlamaForCausalLM
) -> dict[str, Any]:
    ms = {name: statistics.median(values) for name, values in times.items()}
    ms["exact"] = ms["cycle"] / job.tokens_per_pass
    ideal, faster = _ideal(job, model), ms["own_dense"] / ms["exact"]
    budget = min(job.budget, job.context)
    ratios = {
        "exact_over_own_dense": faster,
        "exact_over_static": over(ms, "static", "exact"),
        "passes_per_token": (job.draft + 1) / job.tokens_per_pass,
        "kv_read_share": (job.draft * budget + job.context) / (job.tokens_per_pass * job.context),
        "ideal_over_own_dense": ideal,
        "share_of_ideal": faster / ideal,
    }
    settings = {
        "draft": job.draft,
        "tokens_per_pass": job.tokens_per_pass,
        "cycles": job.cycles,
    }
    return common.describe(
        job,
        settings,
        times,
        {name: ms.get(name) for name in (*VARIANTS, *DERIVED)},
        ratios,
        {name: errors.get(name) for name in CHECKED},
    )


def _ideal(job: Job, model: LlamaForCausalLM) -> float:
    """How many times fewer bytes a token of the lossless mode reads than a full step: weights, K and V."""
    weights, entry = common.weight_bytes(model), common.entry_bytes(model, job.batch)
    partial, full = entry * min(job.budget, job.context), entry * job.context
    cycle = (job.draft + 1) * weights + job.draft * partial + full
    return (weights + full) / (cycle / job.tokens_per_pass)
