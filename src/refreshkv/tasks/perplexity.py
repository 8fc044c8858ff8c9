"""Perplexity: the last tokens of a long document, fed under the method (RefreshKV, Table 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from refreshkv.tasks.task import Count, Example, Score, Task, check_integers, fit
from refreshkv.tasks.texts import HubSet, cuts, documents

LOCAL = 'a folder of text files, a text file, or JSONL with "text"'


def _of_slimpajama(name: str) -> HubSet:
    def keep(row: Mapping[str, Any]) -> bool:
        return row["meta"]["redpajama_set_name"] == name

    return HubSet("DKYoon/SlimPajama-6B", split="train", keep=keep)


# RedPajama itself needs a loading script, which `datasets` no longer runs; SlimPajama is RedPajama without duplicates.
HUB: Mapping[str, HubSet] = MappingProxyType(
    {
        "arxiv": _of_slimpajama("RedPajamaArXiv"),
        "books": _of_slimpajama("RedPajamaBook"),
        "pg19": HubSet("emozilla/pg19"),
    }
)


@dataclass(frozen=True)
class Perplexity(Task):
    """Settings: `data` (see `recipe`), `length` tokens of context, the next `scored` tokens are fed and scored.

    The cut is made after a word, because a task sees texts and not tokens: context and scored text are never longer
    than asked for, and shorter by less than a word's tokens. Documents come in the order of the data; the seed changes
    nothing.
    """

    name = "perplexity"
    metric = "perplexity"
    kind = "perplexity"
    recipe = (
        "Data: --task-option perplexity.data=D, where D is a folder of text files, a text file (one document), JSONL"
        ' with "text", or, from the hub, arxiv, books (RedPajama as in DKYoon/SlimPajama-6B), pg19 (emozilla/pg19,'
        " test) or hub:owner/name[/split]. Documents too short are skipped; without a limit all of a local data set,"
        " 100 of one of the hub.\n"
        "Prompt: the first `length` tokens of a document, nothing else.\n"
        "Metric: mean negative log-likelihood of the `scored` tokens that follow, fed one by one under the method;"
        " a summary shows exp of the mean over documents. With the method full beside it also the ratio to its"
        " perplexity, the share of tokens in whose place both find the same token most probable, and KL(full || method)"
        " of the distributions of the next token.\n"
        "Source: RefreshKV (Xu, Goyal, Choi, ACL 2025), Table 1: 16K tokens of context, the last 256 scored."
    )
    length: int = 2048
    scored: int = 256
    data: str | None = None

    def __post_init__(self) -> None:
        check_integers(self, length=32, scored=32)

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`."""
        records, limit = documents(self.name, self.data, HUB, LOCAL, limit)
        seen = found = 0
        for record in records:
            if found == limit:
                return
            seen += 1
            text = record.text("text", blank=True)
            prompt, answer = split(text, count, self.length, self.scored)
            if answer:
                facts = {"source": record.where}
                yield Example(f"{found:04d}", prompt, count(answer), answer, facts)
                found += 1
        if not found:
            raise ValueError(
                f"{self.name}: none of the {seen} documents of {self.data} has {self.length} + {self.scored} tokens: "
                "lower length or scored, or give longer ones"
            )

    def score(self, example: Example, output: str) -> Score:
        """There is no score of a text: the value is the likelihood of the answer."""
        raise NotImplementedError("perplexity scores the answer that is fed, not an output")


def split(text: str, count: Count, length: int, scored: int) -> tuple[str, str]:
    """Context and scored text of a document; both empty where it is too short."""
    ends = cuts(text)
    start = fit(lambda n: text[: ends[n]], count, length, len(ends) - 1)
    rest = ends[start:]
    size = fit(lambda n: text[rest[0] : rest[n]], count, scored, len(rest) - 1)
    prompt, answer = text[: rest[0]], text[rest[0] : rest[size]]
    if rest[size] == ends[-1] and count(answer) < scored:
        return "", ""
    return prompt, answer
