"""What refreshing loses before and after a training: texts kept apart, commands that exist, shares that add up."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import continued, grids
from refreshkv.cli.train import command
from refreshkv.training.recipe import Recipe

STRIDE = "refreshkv-fixed:stride=25"


def run_directory(folder: Path, scores: dict[str, list[float]]) -> Path:
    """As `refreshkv eval` leaves it, with scores of texts by method."""
    folder.mkdir(parents=True)
    with (folder / "results.jsonl").open("w") as file:
        for method, values in scores.items():
            for at, score in enumerate(values):
                names = {"task": "perplexity", "method": method, "mode": "forced"}
                names["example"] = f"{at:04d}"
                record = {
                    **names,
                    "key": "|".join(names.values()),
                    "prompt_sha256": "",
                    "score": score,
                }
                file.write(json.dumps(record) + "\n")
    return folder


def test_no_text_is_both_trained_on_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    for number in range(20):
        (library / f"m{number}.py").write_text(f"# module {number}\n" * 900)
    (library / "short.py").write_text("# module short\n")
    (library / "test" / "t.py").write_text("# module of a test\n" * 900)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    continued.texts(tmp_path / "out")
    kinds = []
    for name in (continued.TRAINING, continued.HELD_OUT):
        lines = (tmp_path / "out" / name).read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        kinds.append({text.splitlines()[1] for text in texts})
        assert all(len(text) == continued.PIECE for text in texts) or name == continued.TRAINING
    training, held_out = kinds
    assert len(training) == 18 and len(held_out) == 2
    assert not training & held_out
    assert training | held_out == {f"# module {number}" for number in range(20)}


def test_every_recipe_is_one_of_the_command(tmp_path: Path) -> None:
    known = {option for parameter in command.params for option in parameter.opts}
    lengths = set()
    for options in continued.RECIPES.values():
        assert {f"--{name}" for name in {**options, **continued.COMMON}} <= known
        named = {name: options[name] for name in ("length", "tail", "keep")}
        recipe = Recipe(model="m", data="d", **named)  # type: ignore[arg-type]
        lengths.add(recipe.length + recipe.tail)
    assert len(lengths) == 1  # equally many tokens


def test_before_and_after_are_measured_on_the_same_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / continued.HELD_OUT).write_text("{}")
    trained, measured = [], []

    def evaluate(run: str, out: Path, processes: int, *, name: str, **options: Any) -> Path:
        measured.append({**options, "name": name})
        lost = 0.2 if name.startswith("before") else 0.1
        return run_directory(tmp_path / name, {"full": [1.0, 2.0], STRIDE: [1 + lost, 2 + lost]})

    monkeypatch.setattr(grids, "call", lambda line, where: trained.append(line))
    monkeypatch.setattr(grids, "evaluate", evaluate)
    continued.show("some-model", recipes=("segments",), out=tmp_path)
    assert [run["name"] for run in measured] == [
        *("before-512", "before-1024", "segments-512", "segments-1024")
    ]
    assert len({str(run["task_option"]) for run in measured}) == 1
    assert measured[2]["model"] == str(tmp_path / "segments" / "model")
    assert trained[0][trained[0].index("--model") + 1] == "some-model"
    printed = capsys.readouterr().out
    assert printed.count(f"| `{STRIDE}` |") == 2
    assert printed.count("50% [50%, 50%]") == 2
    with pytest.raises(ValueError, match="unknown recipe 'paperr'"):
        continued.show("some-model", recipes=("paperr",), out=tmp_path)


def test_the_share_by_which_a_loss_shrinks(tmp_path: Path) -> None:
    full, lost = np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.3, 0.2])
    before = run_directory(tmp_path / "b", {"full": list(full), STRIDE: list(full + lost)})
    better = full - 0.5
    now = run_directory(tmp_path / "a", {"full": list(better), STRIDE: list(better + lost / 4)})
    head, _, of_full, of_stride = continued.table({"before": before, "after": now}).splitlines()
    assert head.startswith("| 3 texts | before | after | loss, before | loss, after |")
    assert "-0.5000 nats [-0.5000, -0.5000]" in of_full
    assert "| +0.2000 | +0.0500, 75% [75%, 75%] |" in of_stride
    assert f"{np.exp(full.mean()):.3f} | {np.exp(better.mean()):.3f}" in of_full
