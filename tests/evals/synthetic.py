"""Records as a run writes them, without a model: eviction loses later parts of an output, refreshing keeps them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

# method -> (KV read, share of full steps, quality of the first part, what is left of it at the last)
METHODS = {
    "full": (1.0, 1.0, 0.99, 1.0),
    "streaming-llm": (0.125, 0.0, 0.15, 0.3),
    "h2o": (0.126, 0.0, 0.4, 0.1),
    "snapkv": (0.126, 0.0, 0.9, 0.05),
    "snapkv-1": (0.125, 0.0, 0.8, 0.05),
    "pyramidkv": (0.131, 0.0, 0.85, 0.08),
    "tova": (0.127, 0.0, 0.5, 0.1),
    "quest": (0.19, 0.0, 0.95, 0.9),
    "oracle-topk": (0.625, 0.0, 0.98, 0.99),
    "refreshkv": (0.31, 0.18, 0.96, 0.9),
    "refreshkv-fixed:stride=10:threshold=none": (0.22, 0.1, 0.93, 0.7),
    "refreshkv-paper": (0.3, 0.16, 0.95, 0.85),
    "no-refresh": (0.125, 0.0, 0.8, 0.05),
    "no-full-attention": (0.31, 0.17, 0.95, 0.89),
}
RULER = (
    *(f"ruler-niah-{kind}" for kind in ("single-1", "single-2", "single-3")),
    *(f"ruler-niah-{kind}" for kind in ("multikey-1", "multikey-2", "multikey-3")),
    *("ruler-niah-multivalue", "ruler-niah-multiquery"),
    *(f"ruler-{kind}" for kind in ("vt", "cwe", "fwe", "qa-1", "qa-2")),
)
# task -> (metric, parts, tokens a part, difficulty)
TASKS = {
    "chain-of-key": ("valid prefix", (10, 10), 9, 0.05),
    "html-to-tsv": ("row F1", (6, 14), 12, 0.15),
    "key-value": ("lines right", (5, 5), 11, 0.02),
    "perplexity": ("perplexity", (0, 0), 256, 0.0),
    "summarization": ("ROUGE-L", (0, 0), 300, 0.65),
    **{name: ("recall", (1, 1), 8 + i, 0.03 * i) for i, name in enumerate(RULER)},
}
FORCED = ("chain-of-key", "html-to-tsv", "key-value")
LAYERS = 6


def records(
    tasks: Iterable[str] = TASKS,
    methods: Iterable[str] = METHODS,
    examples: int = 20,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """A whole run, task by task, method by method, free and then forced."""
    for task in tasks:
        modes = ("forced",) if task == "perplexity" else ("free",)
        for mode in (*modes, *(("forced",) if task in FORCED else ())):
            for method in methods:
                for index in range(examples):
                    yield record(task, mode, method, index, seed)


def record(task: str, mode: str, method: str, index: int, seed: int = 0) -> dict[str, Any]:
    """One line. The difficulty of an example is the same for all methods, as it is in a real run."""
    example = f"{index:04d}"
    text = f"{task}|{method}|{mode}|{example}|{seed}"
    rng = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
    shared = np.random.default_rng([len(task), ord(task[-1]), index, seed])
    metric, (low, high), tokens, hard = TASKS[task]
    read, full, first, rest = METHODS[method]
    count = int(shared.integers(low, high + 1))
    ease = (1 - hard) * (1 - 0.1 * shared.random())
    chance = ease * first * np.geomspace(1, rest + (1 - rest) * 0.4 * (mode == "forced"), count)
    parts = [float(part) for part in rng.random(count) < chance]
    if task == "perplexity":
        score = 0.9 + 0.3 * shared.random() + 0.3 * (1 - first * rest) + 0.01 * rng.normal()
    elif task == "summarization":
        score = min(1.0, max(0.0, ease * first * rest**0.3 + 0.03 * rng.normal()))
    elif task == "chain-of-key" and mode == "free":
        score = (parts.index(0.0) if 0.0 in parts else count) / count
    else:
        score = sum(parts) / count
    answer = max(1, count) * tokens
    output = answer if mode == "forced" else int(answer * (1 + 0.1 * rng.random()))
    steps = output - 1
    layers = {str(layer): layer_steps(full, layer, steps) for layer in range(LAYERS)}
    taken = sum(layer["full_steps"] for layer in layers.values())
    prompt = 2030 + int(shared.integers(0, 18))
    return {
        "key": f"{task}|{method}|{mode}|{example}",
        "task": task,
        "task_settings": {"length": 2048},
        "example": example,
        "seed": seed,
        "method": method,
        "mode": mode,
        "model": "demo",
        "budget": 0.125,
        "settings": {"budget": 0.125, "stride": 5, "threshold": 0.85, "pool_kernel": 7},
        "versions": {"refreshkv": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "score": score,
        "parts": parts,
        "metric": metric,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "answer_tokens": None if task == "summarization" else answer,
        "ended": True,
        "full_share": taken / (LAYERS * steps) if steps else None,
        "kv_read_share": read * (1 + 0.02 * rng.random()) if steps and read < 1 else read,
        "effective_stride": LAYERS * steps / taken if taken else None,
        "layers": layers,
        "output": f"{task} {example}\n"
        + "\n".join(f"line {i}: {part:g}" for i, part in enumerate(parts)),
        "prompt_sha256": hashlib.sha256(f"{task}{example}{seed}".encode()).hexdigest(),
        "seconds": 0.4,
    }


def layer_steps(full: float, layer: int, steps: int) -> dict[str, int]:
    """The first layer of a method that compares queries never refreshes."""
    share = full if full in (0.0, 0.1, 1.0) else full * layer * 2 / (LAYERS - 1)
    return {"full_steps": math.floor(share * steps), "steps": steps}
