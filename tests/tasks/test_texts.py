"""What a user gives to read: every error names the place and the way out."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from refreshkv.tasks.texts import HubSet, cuts, read, read_folder, read_jsonl, read_text

LOCAL = "a folder of texts"


def jsonl(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, text in (("b.txt", "two"), ("a/z.md", "one"), (".c.txt", "no"), (".git/d.txt", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "image.png").write_bytes(b"\x89\xff")
    records = list(read(str(tmp_path), {}, LOCAL))
    assert [record.text("text") for record in records] == ["one", "two"]
    assert records[0].where == str(tmp_path / "a" / "z.md")


def test_text_files_lose_their_mark_and_their_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(path) == "one\ntwo\n"
    (record,) = read(str(path), {}, LOCAL)
    assert record.fields == {"text": "one\ntwo\n"}


def test_a_folder_without_texts_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"no text files in the folder .*\*\.txt, .*\*\.md"):
        read_folder(tmp_path)


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 \(byte 3\): convert it"):
        list(read_folder(tmp_path))


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "x"}', b"", b'{"a": "\xe2\x80\xa8y"}\r')
    records = list(read_jsonl(path))
    assert [record.text("a") for record in records] == ["x", "\u2028y"]
    assert [record.where for record in records] == [f"line {n} of {path}" for n in (1, 3)]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"a": 1,}', r"line 2 of .*a\.jsonl is not JSON \(.*column 9\): mend or drop it"),
        (b'{"a": "x"', r"line 2 .*not JSON"),
        (b"[1]", r"line 2 .*must be a JSON object; got a list"),
        (b"null", r"line 2 .*got null"),
        (b'"x"', r"line 2 .*got a text"),
        (b'{"a": "\xe9"}', r"line 2 .*not UTF-8 \(byte 7\)"),
        (b"[" * 200_000, r"line 2 .*cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"line 2 .*cannot be read as JSON"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", b'{"a": "x"}', line)
    records = read_jsonl(path)
    next(records)
    with pytest.raises(ValueError, match=message):
        next(records)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"b": 1, "c": 2}, r"line 1 of .*: the field 'a' is missing \(fields there: 'b', 'c'\)"),
        ({}, r"the field 'a' is missing \(fields there: none\)"),
        ({"a": 1}, r"line 1 of .*: 'a' must be a text; got a number"),
        ({"a": None}, r"got null"),
        ({"a": ["x"]}, r"got a list"),
        ({"a": {}}, r"got an object"),
        ({"a": True}, r"got true or false"),
        ({"a": " \n"}, r"got a blank text"),
        ({"a": "\ud800"}, r"'a' holds half a surrogate pair"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, row: dict, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", json.dumps(row).encode())
    (record,) = read_jsonl(path)
    with pytest.raises(ValueError, match=message):
        record.text("a")


def test_an_empty_file_and_one_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl is empty: write one JSON object a line"):
        list(read_jsonl(jsonl(tmp_path / "a.jsonl", b" ")))
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read: No such file"):
        list(read_jsonl(tmp_path / "b.jsonl"))
    (tmp_path / "c.txt").mkdir()
    with pytest.raises(ValueError, match=r"c\.txt cannot be read: Is a directory"):
        read_text(tmp_path / "c.txt")


def test_what_is_neither_path_nor_name_is_named() -> None:
    named = {"arxiv": HubSet("x/arxiv"), "books": HubSet("x/books")}
    with pytest.raises(ValueError, match=r"'arxvi'; did you mean 'arxiv'.* no file or folder"):
        read("arxvi", named, LOCAL)
    for data in ("nowhere/texts", "texts.jsonl", "x" * 5000 + "/a"):
        with pytest.raises(ValueError, match=r"no such file or folder: '.*; give a folder"):
            read(data, named, LOCAL)
    with pytest.raises(ValueError, match="no such file or folder: ''"):
        read("", {}, LOCAL)
    with pytest.raises(ValueError, match=r"hub:owner/name\[/split\]; got 'hub:name'"):
        read("hub:name", named, LOCAL)


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    Path("books/a.txt").write_text("mine")
    (record,) = read("books", {"books": HubSet("x/books")}, LOCAL)
    assert record.text("text") == "mine"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A stand-in for the hub: `rows` to give, `error` to raise, `calls` made."""
    state: dict = {"rows": [], "error": None, "calls": []}

    def load_dataset(*args: object, **kwargs: object):
        state["calls"].append((args, kwargs))
        if state["error"]:
            raise state["error"]
        return iter(state["rows"])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return state


def test_rows_of_the_hub_get_our_names(hub: dict) -> None:
    hub["rows"] = [{"c": "one", "s": ["first", "second"], "k": 1}, {"c": "two", "s": ["x"], "k": 0}]
    source = HubSet(
        "o/n", subset="sub", columns={"document": "c", "summary": "s"}, keep=lambda row: row["k"]
    )
    (record,) = read("name", {"name": source}, LOCAL)
    assert record.where == "row 0 of o/n"
    assert record.text("document") == "one"
    assert record.text("summary") == "first"
    assert hub["calls"] == [
        (("o/n", "sub"), {"data_files": None, "split": "test", "streaming": True})
    ]


def test_a_data_set_of_the_hub_can_be_given_by_its_id(hub: dict) -> None:
    hub["rows"] = [{"text": "one"}]
    assert [r.text("text") for r in read("hub:o/n", {}, LOCAL)] == ["one"]
    assert [r.text("text") for r in read("hub:o/n/validation", {}, LOCAL)] == ["one"]
    assert [kwargs["split"] for _, kwargs in hub["calls"]] == ["train", "validation"]


def test_a_hub_that_does_not_answer_names_the_local_way(hub: dict) -> None:
    hub["error"] = ConnectionError("Couldn't reach it\nsecond line")
    with pytest.raises(
        ValueError, match=r"o/n cannot .*\(Couldn't reach it second line\); give a folder"
    ):
        list(read("hub:o/n", {}, LOCAL))
    hub["error"] = RuntimeError()
    with pytest.raises(ValueError, match=r"\(RuntimeError\)"):
        list(read("hub:o/n", {}, LOCAL))


@pytest.mark.parametrize("text", ["", "one two  three\n", "x" * 100, "漢字" * 40, " " * 50 + "end"])
def test_cuts_cover_the_text_in_small_steps(text: str) -> None:
    places = cuts(text)
    assert places[0] == 0
    assert places[-1] == len(text)
    assert all(0 < b - a <= 32 for a, b in pairwise(places))


def test_cuts_stand_after_words() -> None:
    text = "one two,  three\nfour"
    assert [text[:i] for i in cuts(text)] == ["", "one", "one two,", "one two,  three", text]
