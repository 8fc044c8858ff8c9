"""Of what a query attends to under full attention, the share that a method keeps (ours).

`python -m experiments.recall` feeds right answers to the bundled model. A step that does not read the full cache
attends to some entries; what the true weights sum up to there is its recall. A row of the printed table is a method.
Letters: B batch, Hkv KV heads, L tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refreshkv import demo
from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.evals.decoding import feed
from refreshkv.evals.encoding import answer_tokens
from refreshkv.evals.grid import parse_methods
from refreshkv.evals.prefill import Prefills
from refreshkv.hosts.transformers.attach import Session
from refreshkv.methods import Method, find
from refreshkv.methods.kept import KeptEntries, mask_of
from refreshkv.policy.selection import FREE, Selection
from refreshkv.stats import RowStats
from refreshkv.step import Algorithm, Attention, over_heads
from refreshkv.tasks import make_task
from refreshkv.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = ("chain-of-key", "html-to-tsv", "key-value")
# What the lossless mode drafts with, selected anew every ninth step; the preset `fast` by its own trigger.
METHODS = (
    "refreshkv-fixed:budget=0.0625:stride=9:recent=16:successor=2:window=32:anchor=0.5",
    "refreshkv-fast",
    "refreshkv-paper",
    "snapkv",
    "quest",
    "token-select",
    "int4-keys:budget=0.0625",
    "int2-keys:budget=0.0625",
    "oracle-topk:budget=0.0625",
    "oracle-topk",
)


@dataclass
class Watch:
    """Looks on while a method decodes.

    Attributes:
        layers: of each layer, a tensor `[B, Hkv]` a step: the share of the true attention mass in what the step
            attended to, NaN for a head that read the full cache.
    """

    layers: list[list[Tensor]] = field(default_factory=list)

    def method(self, watched: Method) -> Method:
        """The same method, watched."""

        def make(config: RefreshConfig, layer: int, layers: int) -> Algorithm:
            algorithm = Algorithm() if watched.make is None else watched.make(config, layer, layers)
            self.layers[layer:] = [[] for _ in range(layers - layer)]
            step = algorithm.step

            def watched_step(
                cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
            ) -> Tensor:
                seen = _Attended(cache, algorithm)
                try:
                    output = step(cache, query, attention, visible)
                finally:
                    seen.close()
                self.layers[layer].append(seen.recall(query, attention, visible))
                return output

            # On the instance, so that the class still tells whether a prompt can be shared.
            algorithm.step = watched_step  # type: ignore[method-assign]
            return algorithm

        return replace(watched, make=make)

    def of_rows(self, steps: Sequence[int]) -> Tensor:
        """All shares in the first `steps` decode steps of each row, `[n]`."""
        every = torch.stack(
            [torch.stack(layer) for layer in self.layers], 1
        )  # [step, layer, B, Hkv]
        rows = torch.cat([every[:count, :, row].flatten() for row, count in enumerate(steps)])
        return rows[~rows.isnan()]


class _Attended:
    """The entries that one step of one layer attends to, from where the algorithm learns them itself."""

    def __init__(self, cache: LayerCache, algorithm: Algorithm) -> None:
        self.cache, self.algorithm = cache, algorithm
        self.mask: Tensor | None = None  # [B, Hkv, L]
        if isinstance(algorithm, KeptEntries):
            self.choose = algorithm.choose
            algorithm.choose = self._chosen  # type: ignore[method-assign]
        else:
            self.push = cache.push_newest
            cache.push_newest = self._pushed  # type: ignore[method-assign]

    def close(self) -> None:
        """Undo the watching."""
        if isinstance(self.algorithm, KeptEntries):
            del self.algorithm.choose  # type: ignore[attr-defined]
        else:
            del self.cache.push_newest  # type: ignore[attr-defined]

    def recall(self, query: Tensor, attention: Attention, visible: Tensor | None) -> Tensor:
        """`[B, Hkv]`, mean over the query heads of a group."""
        cache = self.cache
        weights, _ = cache.backend.score(
            query,
            cache.store.keys,
            **attention.options(over_heads(visible)),
            reduction="mean",
        )
        if self.mask is None:
            return weights.new_full(weights.shape[:2], float("nan"))
        share = (weights * self.mask).sum(-1)
        if cache.partial is None:
            return share
        return share.masked_fill(cache.partial.steps == 0, float("nan"))

    def _chosen(self, *args: Tensor) -> Tensor:
        self.mask = self.choose(*args)  # type: ignore[arg-type]
        return self.mask

    def _pushed(self) -> None:
        self.push()
        assert self.cache.partial is not None
        positions = self.cache.partial.positions
        self.mask = mask_of(Selection(positions, (positions != FREE).sum(-1)), self.cache.length)


@dataclass(frozen=True)
class Recall:
    """Of one method on one task: mean and 5th percentile of the shares, and the KV read share."""

    mean: float
    low: float
    read: float


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: str,
    examples: Sequence[Example],
    prefills: Prefills,
) -> Recall:
    """Feed the answers of `examples` under the method `spec` (`name[:setting=value ...]`)."""
    (parsed,) = parse_methods([spec])
    method, watch = find(parsed.name), Watch()
    session = Session(model, parsed.config(None), method=watch.method(method), stats=RowStats())
    prompts, answers = [one.prompt for one in examples], [one.answer or "" for one in examples]
    with session:
        fed = feed(model, tokenizer, session, prompts, answers, prefills=prefills)
    shares = watch.of_rows([len(answer_tokens(tokenizer, answer)) - 1 for answer in answers])
    reads = [one.stats["kv_read_share"] for one in fed]
    return Recall(float(shares.mean()), float(shares.quantile(0.05)), sum(reads) / len(reads))


def table(found: Mapping[str, Mapping[str, Recall]]) -> str:
    """Markdown of task -> method -> `Recall`: a row a method, per cent; of each task mean, 5th percentile, KV read."""
    tasks, columns = list(found), "mean, 5th percentile, KV read"
    lines = [
        "| | " + " | ".join(f"{task}: {columns}" for task in tasks) + " |",
        "|---|" + "---:|" * len(tasks),
    ]
    for spec in next(iter(found.values())):
        cells = [found[task][spec] for task in tasks]
        shown = [f"{100 * c.mean:.1f}, {100 * c.low:.1f}, {100 * c.read:.1f}" for c in cells]
        lines.append(f"| `{spec}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="as for `refreshkv eval`")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--limit", type=int, default=8, help="prompts a task")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    model, tokenizer = demo.load()
    prefills, found = Prefills(model), {}
    for name in given.tasks:
        task = make_task(name, length=given.length)
        examples = list(
            task.examples(lambda text: len(answer_tokens(tokenizer, text)), given.seed, given.limit)
        )
        found[name] = {
            spec: measure(model, tokenizer, spec, examples, prefills) for spec in given.methods
        }
    print(table(found))


if __name__ == "__main__":
    main()
