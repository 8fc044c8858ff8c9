"""Natural text under any model: runs that go on, and their tables."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments import __main__ as runner
from experiments import documents, real
from refreshkv import demo
from refreshkv.cli.eval import command
from refreshkv.demo.prompts import make_prompt
from refreshkv.evals.encoding import answer_tokens


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Two texts that the bundled model knows how to go on with, and the tokens of the shorter beginning."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed in range(2):
        prompt = make_prompt("key-value", seed=seed, length=300).prompt
        (folder / f"{seed}.txt").write_text(prompt + " filler" * 90, encoding="utf-8")
    return str(folder)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made in this process, which is faster."""

    def run(line: list[str], **_: Any) -> None:
        done = CliRunner().invoke(command, line[line.index("eval") + 1 :], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture
def length(data: str) -> int:
    tokenizer = demo.load()[1]
    texts = [path.read_text("utf-8") for path in Path(data).iterdir()]
    return min(len(answer_tokens(tokenizer, text[: text.index(" filler")])) for text in texts)


def rows(printed: str) -> list[list[str]]:
    """Cells of the Markdown table."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip(" |`") for cell in line.split(" | ")] for line in lines]


def test_the_lossless_mode_continues_as_full_attention_and_eviction_does_not(
    here: None, data: str, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that is added later is compared with what is there, and nothing is run twice."""
    given = ["continuation", "--model", "demo", "--data", data, "--length", str(length)]
    given += ["--new-tokens", "32", "--processes", "1", "--out", str(tmp_path)]
    runner.main([*given, "--methods", "full", "refreshkv"])
    name = f"demo-{length}-continued"
    results = tmp_path / name / "results.jsonl"
    before = results.read_text()
    capsys.readouterr()
    runner.main([*given, "--methods", "full", "refreshkv", "tova:budget=4"])
    assert results.read_text().startswith(before)
    printed = capsys.readouterr().out
    assert f"### {name}" in printed
    head, full, exact, evicted = rows(printed)
    assert head == ["", "same text", "KV read", "worst", "passes"]
    assert full == ["full", "2/2", "100.0", "100.0", "1"]
    assert exact[:2] == ["refreshkv", "2/2"] and evicted[:2] == ["tova:budget=4", "0/2"]
    assert float(exact[3]) >= float(exact[2]) > 5 and float(exact[4]) >= 1
    assert json.loads(before.splitlines()[0])["dtype"] == "float32"


def test_perplexity_stands_beside_full_attention(
    here: None, data: str, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["perplexity", "--model", "demo", "--data", data, "--length", str(length)]
    given += ["--scored", "40", "--processes", "1", "--out", str(tmp_path), "--batch", "2"]
    runner.main([*given, "--methods", "full", "snapkv:budget=8"])
    head, full, evicted = rows(capsys.readouterr().out)
    assert head[0] == "2 documents" and head[4:] == ["agreement", "KL", "KV read"]
    assert full[2:] == ["1.0000", "1.0000-1.0000", "100.0", "0.0000", "100.0"]
    assert float(evicted[2]) != 1 and float(evicted[4]) < 100 and float(evicted[5]) > 0


def test_both_tables_of_every_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts are made once; a run that fails ends with a line that names it."""
    lines: list[list[str]] = []
    made: list[Path] = []

    def show(out: Path) -> None:
        out.mkdir()
        (out / documents.MANIFEST).touch()
        made.append(out)

    monkeypatch.setattr(documents, "show", show)
    monkeypatch.setattr(subprocess, "run", lambda line, **_: lines.append(line))
    monkeypatch.setattr(real.tables, "show", lambda runs: print(*runs))
    runner.main(["fidelity-real", "--models", "some/one", "two", "--out", str(tmp_path)])
    names = ("one-3584-text", "one-2048-continued", "two-3584-text", "two-2048-continued")
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert made == [tmp_path / "documents"]
    for line, task in zip(lines, ("perplexity", "continuation") * 2, strict=True):
        options = [line[i + 1] for i, part in enumerate(line) if part == "--task-option"]
        scored = {"perplexity": 512, "continuation": 96}[task]
        assert options == [f"{task}.scored={scored}", f"{task}.data={tmp_path / 'documents'}"]

    def fail(line: Any, **_: Any) -> None:
        raise subprocess.CalledProcessError(2, line)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit, match="2"):
        runner.main(["perplexity", "--model", "one", "--out", str(tmp_path)])
    said = f"error: the run {tmp_path}/one-3584-text ended with exit code 2; its reason stands"
    assert capsys.readouterr().err.startswith(said)
