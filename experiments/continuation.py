"""Do methods continue a text as full attention does, and what do they read for it? (ours)"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experiments.tables import markdown
from refreshkv.cli import loading
from refreshkv.evals.decoding import Output, generate
from refreshkv.evals.encoding import answer_tokens
from refreshkv.evals.grid import parse_methods
from refreshkv.evals.prefill import Prefills
from refreshkv.hosts.transformers import attach
from refreshkv.stats import RowStats
from refreshkv.tasks import make_task

BATCH = 8


def show(
    model: str,
    data: str,
    *,
    length: int = 1800,
    new_tokens: int = 128,
    limit: int = 24,
    methods: tuple[str, ...] = ("refreshkv",),
) -> None:
    """Continue the beginning of each text greedily, in float32, and print a row a method.

    There is no right answer; the yardstick is what full attention says.

    Args:
        model: a folder or hub id, or demo.
        data: as `perplexity.data` of `refreshkv eval`.
        length: tokens of a beginning.
        new_tokens: at most.
        limit: texts.
        methods: besides full attention.

    Raises:
        ValueError: an unknown method, a model that does not load, or data that cannot be read.
    """
    methods = ("full", *methods)
    specs = parse_methods(methods)
    loaded = loading.load(model, dtype="float32", device="cpu")
    task = make_task("perplexity", data=data, length=length, scored=max(32, new_tokens))
    examples = task.examples(lambda text: len(answer_tokens(loaded.tokenizer, text)), 0, limit)
    texts = [example.prompt for example in examples]
    found: dict[str, list[Output]] = {name: [] for name in methods}
    prefills = Prefills(loaded.model)
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        for spec in specs:
            stats, caps = RowStats(), [new_tokens] * len(part)
            with attach(loaded.model, method=spec.name, stats=stats, **spec.settings) as session:
                found[spec.text] += generate(
                    loaded.model, loaded.tokenizer, session, part, caps, prefills=prefills
                )
    print(table(found))


def table(found: dict[str, Sequence[Output]]) -> str:
    """Texts that are those of "full", mean and largest KV read in per cent, passes a token where drafted."""
    rows = []
    for name, outputs in found.items():
        same = sum(a.tokens == b.tokens for a, b in zip(outputs, found["full"], strict=True))
        reads = torch.tensor([100 * output.stats["kv_read_share"] for output in outputs])
        passes = [output.stats["passes_per_token"] for output in outputs]
        drafted = "1" if None in passes else f"{sum(passes) / len(passes):.2f}"
        read = (f"{reads.mean():.1f}", f"{reads.max():.1f}")
        rows.append((f"`{name}`", f"{same}/{len(outputs)}", *read, drafted))
    return markdown(("", "same text", "KV read", "worst", "passes"), rows)
