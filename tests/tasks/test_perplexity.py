"""Perplexity: documents are cut into context and scored text, and those too short are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refreshkv import demo
from refreshkv.tasks import make_task
from refreshkv.tasks.perplexity import HUB, split

_TOKENIZER = demo.load()[1]


def tokens(text: str) -> int:
    return len(_TOKENIZER(text, add_special_tokens=False).input_ids)


def words(text: str) -> int:
    return len(text.split())


def prose(size: int) -> str:
    return " ".join(f"word{i}" + ("." if i % 7 == 0 else "") for i in range(size))


@pytest.mark.parametrize("text", [prose(3000), "漢字仮名" * 4000, "a\n\nb  c\t" * 4000])
@pytest.mark.parametrize("count", [tokens, len])
def test_context_and_scored_text_have_the_tokens_asked_for(count, text: str) -> None:
    prompt, answer = split(text, count, 1000, 200)
    assert text.startswith(prompt + answer)
    # A word of these texts has 9 characters at most; a piece of a text without blanks 16, of 3 bytes each.
    slack = {len: 16, tokens: 48}[count]
    assert 1000 - slack <= count(prompt) <= 1000
    assert 200 - slack <= count(answer) <= 200


def test_the_cut_stands_between_words() -> None:
    prompt, answer = split(prose(500), tokens, 300, 100)
    assert not prompt[-1].isspace()
    assert answer.startswith(" word")


def test_examples_are_the_documents_that_are_long_enough(tmp_path: Path) -> None:
    for name, size in (("a", 50), ("b", 400), ("c", 0), ("d", 132), ("e", 131)):
        (tmp_path / f"{name}.txt").write_text(prose(size))
    task = make_task("perplexity", data=str(tmp_path), length=100, scored=32)
    made = list(task.examples(words, 0, None))
    assert [Path(example.facts["source"]).name for example in made] == ["b.txt", "d.txt"]
    assert [example.id for example in made] == ["0000", "0001"]
    for example in made:
        assert (words(example.prompt), words(example.answer)) == (100, 32)
        assert example.max_new_tokens == 32
        assert prose(400).startswith(example.prompt + example.answer)
    assert made == list(task.examples(words, 5, None))
    assert made[:1] == list(task.examples(words, 0, 1))
    assert list(task.examples(words, 0, 0)) == []


def test_a_file_and_jsonl_are_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(200))
    rows = [{"text": prose(200), "id": 1}, {"text": ""}, {"text": prose(300)}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, number in (("a.txt", 1), ("a.jsonl", 2)):
        task = make_task("perplexity", data=str(tmp_path / name), length=100, scored=40)
        assert len(list(task.examples(words, 0, None))) == number


def test_no_document_long_enough_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(2000))
    task = make_task("perplexity", data=str(tmp_path))
    with pytest.raises(ValueError, match=r"none of the 1 documents of .* has 2048 \+ 256 tokens"):
        list(task.examples(words, 0, None))


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data; give perplexity\.data: .*arxiv, books, pg19"):
        next(make_task("perplexity").examples(words, 0, 1))
    with pytest.raises(ValueError, match="length must be an integer >= 32; got 0"):
        make_task("perplexity", length=0)
    with pytest.raises(ValueError, match=r"scored must be an integer >= 32; got 1\.5"):
        make_task("perplexity", scored=1.5)
    with pytest.raises(ValueError, match="did you mean 'pg19'"):
        next(make_task("perplexity", data="pg20").examples(words, 0, 1))
    (tmp_path / "a.jsonl").write_text('{"txt": "x"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*'text' is missing \(fields there: 'txt'\)"):
        next(make_task("perplexity", data=str(tmp_path / "a.jsonl")).examples(words, 0, 1))


def test_a_hub_out_of_reach_names_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in HUB:
        with pytest.raises(ValueError, match=r"Couldn't reach the Hub\); give a folder of text"):
            next(make_task("perplexity", data=name).examples(words, 0, 1))


def test_only_the_wanted_part_of_redpajama_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"text": prose(200), "meta": {"redpajama_set_name": name}}
        for name in ["RedPajamaC4", "RedPajamaArXiv", *["RedPajamaBook"] * 150]
    ]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter(rows))
    for name, number in (("arxiv", 1), ("books", 100)):
        task = make_task("perplexity", data=name, length=100, scored=32)
        assert len(list(task.examples(words, 0, None))) == number


def test_an_output_has_no_perplexity(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(200))
    task = make_task("perplexity", data=str(tmp_path), length=100, scored=32)
    assert task.kind == "perplexity"
    with pytest.raises(NotImplementedError):
        task.score(next(task.examples(words, 0, 1)), "text")
