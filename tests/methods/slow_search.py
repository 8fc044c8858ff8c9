"""The slow definitions of the methods that search among chunks, clusters or layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from tests.helpers import layer_below
from tests.slow import slow_weights

from .slow import Row, Sets, best


def kascade(row: Row) -> Iterator[Sets]:
    """The second of four layers: it attends to the top-K of the first."""
    first = copy.copy(row)
    first.text = layer_below(row.text)

    def best_of_first(head: int, now: int) -> list[int]:
        everything = list(range(now + 1))
        return best(
            dict(enumerate(first.reduced(first.weights(head, now, everything)))), row.budget
        )

    def votes(of: Row, head: int) -> Tensor:
        received = torch.zeros(row.prompt, dtype=torch.float64)
        for now in range(max(0, row.prompt - 32), row.prompt):
            received[: now + 1] += of.weights(head, now, list(range(now + 1))).mean(0)
        return received

    sets = [best(dict(enumerate(votes(first, h).tolist())), row.budget) for h in row.heads]
    follows = [max(row.heads, key=lambda f: votes(row, h)[sets[f]].sum()) for h in row.heads]
    for now in row.steps:
        yield [sorted(best_of_first(followed, now)) for followed in follows]


def squeezed(row: Row) -> Iterator[Sets]:
    """By scikit-learn's k-means, from the same starting points."""
    length = max(0, row.prompt - row.config.window)
    count = math.ceil(round(row.config.clusters * length, 9))
    everything = row.text.keys[0].double()
    labels, centres, sizes = [], [], []
    for keys in everything[:, :length] if count else []:
        points = F.normalize(keys, dim=-1)
        start = points[[i * length // count for i in range(count)]].numpy()
        found = KMeans(count, init=start, n_init=1, tol=0.0, max_iter=50).fit(points.numpy())
        labels.append(torch.as_tensor(found.labels_))
        members = [keys[labels[-1] == cluster] for cluster in range(count)]
        centres.append(torch.stack([some.mean(0) for some in members]))
        sizes.append(torch.tensor([len(some) for some in members], dtype=torch.float64))

    def weights(head: int, now: int) -> Tensor:
        """What a key at each centre gets of the query that is near it most, or of all in the mean."""
        members = row.members(head)
        shares = slow_weights(
            row.text.queries[0, members, now],
            centres[head].repeat_interleave(sizes[head].long(), 0),
            replace(row.options, sinks=None),
            members,
        )
        firsts = (sizes[head].cumsum(0) - sizes[head]).long()
        return torch.tensor(row.reduced(shares[:, firsts]))

    wanted = max(0, row.budget - row.config.window - 1)
    threshold = 0.0
    if wanted < length:
        looked = [(h, now) for h in row.heads for now in range(length, row.prompt)]
        pairs = [
            pair
            for h, now in looked
            for pair in zip(weights(h, now).tolist(), sizes[h].tolist(), strict=True)
        ]
        threshold, left = math.inf, wanted * len(looked)
        for weight, size in sorted(pairs, reverse=True):
            left -= int(size)
            if left < 0:
                break
            threshold = weight
    for now in row.steps:
        sets = []
        for head in row.heads:
            kept = list(range(length, now + 1))
            if count:
                near = weights(head, now) >= threshold
                kept += [p for p in range(length) if near[labels[head][p]]]
            sets.append(sorted(kept))
        yield sets


def hip(row: Row) -> Iterator[Sets]:
    sinks, recent = row.budget // 13, max(1, 4 * row.budget // 13)
    chosen = row.budget - sinks - recent
    stages = (
        (256, math.ceil(chosen * 16 / 256), 4),
        (32, math.ceil(chosen * 4 / 32), 2),
        (8, chosen // 8, 1),
    )
    left: list[list[set[int]]] = [[set()] * 3 for _ in row.heads]

    def go_on(score: list[float], among: set[int], size: int, wanted: int) -> set[int]:
        def value(position: int) -> float:
            return score[position] if position in among else -math.inf

        values = {}
        for start in range(sinks, len(score), size):
            low, width = start, size
            while width > 1:
                width //= 2
                if value(low + width + width // 2) > value(low + width // 2):
                    low += width
            if among & {*range(start, start + size)}:
                values[start] = max(value(low), -1.0)
        return {p for start in best(values, wanted) for p in range(start, start + size)} & among

    for age, now in enumerate(row.steps):
        sets = []
        for head in row.heads:
            between = among = {*range(sinks, now + 1 - recent)}
            score = row.reduced(row.weights(head, now, list(range(now + 1))))
            for stage, (size, wanted, intervals) in enumerate(stages):
                if age % (intervals * row.config.interval) == 0:
                    left[head][stage] = go_on(score, among & between, size, wanted)
                elif stage < 2:
                    left[head][stage] = left[head][stage] | {now}
                among = left[head][stage]
            kept = {*range(min(sinks, now + 1)), *among}
            others = [p for p in range(now + 1) if p not in kept]
            sets.append(
                sorted(kept | {*others[len(others) - min(len(others), row.budget - len(kept)) :]})
            )
        yield sets


def citrus(row: Row) -> Iterator[Sets]:
    size, first = row.config.chunk, max(0, row.prompt - row.config.window)
    chunks = [list(range(first))[at : at + size] for at in range(0, first, size)]
    kept = chunks.pop(0) if chunks else []
    score: dict[int, float] = {}
    for chunk in [*chunks, []]:
        score = dict.fromkeys(kept, 0.0)
        for now in range(first, row.prompt):
            over = [*kept, *range(first, now + 1)]
            weights = torch.cat([row.weights(head, now, over) for head in row.heads]).mean(0)
            for position, weight in zip(kept, weights.tolist(), strict=False):
                score[position] += weight
        kept = [*best(score, max(0, row.budget - row.config.window)), *chunk]
    ring = [*kept, *range(first, row.prompt)][-row.budget :]
    for now in row.steps:
        ring = [*ring, now][-row.budget :]
        yield [sorted(ring) for _ in row.heads]


def cascading(row: Row) -> Iterator[Sets]:
    sinks = min(row.config.sinks, row.budget // 4)
    count = row.config.sub_caches
    room = [
        (row.budget - sinks) // count + (i < (row.budget - sinks) % count) for i in range(count)
    ]
    caches: list[list[list[int]]] = [[[] for _ in range(count)] for _ in row.heads]
    average = [[0.0] * row.text.keys.shape[2] for _ in row.heads]

    def enter(now: int, head: int) -> None:
        arrives: int | None = now
        for i, (cache, size) in enumerate(zip(caches[head], room, strict=True)):
            if arrives is None or not size:
                return
            if now < row.budget or (now - sinks) % 2**i == 0:
                cache.append(arrives)
                arrives = cache.pop(0) if len(cache) > size else None
            else:
                if average[head][arrives] >= average[head][cache[-1]]:
                    cache[-1] = arrives
                return

    for now in range(row.text.keys.shape[2]):
        sets = []
        for head in row.heads:
            if now >= sinks:
                enter(now, head)
            kept = sorted(
                {*range(min(sinks, now + 1)), *(p for cache in caches[head] for p in cache)}
            )
            received = dict(zip(kept, row.reduced(row.weights(head, now, kept)), strict=True))
            decay = row.config.decay
            average[head] = [
                decay * a + (1 - decay) * received.get(p, 0) for p, a in enumerate(average[head])
            ]
            sets.append(kept)
        if now >= row.prompt:
            yield sets


SEARCHING: dict[str, Callable[[Row], Iterator[Sets]]] = {
    "kascade": kascade,
    "squeezed": squeezed,
    "hip": hip,
    "citrus": citrus,
    "cascading": cascading,
}
