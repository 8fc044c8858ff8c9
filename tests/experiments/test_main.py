"""The runner of experiments: its options, its grids, its errors."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments import __main__ as runner
from experiments import grids
from refreshkv.cli.eval import command
from refreshkv.evals.grid import parse_methods
from refreshkv.tasks import expand


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that would have been run."""
    found: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda line, **_: found.append(line))
    return found


@pytest.mark.parametrize("name", grids.RUNS)
def test_a_run_is_options_of_eval(name: str, launched: list[list[str]], tmp_path: Path) -> None:
    grids.evaluate(name, tmp_path, 2, limit=1)
    (line,) = launched
    given = line[line.index("eval") + 1 :]
    options = dict(zip(given[::2], given[1::2], strict=True))
    assert options["--out"] == str(tmp_path / name)
    assert options["--limit"] == "1"
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(options) <= known
    assert expand(options["--tasks"].split(","))
    methods = options["--methods"].split(",")
    assert len(parse_methods(methods)) == len(set(methods)) == len(methods)
    # All is accepted as far as it can be without the model: what is missing is the last option.
    del options["--model"]
    result = CliRunner().invoke(command, [part for pair in options.items() for part in pair])
    assert result.exit_code == 2 and "Missing option '--model'" in result.stderr


def test_a_report_is_two_runs_of_as_many_prompts(launched: list[list[str]], tmp_path: Path) -> None:
    runner.main(["report", "--limit", "3", "--out", str(tmp_path)])
    assert [line[line.index("--limit") + 1] for line in launched] == ["3", "3"]
    assert {line[line.index("--nproc_per_node") + 1] for line in launched} == {"2"}


@pytest.mark.parametrize("name", runner.EXPERIMENTS)
def test_every_option_is_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        runner.main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    function = runner.EXPERIMENTS[name]
    for parameter in inspect.signature(function).parameters:
        says = re.search(rf"^ +{parameter}: (.*)$", inspect.getdoc(function) or "", re.MULTILINE)
        assert says and says[1] in shown


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["recall", "--tasks", "key-valu"], "unknown task 'key-valu'; did you mean 'key-value'"),
        (["tables", "--runs", "nowhere"], "cannot read nowhere/results.jsonl"),
        (["train", "--out", "x", "--recipe", "smok"], "did you mean 'smoke'"),
        (["recall", "--methods", "snap"], "unknown method 'snap'"),
        (["perplexity", "--methods", "full"], "required: --model"),
        (["report", "--limit", "few"], "invalid int value"),
    ],
)
def test_bad_input_is_one_line(
    line: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        runner.main(line)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error
