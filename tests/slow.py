"""The method once more, slowly and in its own arithmetic: one head, one list, float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.kernels.options import AttendOptions
from tests.helpers import Tokens


def slow_select(
    scores: Sequence[float], budget: int, kernel: int, visible: Sequence[bool]
) -> list[int]:
    """The K best of one head by (pooled score, position), lowest first."""
    reach = kernel // 2
    shown = [score if seen else 0.0 for score, seen in zip(scores, visible, strict=True)]
    pooled = [max(shown[max(0, i - reach) : i + reach + 1]) for i in range(len(shown))]
    ranked = sorted((pooled[i], i) for i in range(len(shown)) if visible[i])
    return [position for _, position in ranked][-budget:]


def slow_logits(queries: Tensor, keys: Tensor, attention: AttendOptions) -> Tensor:
    """Logits `[G, L]` of queries `[G, D]` over keys `[L, D]`, in float64."""
    logits = queries.double() @ keys.double().T * attention.scale
    if attention.softcap is not None:
        logits = attention.softcap * torch.tanh(logits / attention.softcap)
    return logits


def slow_weights(
    queries: Tensor, keys: Tensor, attention: AttendOptions, members: Sequence[int]
) -> Tensor:
    """Attention weights `[G, L]`; `members` are the numbers of these query heads, for their sinks."""
    mass = slow_logits(queries, keys, attention).exp()
    total = mass.sum(-1)
    if attention.sinks is not None:
        total = total + attention.sinks[list(members)].double().exp()
    return mass / total[:, None]


def first_visible(tokens: Tokens, row: int) -> int:
    return 0 if tokens.visible is None else int(tokens.visible[row].int().argmax())


def slow_head(
    tokens: Tokens,
    row: int,
    head: int,
    config: RefreshConfig,
    prompt: int,
    attention: AttendOptions,
) -> Iterator[tuple[list[int], Tensor]]:
    """The method for one KV head, to the end of the text: (positions held, output `[G, D]`) of every step."""
    pad, budget = first_visible(tokens, row), 0
    members = list(range(head * tokens.group, (head + 1) * tokens.group))

    def weights(now: int, over: list[int]) -> Tensor:
        queries, keys = tokens.queries[row, members, now], tokens.keys[row, head, over]
        return slow_weights(queries, keys, attention, members)

    def best(now: int) -> list[int]:
        received = weights(now, list(range(pad, now + 1)))
        score = received.amax(0) if config.group_reduction == "max" else received.mean(0)
        shown = [True] * len(score)
        return [pad + p for p in slow_select(score.tolist(), budget, config.pool_kernel, shown)]

    def summary(now: int) -> Tensor:
        comparing = slice(None) if config.decide == "layer" else members
        return tokens.queries[row, comparing, now].mean(0)

    budget = config.resolve_budget(prompt - pad)
    ring, reference, since = best(prompt - 1), summary(prompt - 1), 0
    for now in range(prompt, tokens.keys.shape[2]):
        since += 1
        full = config.stride is not None and since % config.stride == 0
        if full and config.threshold is not None:
            full = float(F.cosine_similarity(summary(now), reference, 0)) <= config.threshold
        if full:
            ring, reference, since = best(now), summary(now), 0
        else:
            ring = [*ring, now][-budget:]  # lowest first, so the lowest-scored leaves
        over = list(range(pad, now + 1)) if full else ring
        yield sorted(ring), weights(now, over) @ tokens.values[row, head, over].double()


def slow_worth(weights: Sequence[float], k: int) -> list[int]:
    """Which entries a mixed step reads exactly, by log-weights: whole buckets of 1/8 nat, as long as K suffices."""
    buckets = [min(int(max(-w, 0.0) * 8), 255) for w in weights]
    chosen: list[int] = []
    for bucket in range(256):
        more = [i for i, b in enumerate(buckets) if b == bucket]
        if len(chosen) + len(more) > k:
            break
        chosen += more
    return sorted(chosen)
