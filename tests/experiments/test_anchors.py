"""The search for anchor layers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from experiments import __main__ as runner
from experiments import anchors
from refreshkv import demo


@pytest.mark.parametrize("count", range(1, 8))
def test_no_other_anchor_layers_keep_more(count: int) -> None:
    gen = torch.Generator().manual_seed(count)
    alike = torch.rand(7, 7, generator=gen).triu()
    every = ([0, *others] for others in itertools.combinations(range(1, 7), count - 1))
    assert anchors.best(alike, count) == max(every, key=lambda one: anchors.kept(alike, one))


def test_how_much_of_a_layer_another_finds() -> None:
    model, _ = demo.load()
    gen = torch.Generator().manual_seed(0)
    alike = anchors.similarity(model, torch.randint(5, 500, (1, 96), generator=gen))
    assert alike.shape == (4, 4)
    torch.testing.assert_close(alike.diagonal(), torch.ones(4))
    assert torch.equal(alike, alike.triu())
    above = alike[alike.triu(1) > 0]
    assert len(above) == 6 and bool((above < 0.99).all())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("A key, a lock and a door; a lock, a door and a key. " * 40)
    given = ["anchors", "--model", "demo", "--data", str(tmp_path), "--length", "64"]
    runner.main([*given, "--count", "2"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("best 2: anchors=") and second.startswith("equal distances: anchors=2,")
    with pytest.raises(SystemExit, match="2"):
        runner.main([*given, "--count", "5"])
    assert "from 1 to the 4 layers of the model; got 5" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        runner.main(["anchors", "--model", str(tmp_path / "none")])
    assert "error: " in capsys.readouterr().err
