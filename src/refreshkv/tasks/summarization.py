"""Summaries of long documents, scored by ROUGE-L (RefreshKV, Tables 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any

from refreshkv.tasks.task import Count, Example, Score, Task, check_integers, fit
from refreshkv.tasks.texts import HubSet, cuts, documents, is_local

LOCAL = 'JSONL with "document", "summary" and, where a question is asked, "query"'
INTRO = "Read this document. A summary of it is asked for at the end.\n\n"
QUERY_INTRO = "Read this document. A question about it is asked at the end.\n\n"
ASK = "\n\nWrite a summary of the document that says all that matters in it, and nothing else.\n\nSummary:\n"
QUERY_ASK = (
    "\n\nAnswer from the document alone, in a few sentences.\nQuestion: {query}\n\nAnswer:\n"
)
LEFT_OUT = "\n[...]\n"
_NEW_TOKENS = 512

_LONGBENCH = {"document": "context", "summary": "answers"}
HUB: Mapping[str, HubSet] = MappingProxyType(
    {
        "govreport": HubSet("Xnhyacinth/LongBench", subset="gov_report", columns=_LONGBENCH),
        "qmsum": HubSet(
            "Xnhyacinth/LongBench", subset="qmsum", columns={**_LONGBENCH, "query": "question"}
        ),
        "novelsumm": HubSet(
            "xinrongzhang2022/InfiniteBench",
            file="longbook_sum_eng.jsonl",
            columns={"document": "context", "summary": "answer"},
        ),
    }
)
_PAPER_TOKENS = {"govreport": 700, "qmsum": 100, "novelsumm": 1000}  # RefreshKV's "out" column


@dataclass(frozen=True)
class Summarization(Task):
    """Settings: `data` (see `recipe`), `length` of the prompt in tokens, `max_new_tokens` (`None`: the paper's).

    A document that is too long loses its middle, as is usual: half of what fits is its head, half its tail, and
    `[...]` stands between them.
    """

    name = "summarization"
    metric = "ROUGE-L"
    recipe = (
        f"Data: --task-option summarization.data=D, where D is {LOCAL}; or, from the hub, govreport, qmsum"
        " (Xnhyacinth/LongBench), novelsumm (xinrongzhang2022/InfiniteBench) or hub:owner/name[/split] with the same"
        " fields. Without a limit all of a local file, 100 of the hub's.\n"
        "Prompt: the document, its middle cut out where it exceeds `length`, then the request or the question.\n"
        "Metric: F1 of ROUGE-L by the package rouge-score, with stemming, between 0 and 1; it sees Latin letters and"
        " digits only.\n"
        "Source: RefreshKV (Xu, Goyal, Choi, ACL 2025), Tables 1 and 2: GovReport and QMSum at 10K tokens with 700 and"
        " 100 new ones, NovelSumm (InfiniteBench) at 100K with 1000. The wording of the prompt is ours."
    )
    length: int = 10_000
    data: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        least = {"length": 1} if self.max_new_tokens is None else {"length": 1, "max_new_tokens": 1}
        check_integers(self, **least)

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`. Documents come in the order of the data; the seed changes nothing."""
        records, limit = documents(self.name, self.data, HUB, LOCAL, limit)
        _scorer()  # rather now than after an hour of generation
        new = self.max_new_tokens
        if new is None:
            assert self.data is not None
            paper = None if is_local(self.data) else _PAPER_TOKENS.get(self.data)
            new = paper or _NEW_TOKENS
        for index, record in enumerate(islice(records, limit)):
            document, summary = record.text("document"), record.text("summary")
            asked = record.fields.get("query") is not None
            query = record.text("query", blank=True) if asked else ""
            prompt = self._prompt(document, query, count)
            yield Example(f"{index:04d}", prompt, new, facts={"summary": summary})

    def _prompt(self, document: str, query: str, count: Count) -> str:
        head = QUERY_INTRO if query.strip() else INTRO
        tail = QUERY_ASK.format(query=query) if query.strip() else ASK
        ends = cuts(document)
        last = len(ends) - 1

        def build(size: int) -> str:
            if size == last:
                return head + document + tail
            first, second = document[: ends[(size + 1) // 2]], document[ends[last - size // 2] :]
            return head + first + LEFT_OUT + second + tail

        return build(fit(build, count, self.length, last))

    def score(self, example: Example, output: str) -> Score:
        """F1 of ROUGE-L against the summary."""
        return Score(float(_scorer().score(example.facts["summary"], output)["rougeL"].fmeasure))


@lru_cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ValueError(
            "summarization needs the package rouge-score: pip install rouge-score"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)
