"""Do methods continue a text as full attention does, and what do they read for it? (ours)

`python -m experiments.continuation --model M --data FOLDER` continues the beginning of each text greedily, in
float32, and prints a row a method. There is no right answer; the yardstick is what full attention says.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refreshkv import demo, weights
from refreshkv.evals.decoding import Output, generate
from refreshkv.evals.encoding import answer_tokens
from refreshkv.evals.grid import parse_methods
from refreshkv.evals.prefill import Prefills
from refreshkv.hosts.transformers import attach
from refreshkv.stats import RowStats
from refreshkv.tasks import make_task
from refreshkv.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    new_tokens: int,
    methods: Sequence[str],
) -> dict[str, list[Output]]:
    """Method (`name[:setting=value ...]`) -> what it makes of each text, at most `new_tokens` tokens."""
    found: dict[str, list[Output]] = {name: [] for name in methods}
    prefills = Prefills(model)
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        for method in parse_methods(methods):
            stats = RowStats()
            with attach(model, method=method.name, stats=stats, **method.settings) as session:
                room = [new_tokens] * len(part)
                found[method.text] += generate(
                    model, tokenizer, session, part, room, prefills=prefills
                )
    return found


def table(found: dict[str, list[Output]]) -> str:
    """Markdown: texts that are those of "full", mean and largest KV read in per cent, passes a token where drafted."""
    lines = ["| | same text | KV read | worst | passes |", "|---|---:|---:|---:|---:|"]
    for name, outputs in found.items():
        same = sum(a.tokens == b.tokens for a, b in zip(outputs, found["full"], strict=True))
        reads = [100 * output.stats["kv_read_share"] for output in outputs]
        passes = [output.stats["passes_per_token"] for output in outputs]
        drafted = "1" if None in passes else f"{sum(passes) / len(passes):.2f}"
        mean = sum(reads) / len(reads)
        lines.append(
            f"| `{name}` | {same}/{len(outputs)} | {mean:.1f} | {max(reads):.1f} | {drafted} |"
        )
    return "\n".join(lines)


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name == "demo":
        return demo.load()
    with weights.reading(f"model {name!r}"):
        model = weights.load(AutoModelForCausalLM, name, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
        weights.check_tokens(tokenizer, model)
    return model.eval(), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder or hub id, or demo")
    parser.add_argument("--data", required=True, help="as `perplexity.data` of `refreshkv eval`")
    parser.add_argument("--length", type=int, default=1800, help="tokens of a beginning")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=24, help="texts")
    parser.add_argument(
        "--methods", nargs="+", default=["refreshkv"], help="besides full attention"
    )
    given = parser.parse_args(arguments)
    methods = ["full", *given.methods]
    try:
        parse_methods(methods)
        model, tokenizer = _load(given.model)
        task = make_task(
            "perplexity", data=given.data, length=given.length, scored=max(32, given.new_tokens)
        )
        examples = task.examples(lambda text: len(answer_tokens(tokenizer, text)), 0, given.limit)
        texts = [example.prompt for example in examples]
    except ValueError as error:
        parser.exit(2, f"error: {one_line(str(error))}\n")
    print(table(continuations(model, tokenizer, texts, given.new_tokens, methods)))


if __name__ == "__main__":
    main()
