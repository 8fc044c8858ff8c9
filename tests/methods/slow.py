"""The comparison methods once more, slowly: one row without padding, Python lists of positions, float64.

Each yields, for every decode step, the positions that each KV head attends to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.kernels.options import AttendOptions
from tests.helpers import Tokens
from tests.slow import slow_weights

Sets = list[list[int]]  # [KV head] -> positions, ascending


class Row:
    """One text, `prompt` tokens of which are its prompt."""

    def __init__(
        self, tokens: Tokens, row: int, prompt: int, config: RefreshConfig, options: AttendOptions
    ) -> None:
        self.text = tokens.alone(row)
        self.pad = tokens.keys.shape[2] - self.text.keys.shape[2]
        self.prompt = prompt - self.pad
        self.config = config
        self.options = options
        self.budget = config.resolve_budget(self.prompt)
        self.heads = range(self.text.keys.shape[1])

    @property
    def steps(self) -> range:
        return range(self.prompt, self.text.keys.shape[2])

    def members(self, head: int) -> list[int]:
        return list(range(head * self.text.group, (head + 1) * self.text.group))

    def weights(self, head: int, now: int, over: list[int]) -> Tensor:
        """`[G, len(over)]`, what the queries of token `now` give to these positions."""
        members = self.members(head)
        queries, keys = self.text.queries[0, members, now], self.text.keys[0, head, over]
        return slow_weights(queries, keys, self.options, members)

    def reduced(self, weights: Tensor) -> list[float]:
        mean = self.config.group_reduction == "mean"
        return (weights.mean(0) if mean else weights.amax(0)).tolist()

    def output(self, head: int, now: int, over: list[int]) -> Tensor:
        return self.weights(head, now, over) @ self.text.values[0, head, over].double()


def best(scores: dict[int, float], count: int) -> list[int]:
    """The `count` best positions, lowest score first; at a tie the later one is better."""
    ranked = sorted(scores, key=lambda position: (scores[position], position))
    return ranked[len(ranked) - min(count, len(ranked)) :]


def streaming_llm(row: Row) -> Iterator[Sets]:
    sinks = min(4, row.budget - 1)
    for now in row.steps:
        newest = range(max(0, now + 1 - (row.budget - sinks)), now + 1)
        yield [sorted({*range(min(sinks, now)), *newest}) for _ in row.heads]


def h2o(row: Row) -> Iterator[Sets]:
    length = row.text.keys.shape[2]
    received = {h: torch.zeros(row.text.group, length, dtype=torch.float64) for h in row.heads}
    for now in range(row.prompt):
        for head in row.heads:
            received[head][:, : now + 1] += row.weights(head, now, list(range(now + 1)))
    heavy = row.budget // 2

    def keep(head: int, among: list[int], tokens: int) -> list[int]:
        newest = [p for p in among if p >= tokens - (row.budget - heavy)]
        score = row.reduced(received[head])
        return sorted([*best({p: score[p] for p in among if p not in newest}, heavy), *newest])

    kept = [keep(head, list(range(row.prompt)), row.prompt) for head in row.heads]
    for now in row.steps:
        kept = [keep(head, [*kept[head], now], now + 1) for head in row.heads]
        yield kept
        for head in row.heads:
            received[head][:, kept[head]] += row.weights(head, now, kept[head])


def snapkv(window: int, keep_window: bool = True) -> Callable[[Row], Iterator[Sets]]:
    def run(row: Row) -> Iterator[Sets]:
        reach = row.config.pool_kernel // 2
        first = max(0, row.prompt - window) if keep_window else row.prompt
        rings = []
        for head in row.heads:
            votes = torch.zeros(row.text.group, row.prompt, dtype=torch.float64)
            for now in range(max(0, row.prompt - window), row.prompt):
                votes[:, : now + 1] += row.weights(head, now, list(range(now + 1)))
            score = row.reduced(votes)[:first]
            pooled = {p: max(score[max(0, p - reach) : p + reach + 1]) for p in range(first)}
            rings.append([*best(pooled, first), *range(first, row.prompt)][-row.budget :])
        for now in row.steps:
            rings = [[*ring, now][-row.budget :] for ring in rings]
            yield [sorted(ring) for ring in rings]

    return run


def tova(row: Row) -> Iterator[Sets]:
    def averaged(now: int, over: list[int]) -> dict[int, float]:
        weights = torch.cat([row.weights(head, now, over) for head in row.heads])
        return dict(zip(over, weights.mean(0).tolist(), strict=True))

    kept = best(averaged(row.prompt - 1, list(range(row.prompt))), row.budget)
    last = averaged(row.prompt - 1, list(range(row.prompt)))
    for now in row.steps:
        kept = sorted([*best({p: last[p] for p in kept}, row.budget - 1), now])
        yield [kept for _ in row.heads]
        last = averaged(now, kept)


def quest(row: Row) -> Iterator[Sets]:
    pages = -(-row.budget // 16)
    for now in row.steps:
        sets = []
        for head in row.heads:
            bounds: dict[int, float] = {}
            for page in range(now // 16 + 1):
                keys = row.text.keys[0, head, 16 * page : min(16 * page + 16, now + 1)].double()
                queries = row.text.queries[0, row.members(head), now].double()
                low, high = queries * keys.amin(0), queries * keys.amax(0)
                bounds[page] = max(torch.maximum(low, high).sum(-1).tolist())
            bounds[now // 16] = float("inf")
            chosen = best(bounds, pages)
            sets.append([p for p in range(now + 1) if p // 16 in chosen])
        yield sets


def token_select(row: Row) -> Iterator[Sets]:
    """The paper's 128 : 2048 : 512 of first, chosen and newest tokens, in lowest terms 1 : 16 : 4."""
    sinks, recent = row.budget // 21, max(1, 4 * row.budget // 21)
    last: Tensor | None = None
    chosen: list[int] = []
    for now in row.steps:
        query = row.text.queries[0, :, now].double().flatten()
        bound = row.config.threshold
        if (
            last is None
            or bound is None
            or float(query @ last / (query.norm() * last.norm())) < bound
        ):
            everything = list(range(now + 1))
            votes = sum(row.weights(head, now, everything).sum(0) for head in row.heads).tolist()
            between = range(sinks, now + 1 - recent)
            chosen = best({p: votes[p] for p in between}, row.budget - sinks - recent)
            last = query
        room = row.budget - sinks - len(chosen)
        newest = range(max(0, now + 1 - room), now + 1)
        kept = sorted({*range(min(sinks, now + 1)), *chosen, *newest})
        yield [kept for _ in row.heads]


def oracle(row: Row) -> Iterator[Sets]:
    for now in row.steps:
        everything = list(range(now + 1))
        yield [
            sorted(
                best(dict(enumerate(row.reduced(row.weights(head, now, everything)))), row.budget)
            )
            for head in row.heads
        ]


def with_rough_keys(row: Row, bits: int) -> Row:
    """The row with each key on a grid of its own."""
    keys = row.text.keys
    low, high = keys.amin(-1, keepdim=True), keys.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    rough = copy.copy(row)
    rough.text = replace(row.text, keys=low + ((keys - low) / step).round() * step)
    return rough


def twilight(row: Row) -> Iterator[Sets]:
    rough = with_rough_keys(row, 4)
    for now in row.steps:
        sets = []
        for head in row.heads:
            kept = {now}
            for weights in rough.weights(head, now, list(range(now + 1))):
                held = 0.0
                for position in weights.argsort(descending=True).tolist():
                    if held >= row.config.share * float(weights.sum()):
                        break
                    kept.add(position)
                    held += float(weights[position])
            sets.append(sorted(kept))
        yield sets


def rounded_keys(bits: int) -> Callable[[Row], Iterator[Sets]]:
    def run(row: Row) -> Iterator[Sets]:
        rough = with_rough_keys(row, bits)
        for now in row.steps:
            older = list(range(now))
            sets = []
            for head in row.heads:
                scores = rough.reduced(rough.weights(head, now, [*older, now]))[:-1]
                sets.append(
                    sorted([*best(dict(zip(older, scores, strict=True)), row.budget - 1), now])
                )
            yield sets

    return run


SLOW: dict[str, Callable[[Row], Iterator[Sets]]] = {
    "twilight": twilight,
    "streaming-llm": streaming_llm,
    "h2o": h2o,
    "snapkv": snapkv(32),
    "snapkv-1": snapkv(1, keep_window=False),
    "pyramidkv": snapkv(32),  # where there is one layer
    "tova": tova,
    "quest": quest,
    "token-select": token_select,
    "int4-keys": rounded_keys(4),
    "int2-keys": rounded_keys(2),
    "oracle-topk": oracle,
}


def ablation(row: Row, head: int, name: str) -> Iterator[list[int]]:
    """What one KV head attends to under "no-full-attention" or "no-reselection"."""
    config, reach = row.config, row.config.pool_kernel // 2
    assert config.stride is not None

    def select(now: int) -> list[int]:
        score = row.reduced(row.weights(head, now, list(range(now + 1))))
        pooled = {p: max(score[max(0, p - reach) : p + reach + 1]) for p in range(now + 1)}
        return best(pooled, row.budget)

    def summary(now: int) -> Tensor:
        return row.text.queries[0, :, now].mean(0)

    ring, reference, since = select(row.prompt - 1), summary(row.prompt - 1), 0
    for now in row.steps:
        since += 1
        full = since % config.stride == 0
        if full and config.threshold is not None:
            full = float(F.cosine_similarity(summary(now), reference, 0)) <= config.threshold
        if full and name == "no-full-attention":
            ring, reference, since = select(now), summary(now), 0
        else:
            ring = [*ring, now][-row.budget :]
        yield list(range(now + 1)) if full and name == "no-reselection" else sorted(ring)
