"""Means, intervals and pooled shares; results read back after a kill."""

from __future__ import annotations

import csv
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from refreshkv.evals import summary as sm
from tests.evals import synthetic


def record(
    task: str = "t", method: str = "m", example: int = 0, score: float = 0.0, **more
) -> dict:
    return {
        "task": task, "mode": "free", "method": method, "example": f"{example:04d}",
        "key": f"{task}|{method}|free|{example:04d}", "prompt_sha256": "0", "score": score,
        "metric": "x", "output_tokens": 10, "prompt_tokens": 100, **more,
    }  # fmt: skip


def test_the_interval_covers_the_mean_it_should() -> None:
    """Of many samples of a known mean, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for i in range(100):
        low, high = sm.interval([rng.normal(3.0, 1.0, 40)], seed=i)
        held += low <= 3.0 <= high
    assert 86 <= held <= 99


@pytest.mark.parametrize("scores", [[0.5], [1.0, 1.0, 1.0], [0.0, 0.0]])
def test_nothing_varies_nothing_warns(scores: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = sm.summarize([record(example=i, score=s) for i, s in enumerate(scores)])
    assert found.ci_low == found.score == found.ci_high == scores[0]


def test_order_does_not_matter() -> None:
    records = [record(example=i, score=i % 3 / 2) for i in range(20)]
    assert sm.summarize(records) == sm.summarize(records[::-1])


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    (found,) = sm.summarize(
        [record("perplexity", example=i, score=s) for i, s in enumerate((1.0, 2.0))]
    )
    assert found.score == pytest.approx(math.exp(1.5))
    assert math.e <= found.ci_low < found.score < found.ci_high <= math.exp(2.0)


def test_shares_are_pooled_by_what_was_read() -> None:
    """A long example weighs more than a short one, as its steps do."""
    short = record(example=0, kv_read_share=1.0, prompt_tokens=100, output_tokens=2,
                   layers={"0": {"full_steps": 1, "steps": 1}})  # fmt: skip
    long = record(example=1, kv_read_share=0.1, prompt_tokens=100, output_tokens=200,
                  layers={"0": {"full_steps": 9, "steps": 199}})  # fmt: skip
    (found,) = sm.summarize([short, long])
    weights = np.array([2 * 101, 200 * 200])
    assert found.kv_read_share == pytest.approx(np.average([1.0, 0.1], weights=weights))
    assert found.full_share == pytest.approx(10 / 200)
    assert found.effective_stride == pytest.approx(20)


def test_a_method_without_full_steps_has_no_stride() -> None:
    (found,) = sm.summarize([record(layers={"0": {"full_steps": 0, "steps": 9}})])
    assert found.full_share == 0
    assert found.effective_stride is None


def test_differences_are_paired_and_signed() -> None:
    hard = [0.1, 0.5, 0.9, 0.3, 0.7, 0.2]
    records = [record(method="full", example=i, score=s) for i, s in enumerate(hard)]
    records += [record(method="up", example=i, score=s + 0.05) for i, s in enumerate(hard)]
    records += [record(method="few", example=i, score=1.0) for i in range(3)]
    found = {d.method: d for d in sm.differences(records)}
    assert found["up"].gain == pytest.approx(0.05)
    assert found["up"].beats  # by little, but always
    assert not found["few"].beats  # on too few examples to say so
    nats = [record("perplexity", m, i, s) for m, s in (("full", 1.0), ("x", 1.2)) for i in range(6)]
    assert not sm.differences(nats)[0].beats  # higher is worse


def fed(method: str, example: int, score: float, **more) -> dict:
    return record("perplexity", method, example, score, **{"said": [1, 2, 3, 4], "kl": 0.0, **more})


def test_a_perplexity_beside_full_attention() -> None:
    """Over the documents that both have; agreement and KL are pooled over tokens."""
    records = [fed("full", i, score) for i, score in enumerate((0.0, 1.0, 4.0))]
    records += [
        fed("x", 0, 0.1, said=[1, 2, 3, 5], kl=0.2, output_tokens=4),
        fed("x", 2, 4.3, said=[9, 2], kl=0.8, output_tokens=2),
        fed("y", 3, 9.0, said=[1], kl=None),
    ]
    rows = {row.method: row for row in sm.summarize(records)}
    x = rows["x"]
    assert x.ratio == pytest.approx(math.exp(0.2))
    assert (x.ratio_low, x.ratio_high) == pytest.approx((math.exp(0.1), math.exp(0.3)))
    assert x.agreement == pytest.approx(4 / 6)
    assert x.kl == pytest.approx((4 * 0.2 + 2 * 0.8) / 6)
    full = rows["full"]
    assert (full.ratio, full.ratio_low, full.ratio_high, full.agreement, full.kl) == (1, 1, 1, 1, 0)
    assert (rows["y"].ratio, rows["y"].agreement, rows["y"].kl) == (None, None, None)
    old = [{k: v for k, v in r.items() if k not in ("said", "kl")} for r in records]
    assert {row.method: row.ratio for row in sm.summarize(old)}["x"] == x.ratio
    assert all(row.agreement is row.kl is None for row in sm.summarize(old))
    assert sm.summarize([record(method=m) for m in ("full", "x")])[1].ratio is None


def test_the_ratio_is_that_of_pairs() -> None:
    """Documents differ by far more than methods do."""
    scores = [0.0, 5.0, 1.0, 4.0, 2.0, 3.0]
    records = [fed("full", i, s) for i, s in enumerate(scores)]
    records += [fed("x", i, s + 0.01 + 0.001 * (i % 2)) for i, s in enumerate(scores)]
    x = sm.summarize(records)[1]
    assert x.ci_high / x.ci_low > 3
    assert 1.01 < x.ratio_low < x.ratio < x.ratio_high < 1.0112


def test_the_average_over_tasks_counts_each_once() -> None:
    records = [record("a", example=i, score=1.0) for i in range(9)] + [record("b", score=0.0)]
    records += [record("a", "half")]
    (found,) = sm.average(records, "mean")
    assert found.score == 0.5
    assert found.method == "m"


def test_csv_has_the_columns_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    sm.write_csv(path, sm.summarize(synthetic.records(["chain-of-key"], ["full", "snapkv"], 3)))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    needed = "task method score ci_low ci_high examples output_tokens kv_read_share full_share"
    assert set(needed.split()) <= set(rows[0])
    assert [(r["method"], r["mode"]) for r in rows] == [
        ("full", "free"), ("snapkv", "free"), ("full", "forced"), ("snapkv", "forced"),
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["summary.csv"]


def test_results_after_a_kill(tmp_path: Path) -> None:
    lines = [json.dumps(record(example=i)) for i in range(3)]
    path = tmp_path / sm.RESULTS
    path.write_text("\n".join(lines) + "\n" + lines[0] + "\n" + lines[1][:20])
    assert [r["example"] for r in sm.read_results(tmp_path)] == ["0000", "0001", "0002"]
    for broken in (f"{lines[0]}\nbroken\n{lines[1]}\n", f"{lines[0]}\nbroken\n"):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"line 2 of '.*' is not a result"):
            sm.read_results(tmp_path)
    with pytest.raises(ValueError, match="--out"):
        sm.read_results(tmp_path / "none")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[eval\]'"):
        sm.need("no_such_package_at_all")
