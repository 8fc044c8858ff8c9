"""Summaries: documents lose their middle where they are too long, and ROUGE-L is that of rouge-score."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from refreshkv import demo
from refreshkv.tasks import make_task, summarization
from refreshkv.tasks.summarization import HUB, LEFT_OUT

_TOKENIZER = demo.load()[1]


def tokens(text: str) -> int:
    return len(_TOKENIZER(text, add_special_tokens=False).input_ids)


def words(text: str) -> int:
    return len(text.split())


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_of(path: Path, *rows: object, **options):
    return make_task("summarization", data=write(path / "a.jsonl", *rows), **options)


DOCUMENT = " ".join(f"word{i}" for i in range(1000))


@pytest.mark.parametrize("count", [tokens, words])
def test_a_long_document_keeps_head_and_tail(tmp_path: Path, count) -> None:
    task = task_of(tmp_path, {"document": DOCUMENT, "summary": "s"}, length=500)
    (example,) = task.examples(count, 0, None)
    assert 480 <= count(example.prompt) <= 500
    body = example.prompt.split("\n\n")[1]
    head, tail = body.split(LEFT_OUT)
    assert DOCUMENT.startswith(head)
    assert DOCUMENT.endswith(tail)
    assert 0 <= words(head) - words(tail) <= 1
    assert [example] == list(task.examples(count, 7, 3))


def test_a_short_document_is_left_whole(tmp_path: Path) -> None:
    task = task_of(tmp_path, {"document": DOCUMENT, "summary": "s"})
    (example,) = task.examples(words, 0, None)
    assert DOCUMENT in example.prompt
    assert LEFT_OUT not in example.prompt
    assert example.prompt.endswith("Summary:\n")
    assert example.answer is None
    assert example.max_new_tokens == 512


def test_a_query_is_asked_at_the_end(tmp_path: Path) -> None:
    row = {"document": DOCUMENT, "summary": "s"}
    rows = ({**row, "query": "Who {spoke}?"}, {**row, "query": None}, {**row, "query": ""}, row)
    asked, *plain = task_of(tmp_path, *rows, length=300).examples(words, 0, None)
    assert asked.prompt.endswith("Question: Who {spoke}?\n\nAnswer:\n")
    assert words(asked.prompt) <= 300
    assert len({example.prompt for example in plain}) == 1
    assert "uestion" not in plain[0].prompt


def test_scores_are_those_of_rouge_score(tmp_path: Path) -> None:
    summary = "The committee approved the budgets and closed the meeting."
    task = task_of(tmp_path, {"document": DOCUMENT, "summary": summary})
    (example,) = task.examples(words, 0, None)
    assert task.score(example, summary).value == 1
    assert task.score(example, "").value == 0
    assert task.score(example, "nothing alike").value == 0
    # 3 of 9 words in order, all 3 of the output's; "budget" only by its stem.
    assert task.score(example, "committee budget meeting").value == pytest.approx(0.5)


def test_the_number_of_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"context": DOCUMENT, "answers": ["s"], "answer": ["s"], "question": "Who?", "input": ""}
    ]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter(rows * 120))
    for name, number in (("govreport", 700), ("qmsum", 100), ("novelsumm", 1000)):
        made = list(make_task("summarization", data=name, length=200).examples(words, 0, None))
        assert {example.max_new_tokens for example in made} == {number}
        assert len(made) == 100
        assert ("Question: Who?" in made[0].prompt) == (name == "qmsum")
        assert made[0].facts == {"summary": "s"}
    task = task_of(tmp_path, {"document": DOCUMENT, "summary": "s"}, max_new_tokens=7)
    assert next(task.examples(words, 0, 1)).max_new_tokens == 7


@pytest.mark.parametrize(
    "row, message",
    [
        ({"document": "d"}, r"line 2 of .*: the field 'summary' is missing .*'document'"),
        ({"summary": "s"}, r"line 2 .*'document' is missing"),
        ({"document": "", "summary": "s"}, r"line 2 .*'document' must be a text; got a blank"),
        ({"document": "d", "summary": ["s"]}, r"line 2 .*'summary' must be a text; got a list"),
        ({"document": "d", "summary": "s", "query": 3}, r"line 2 .*'query' .*a number"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, row: dict, message: str) -> None:
    task = task_of(tmp_path, {"document": "d", "summary": "s"}, row)
    assert len(list(task.examples(words, 0, 1))) == 1
    with pytest.raises(ValueError, match=message):
        list(task.examples(words, 0, None))


def test_bad_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no data; give .*JSONL.*govreport, qmsum, novelsumm"):
        next(make_task("summarization").examples(words, 0, 1))
    with pytest.raises(ValueError, match="length must be an integer >= 1; got None"):
        make_task("summarization", length=None)
    with pytest.raises(ValueError, match="max_new_tokens must be an integer >= 1; got 0"):
        make_task("summarization", max_new_tokens=0)
    with pytest.raises(ValueError, match="length of 10 tokens is too short"):
        list(task_of(tmp_path, {"document": "d", "summary": "s"}, length=10).examples(words, 0, 1))
    with pytest.raises(ValueError, match="did you mean 'qmsum'"):
        next(make_task("summarization", data="qmsumm").examples(words, 0, 1))

    def load_dataset(*args: object, **kwargs: object):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in HUB:
        with pytest.raises(ValueError, match=r"Couldn't reach the Hub\); give JSONL"):
            next(make_task("summarization", data=name).examples(words, 0, 1))


def test_a_missing_package_is_named_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(tmp_path, {"document": "d", "summary": "s"})
    summarization._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="needs the package rouge-score: pip install rouge-score"):
        next(task.examples(words, 0, 1))
