"""KL against full attention: as its definition has it, row by row, and the same when a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import refreshkv
from refreshkv import demo
from refreshkv.evals import records as recording
from refreshkv.evals.decoding import feed
from refreshkv.evals.grid import Grid, make_cells, parse_methods
from refreshkv.evals.launch import Team
from refreshkv.evals.runner import Run, run
from refreshkv.evals.yardstick import Compared, Kept, Yardstick
from refreshkv.stats import RowStats
from tests.evals.toy import Perplexing, Toy

LOSSY = "snapkv-1:budget=16"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return demo.load()


def grid(*methods: str, **settings: Any) -> Grid:
    settings = {"model": "demo", "batch": 2, "limit": 3, **settings}
    return Grid(tasks=(Perplexing(),), methods=parse_methods(methods), **settings)


def found(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {(record["method"], record["example"]): record for record in lines}


def distributions(rows: int, steps: int, seed: int, spread: float = 3.0) -> Tensor:
    """Log-probabilities, [steps, rows, 1000]."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(steps, rows, 1000, generator=generator)).log_softmax(-1)


def compared(full: Tensor, other: Tensor, rows: list[int]) -> Compared:
    """`full` [steps, B, V] passes, then `other` [steps, len(rows), V], which has some of the rows."""
    kept = Kept()
    watch = Compared([(kept, row) for row in rows])
    for seen, steps in ((kept, full), (watch, other)):
        for number, step in enumerate(steps):
            seen(number, step)
    return watch


@pytest.mark.parametrize("far", [0.003, 0.1, 2.0])
def test_it_is_the_mean_of_the_divergences(far: float) -> None:
    full = distributions(3, 40, seed=0)
    other = (full[:, [2, 0]] + far * distributions(2, 40, seed=1, spread=1.0)).log_softmax(-1)
    watch = compared(full, other, [2, 0])
    for place, (row, tokens) in enumerate(((2, 40), (0, 17))):
        one, two = full[:tokens, row].double(), other[:tokens, place].double()
        expected = float((one.exp() * (one - two)).sum(-1).mean())
        assert watch.kl(place, tokens) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_of_the_same_distributions_it_is_nothing() -> None:
    full = distributions(2, 40, seed=0)
    assert abs(compared(full, full, [0, 1]).kl(0, 40)) < 1e-6
    assert Kept().kl(0, 40) == 0


def test_what_is_ruled_out_counts_only_where_full_attention_does_not() -> None:
    full, other = torch.full((2, 1, 1, 3), -math.inf)
    full[..., 0], other[..., :2] = 0.0, math.log(0.5)
    assert compared(full, other, [0]).kl(0, 1) == pytest.approx(math.log(2), abs=1e-4)
    assert 1e3 < compared(other, full, [0]).kl(0, 1) < math.inf


def test_a_run_writes_what_two_passes_give(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    run(model, tokenizer, grid("full", LOSSY), tmp_path)
    examples = list(Perplexing().examples(len, 0, 3))
    prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
    seen: dict[str, list[Tensor]] = {"full": [], LOSSY: []}
    said: dict[str, list[list[int]]] = {}
    for spec in parse_methods(seen):
        with refreshkv.attach(
            model, method=spec.name, stats=RowStats(), **spec.settings
        ) as session:
            watch = lambda step, all_, to=seen[spec.text]: to.append(all_.double())  # noqa: E731
            fed = feed(model, tokenizer, session, prompts, answers, watch=watch)
            said[spec.text] = [each.said for each in fed]
    apart = [(one.exp() * (one - two)).sum(-1) for one, two in zip(*seen.values(), strict=True)]
    records = found(tmp_path)
    for row, example in enumerate(examples):
        count = records["full", example.id]["output_tokens"]
        expected = float(torch.stack(apart)[:count, row].mean())
        assert expected > 0.01
        assert records[LOSSY, example.id]["kl"] == pytest.approx(expected, rel=1e-3)
        assert records["full", example.id]["kl"] == 0
        for method in seen:
            assert records[method, example.id]["said"] == said[method][row]
            assert len(said[method][row]) == count


def test_going_on_and_sharing_change_nothing(loaded: Any, tmp_path: Path) -> None:
    """Full attention last, full attention done before, asked for again or not, and two processes."""
    methods = ("full", "refreshkv-paper:budget=16", LOSSY)
    run(*loaded, grid(*methods), tmp_path / "whole")
    whole = {place: record["kl"] for place, record in found(tmp_path / "whole").items()}
    assert all(kl > 0 for (method, _), kl in whole.items() if method != "full")

    run(*loaded, grid(*reversed(methods)), tmp_path / "last")
    run(*loaded, grid("full"), tmp_path / "later")
    run(*loaded, grid("full", LOSSY, limit=1), tmp_path / "later")
    run(*loaded, grid(*methods[1:]), tmp_path / "later")
    team = [Run(*loaded, grid(*methods), tmp_path / "team", team=Team(i, 2)) for i in range(2)]
    for each in team:
        each.decode()
    for each in reversed(team):
        each.finish()
    team[0].directory.close()
    for other in ("last", "later", "team"):
        kls = {place: record["kl"] for place, record in found(tmp_path / other).items()}
        assert kls == pytest.approx(whole, rel=1e-4), other


def test_without_full_attention_there_is_none(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(*loaded, grid("snapkv-1"), tmp_path)
    assert {record["kl"] for record in found(tmp_path).values()} == {None}
    # Nor where no distribution is asked for: full attention runs once.
    fed: list[str] = []
    original = recording.decoding.feed

    def watched(*args: Any, **options: Any) -> Any:
        fed.extend(options["names"])
        assert "watch" not in options
        return original(*args, **options)

    monkeypatch.setattr(recording.decoding, "feed", watched)
    asked = Grid(
        model="demo", tasks=(Toy(),), methods=parse_methods(["full", LOSSY]), mode="forced"
    )
    run(*loaded, asked, tmp_path / "toy")
    assert len(fed) == 6


def test_only_the_batch_at_hand_is_held() -> None:
    full, lossy = make_cells(grid("full", LOSSY), len)
    one, two, three = full.examples
    yardstick = Yardstick()
    assert yardstick.lacks(lossy, [one])
    yardstick.watch(full, [one, two])
    assert not yardstick.lacks(lossy, [two, one])
    assert yardstick.lacks(lossy, [two, three])
    yardstick.watch(full, [three])
    assert yardstick.lacks(lossy, [one])
