"""The anchor layers with which Kascade loses least on some texts, for `kascade:anchors=...`.

Source: Deshmukh et al., "Kascade", arXiv 2512.16391: dynamic programming over the similarity of layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import real
from refreshkv import attach
from refreshkv.cli.loading import load
from refreshkv.methods.kept import Look
from refreshkv.tasks import make_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES = 32  # of each text, its last ones
BUDGET = 0.125


def show(
    model: str,
    *,
    data: str | None = None,
    count: int = 5,
    length: int = 1024,
    limit: int = 6,
    out: Path = Path("out"),
) -> None:
    """Print the anchor layers, and of the weight that a layer's own top-K has, the share that theirs keeps.

    Args:
        model: a folder, a hub id or a name.
        data: a folder of texts; where not given those of `documents`.
        count: of anchor layers, the first among them.
        length: tokens of a text.
        limit: texts.
        out: where the texts are.

    Raises:
        ValueError: no such model, no texts, or more anchor layers than layers.
    """
    try:
        loaded = load(model, dtype="float32", device="cpu")
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    task = make_task("perplexity", length=length, data=data or str(real.texts(out)))
    tokenize = loaded.tokenizer
    texts = [one.prompt for one in task.examples(lambda t: len(tokenize(t).input_ids), 0, limit)]
    alike = [similarity(loaded.model, tokenize(t, return_tensors="pt").input_ids) for t in texts]
    mean = torch.stack(alike).mean(0)
    layers = len(mean)
    even = [layers * i // count for i in range(count)]
    for says, anchors in ((f"best {count}", best(mean, count)), ("equal distances", even)):
        print(f"{says}: anchors={'-'.join(map(str, anchors[1:]))}, kept {kept(mean, anchors):.1%}")


@torch.no_grad()
def similarity(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """`[layers, layers]`: of the weight in a layer's top-K, that which an earlier layer's top-K has; 0 for a later one.

    Each KV head follows the head of the earlier layer that is best for it. `ids` `[1, L]`.
    """
    with attach(model, mode="refresh", window=QUERIES, budget=BUDGET) as session:
        cache = session.new_cache()
        with cache.prompt():
            model(ids, past_key_values=cache)
    weights, sets = [], []
    for layer in cache.layers:
        inner = layer.inner
        inner.resolve_budget(None, inner.prompt)
        of_layer = []
        for back in range(inner.queries.shape[2]):
            end = inner.length - back
            query = inner.queries[:, :, -1 - back]
            look = Look(inner, query, layer._options, None, end)
            scores = look.scores("mean")
            both = torch.stack([scores, look.best(scores).to(scores.dtype)])
            of_layer.append(F.pad(both[:, 0], (0, back)))
        found = torch.stack(of_layer, 1)  # [2, queries, Hkv, L]
        weights.append(found[0])
        sets.append(found[1])
    alike = torch.zeros(len(sets), len(sets))
    for later, weight in enumerate(weights):
        own = (weight * sets[later]).sum((0, 2))
        for earlier in range(later + 1):
            shared = torch.einsum("qhl,qgl->hg", weight, sets[earlier])
            alike[earlier, later] = (shared.amax(1) / own).mean()
    return alike


def best(alike: Tensor, count: int) -> list[int]:
    """The `count` anchor layers, the first among them, that keep most over all layers.

    Raises:
        ValueError: there are fewer layers.
    """
    layers = len(alike)
    if not 1 <= count <= layers:
        raise ValueError(f"--count must be from 1 to the {layers} layers of the model; got {count}")
    # Of the first layers, how much so many anchors keep, and which.
    ends: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(count):
        more: dict[int, tuple[float, list[int]]] = {}
        for begin, (total, anchors) in ends.items():
            for end in range(begin + 1, layers + 1):
                found = total + float(alike[begin, begin:end].sum())
                if end not in more or found > more[end][0]:
                    more[end] = found, [*anchors, begin]
        ends = more
    return ends[layers][1]


def kept(alike: Tensor, anchors: list[int]) -> float:
    """What each layer keeps of its own top-K's weight, in the mean over layers."""
    spans = zip(anchors, [*anchors[1:], len(alike)], strict=True)
    return float(torch.cat([alike[begin, begin:end] for begin, end in spans]).mean())
