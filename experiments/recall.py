"""Of what a query attends to under full attention, the share that a method keeps (ours).

A step that does not read the full cache attends to some entries; what the true weights sum up to there is its recall.
Letters: B batch, Hkv KV heads, L tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.tables import markdown
from refreshkv import RefreshCache, Session, attach, demo
from refreshkv.cache.layer import LayerCache
from refreshkv.evals.decoding import feed
from refreshkv.evals.encoding import answer_tokens
from refreshkv.evals.grid import parse_method
from refreshkv.evals.prefill import Prefills
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods.kept import mask_of
from refreshkv.policy.selection import FREE, Selected
from refreshkv.stats import RowStats
from refreshkv.step import over_heads
from refreshkv.tasks import make_task
from refreshkv.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = ("chain-of-key", "html-to-tsv", "key-value")
# What the lossless mode drafts with, selected anew every ninth step; the preset `lse-drop` by its own trigger.
METHODS = (
    "refreshkv-fixed:budget=0.0625:stride=9:recent=16:successor=2:window=32:anchor=0.5",
    "refreshkv-lse-drop",
    "refreshkv-paper",
    "snapkv",
    "quest",
    "token-select",
    "int4-keys:budget=0.0625",
    "int2-keys:budget=0.0625",
    "oracle-topk:budget=0.0625",
    "oracle-topk",
)


class Watch:
    """Looks on while a method decodes.

    Attributes:
        layers: of each layer, a tensor `[B, Hkv]` a step: the share of the true attention mass in what the step
            attended to, NaN for a head that read the full cache.
    """

    def __init__(self, layers: int) -> None:
        self.layers: list[list[Tensor]] = [[] for _ in range(layers)]

    def saw(
        self,
        layer: int,
        cache: LayerCache,
        query: Tensor,
        options: AttendOptions,
        visible: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        """See `LayerCache.watch`; the mean over the query heads of a group counts."""
        everything = options.over(over_heads(visible), reduction="mean")
        weights, _ = cache.store.score(query, everything)
        share = weights.new_full(weights.shape[:2], float("nan"))
        if positions is not None:
            counts = (positions != FREE).sum(-1)
            mass = (weights * mask_of(Selected(positions, counts), cache.length)).sum(-1)
            share = mass.where(counts > 0, share)
        self.layers[layer].append(share)

    def of_rows(self, steps: Sequence[int]) -> Tensor:
        """All shares in the first `steps` decode steps of each row, `[n]`."""
        every = torch.stack([torch.stack(one) for one in self.layers], 1)  # [step, layer, B, Hkv]
        rows = torch.cat([every[:count, :, row].flatten() for row, count in enumerate(steps)])
        return rows[~rows.isnan()]


class Watched(Prefills):
    """Shared prefills whose caches are watched."""

    watch: Watch

    def cache_for(self, session: Session, tokens: Tensor, mask: Tensor) -> RefreshCache:
        """See `Prefills.cache_for`; a new cache where none can be shared."""
        cache = super().cache_for(session, tokens, mask) or session.new_cache()
        self.watch = Watch(len(cache.layers))
        for place, layer in enumerate(cache.layers):
            layer.inner.watch = functools.partial(self.watch.saw, place)
        return cache


@dataclass(frozen=True)
class Recall:
    """Of one method on one task: mean and 5th percentile of the shares, and the KV read share."""

    mean: float
    low: float
    read: float


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    examples: Sequence[Example],
    prefills: Watched,
) -> Recall:
    """Feed the answers of `examples` under the method `text` (`name[:setting=value ...]`)."""
    spec = parse_method(text)
    prompts, answers = [one.prompt for one in examples], [one.answer or "" for one in examples]
    with attach(model, method=spec.name, stats=RowStats(), **spec.settings) as session:
        fed = feed(model, tokenizer, session, prompts, answers, prefills=prefills)
    shares = prefills.watch.of_rows([one.output_tokens - 1 for one in fed])
    reads = [one.stats["kv_read_share"] for one in fed]
    return Recall(float(shares.mean()), float(shares.quantile(0.05)), sum(reads) / len(reads))


def show(
    *,
    tasks: tuple[str, ...] = TASKS,
    methods: tuple[str, ...] = METHODS,
    length: int = 2048,
    limit: int = 8,
    seed: int = 0,
) -> None:
    """Feed right answers to the bundled model, and print a row a method.

    Args:
        tasks: with right answers.
        methods: as for `refreshkv eval`.
        length: tokens of a prompt.
        limit: prompts a task.
        seed: of the prompts.

    Raises:
        ValueError: an unknown task or method.
    """
    model, tokenizer = demo.load()
    prefills = Watched(model)
    found: dict[str, dict[str, Recall]] = {}
    for name in tasks:
        task = make_task(name, length=length)
        examples = list(task.examples(lambda t: len(answer_tokens(tokenizer, t)), seed, limit))
        found[name] = {
            text: measure(model, tokenizer, text, examples, prefills) for text in methods
        }
    print(table(found))


def table(found: Mapping[str, Mapping[str, Recall]]) -> str:
    """Of task -> method -> `Recall` a row a method, in per cent; of each task mean, 5th percentile, KV read."""
    rows = []
    for text in next(iter(found.values())):
        own = [of[text] for of in found.values()]
        cells = [f"{100 * c.mean:.1f}, {100 * c.low:.1f}, {100 * c.read:.1f}" for c in own]
        rows.append([f"`{text}`", *cells])
    return markdown(["", *(f"{task}: mean, 5th percentile, KV read" for task in found)], rows)
