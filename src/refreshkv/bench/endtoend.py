"""Tokens per second of `generate` itself, prompt and all: every mode as a user gets it, against transformers' caches.

The first turn warms up and compares tokens: those of full attention and of the lossless mode must be vanilla's, in
float32 to the last one; with fewer bits two best tokens may be as good as equal, so how many are the same is reported.
Then all variants take turns in one process. Letters: B rows, P tokens of the longest prompt, n new tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteria

import refreshkv
from refreshkv.bench import record as records
from refreshkv.bench.checks import WrongResultError
from refreshkv.bench.job import Job
from refreshkv.bench.shapes import build
from refreshkv.bench.timing import OUT_OF_MEMORY, forget
from refreshkv.config import check_names

BUNDLED = "bundled"
# How each variant is attached (`None`: not at all), and what it is.
MODES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "dynamic": (None, "transformers, DynamicCache"),
    "static": (None, "transformers, StaticCache, compiled: on a GPU"),
    "full": ({"mode": "full"}, "our full attention"),
    "lossless": ({"preset": "default"}, "the lossless mode, preset 'default'"),
    "fast": ({"preset": "fast"}, "the mixed mode, preset 'fast'"),
    "published": ({"preset": "paper-llama"}, "the method as published, preset 'paper-llama'"),
}
_EXACT = ("static", "full", "lossless")  # give the tokens of "dynamic"
_SETTINGS = ("shape", "context", "batch")
_TIMES = ("prefill_s", "decode_s", "tokens_per_s", "later_tokens_per_s")
_COLUMNS = ("new", "variant", "turn", *_TIMES, "new_tokens", "same_tokens")


def run(
    *,
    shape: str = "llama-3.2-1b",
    new: int = 64,
    turns: int = 2,
    skip: tuple[str, ...] = (),
    results: Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Check, then time; returns the record (`docs/bench.md`) and appends a row a turn and variant when it is made.

    Args:
        shape: as in `Job`, random weights and tokens; or "bundled": the bundled model on prompts of its own.
        new: tokens to generate, fewer where a model ends its text.
        turns: that are timed, of each variant.
        skip: variants to leave out.
        settings: other fields of `Job`; `context` are the tokens of a prompt, about, `batch` the prompts.

    Raises:
        ValueError: an unknown shape or variant, a number out of range, a file that holds other columns.
        WrongResultError: tokens that must be vanilla's are not.
    """
    check_names("variant", skip, MODES)
    job = Job(shape="demo" if shape == BUNDLED else shape, **settings)
    about = records.settings(job, names=_SETTINGS) | {"shape": shape}
    records.check_file(results, {**records.flat(about), **dict.fromkeys(_COLUMNS)})
    if job.threads is not None:
        torch.set_num_threads(job.threads)
        about["threads"] = job.threads
    model, inputs = _bundled(job, new) if shape == BUNDLED else _random(job)
    names = [name for name in MODES if name not in skip]
    if job.device.type != "cuda":
        names = [name for name in names if name != "static"]
    notes: dict[str, str] = {}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    vanilla = None
    for turn in tqdm(range(turns + 1), desc="turns", disable=not progress, leave=False):
        for name in list(rows):
            try:
                tokens, row = _generate(model, inputs, name, new)
            except Exception as error:
                if MODES[name][0] is not None and not isinstance(error, OUT_OF_MEMORY):
                    raise
                forget(name, error, notes, job.device)
                del rows[name]
                continue
            if name == "dynamic":
                vanilla = tokens
            row["same_tokens"] = None if vanilla is None else _same(tokens, vanilla)
            if name in _EXACT and job.dtype == torch.float32 and vanilla is not None:
                _check(name, tokens, vanilla)
            if turn:
                rows[name].append(row)
                made = {"new": new, "variant": name, "turn": turn, **row}
                records.append(results, [{**records.flat(about), **made}])
    variants = {name: _median(found) for name, found in rows.items()}
    return {**about, "new": new, "turns": turns, "variants": variants, "notes": notes}


class _Clock(StoppingCriteria):
    """Stops nothing; notes when the first token of all rows is there, and when half of them are."""

    def __init__(self, device: torch.device, prompt: int, new: int) -> None:
        self.device, self.prompt = device, prompt
        self.places = {1, 1 + new // 2}  # tokens
        self.seen: list[tuple[int, float]] = [(0, self.now())]

    def now(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`[B]` bool."""
        made = input_ids.shape[1] - self.prompt
        if made in self.places and made > self.seen[-1][0]:
            self.seen.append((made, self.now()))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], name: str, new: int
) -> tuple[Tensor, dict[str, Any]]:
    """New tokens `[B, n]` of a variant, and its times."""
    how, (rows, prompt) = MODES[name][0], inputs["input_ids"].shape
    cache = {"cache_implementation": "static"} if name == "static" else {}
    session = None if how is None else refreshkv.attach(model, **how)
    clock = _Clock(model.device, prompt, new)
    try:
        ids = model.generate(
            **inputs,
            **cache,
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=[clock],
        )
        tokens = ids[:, prompt:]
        end = (tokens.shape[1], clock.now())
    finally:
        if session is not None:
            session.detach()
    begun, first, half = clock.seen[0], clock.seen[1], clock.seen[-1]
    numbers = {
        "prefill_s": first[1] - begun[1],
        "decode_s": end[1] - first[1],
        "tokens_per_s": _rate(rows, first, end),
        "later_tokens_per_s": _rate(rows, half, end),
    }
    return tokens, {**records.rounded(numbers), "new_tokens": tokens.shape[1]}


def _rate(rows: int, begin: tuple[int, float], end: tuple[int, float]) -> float | None:
    """Tokens per second of all rows between two moments, each `(tokens of a row, seconds)`."""
    made = rows * (end[0] - begin[0])
    return made / (end[1] - begin[1]) if made else None


def _same(tokens: Tensor, vanilla: Tensor) -> int:
    """How many tokens from the first on are vanilla's, in the row that has the fewest."""
    most = min(tokens.shape[1], vanilla.shape[1])
    equal = (tokens[:, :most] == vanilla[:, :most]).long().cumprod(1)
    return int(equal.sum(1).min())


def _check(name: str, tokens: Tensor, vanilla: Tensor) -> None:
    """Raises `WrongResultError` where tokens are not vanilla's."""
    if not torch.equal(tokens, vanilla):
        same = _same(tokens, vanilla)
        raise WrongResultError(f"{name}: token {same} differs from transformers' full attention")


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the times of all turns; the other numbers are those of the last."""
    medians = {}
    for name in _TIMES:
        values = [row[name] for row in rows if row[name] is not None]
        medians[name] = statistics.median(values) if values else None
    return {**rows[-1], **medians}


def _random(job: Job) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model of random weights, which ends no text, and prompts `[B, P]` of random tokens."""
    model = build(job.shape, job.device, job.dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    generator = torch.Generator().manual_seed(0)
    size = (job.batch, job.context)
    ids = torch.randint(1, model.config.vocab_size, size, generator=generator).to(job.device)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _bundled(job: Job, new: int) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The bundled model, and prompts whose answers are long, padded on the left."""
    from refreshkv import demo
    from refreshkv.demo.prompts import make_prompt

    model, tokenizer = demo.load(job.dtype)
    seeds = range(job.batch)
    prompts = [make_prompt("html-to-tsv", seed, job.context).prompt for seed in seeds]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(job.device)
    needed, most = inputs["input_ids"].shape[1] + new, model.config.max_position_embeddings
    if needed > most:
        raise ValueError(f"prompt and answer need {needed} positions, the bundled model has {most}")
    names = ("input_ids", "attention_mask")
    return model.to(job.device), {name: inputs[name] for name in names}
