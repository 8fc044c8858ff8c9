"""In a terminal of 80 columns no heading and no figure of a table is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from refreshkv.bench.endtoend import MODES
from refreshkv.bench.variants import NAMES
from refreshkv.cli import bench_view, eval_view, models, reproduce_view, side_by_side_view
from refreshkv.cli.side_by_side import METHODS, Excerpt, Report, Row
from refreshkv.evals.summary import Summary
from refreshkv.reproduce.comparison import Cell
from refreshkv.reproduce.estimate import Cost
from refreshkv.reproduce.jobs import Request
from refreshkv.reproduce.tables import ABLATIONS, REASONING

SIZE = {"shape": "llama-3.2-1b", "batch": 32, "context": 131072, "budget": 16384}
SETTINGS = {"stride": 10, "draft": 16, "acceptance": 0.85, "dtype": "bfloat16", "threads": 16}
ABOUT = {**SIZE, **SETTINGS, "device": "a device", "backend": "triton"}
DECODE = {
    **ABOUT,
    "ms": dict.fromkeys(NAMES, 12345.67),
    "ms_range": dict.fromkeys(NAMES, (10000.01, 20000.02)),
    "tokens_per_s": dict.fromkeys(NAMES, 1234.5),
    "bytes": dict.fromkeys(NAMES, 123.4e9),
    "bandwidth_share": dict.fromkeys(NAMES, 1.01),
    "share_of_ideal": dict.fromkeys(NAMES, 0.99),
    "notes": {},
    "memory": {"weights": 16.06e9, "store": 68.7e9, "own_dense": 0},
    "ratios": {},
    "acceptance_curve": [],
}
KERNEL = {"kernel": "attend_and_score", "ms": 12.3456, "bandwidth_share": 1.01}
RIVAL = {"rival": "torch matmul and softmax", "rival_ms": 23.4567, "rival_over_ours": 12.34}
CHECK = {
    "file": "benchmarks/results/decode-cpu.csv",
    "rows": [
        {
            **SIZE,
            **{"mode": "exact", "measured": 12.34, "by_bytes": 23.45, "error_by_bytes": -0.12},
            **{"by_fit": 34.56, "error_by_fit": 1.23},
        }
    ],
    "median_error_by_bytes": 0.1,
    "median_error_by_fit": None,
}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "refreshkv.cli.common.console", lambda: Console(highlight=False, markup=False, width=80)
    )


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The printed lines, with one space where there are several."""
    printed = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    return [" ".join(line.split()) for line in printed.splitlines()]


def test_bench_decode(capsys: pytest.CaptureFixture[str]) -> None:
    bench_view.decode(DECODE)
    row = "12345.67 10000.01 - 20000.02 1234 123400 101% 99%"
    assert [f"{name} {row}" for name in NAMES] == [one for one in lines(capsys) if row in one]


def test_bench_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    notes = {"flashinfer": "left out: no compiler"}
    bench_view.kernels({**ABOUT, "kernels": [{**KERNEL, **RIVAL}], "notes": notes})
    row = "attend_and_score 12345.6 101% torch matmul and softmax 23456.7 12.34"
    printed = lines(capsys)
    assert row in printed and "flashinfer: left out: no compiler" in printed


def test_bench_generate(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"prefill_s": 123.4, "tokens_per_s": 12345.6, "later_tokens_per_s": 23456.7}
    one |= {"new_tokens": 123456, "same_tokens": 123455}
    about = {**ABOUT, "new": 123456, "notes": {"fast": "left out: no room"}}
    bench_view.generate({**about, "variants": dict.fromkeys(MODES, one)})
    printed = lines(capsys)
    for name in MODES:
        assert f"{name} 123 1.235e+04 2.346e+04 123456 123455" in printed
    assert "fast: left out: no room" in printed


def test_bench_plan_check(capsys: pytest.CaptureFixture[str]) -> None:
    bench_view.plan_check(CHECK)
    row = "llama-3.2-1b 32x131072 16384 exact 12.34 23.45 -12% 34.56 +123%"
    assert row in lines(capsys)


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"full_share": 1.0, "kv_read_share": 1.0, "effective_stride": 123.4}
    rows = [
        Row("key-value", method.name, 100, 100, 12345, prefill_s=1.0, decode_s=1234.5, **row)
        for method in METHODS
    ]
    texts = {method.name: "a:b\n" for method in METHODS}
    side_by_side_view.show(Report(tuple(rows), (Excerpt("key-value", 0, "a:b\n", texts),)), 2048)
    printed = lines(capsys)
    row_of = "100 of 100 12345 100% 100% 123.4 1234.5"
    assert sum(one.endswith(row_of) for one in printed) == len(METHODS)
    assert "expected StreamingLLM (window 32) (S 5, s .85) (fast) (exact)" in printed


def test_eval(capsys: pytest.CaptureFixture[str]) -> None:
    summary = Summary(
        *("summarization", "forced", "no-full-attention:stride=10", "ROUGE-L", 1.0, 0.999, 1.0),
        *(200, 1234.0, None, 1.0, 1.0, 1.0, 1.0, None, None),
    )
    eval_view.show([summary], Path("out"))
    row = "no-full-attention:stride=10 100.0 [99.9, 100.0] 1234 100.0% 100.0%"
    printed = lines(capsys)
    assert row in printed and "summarization, forced" in printed
    assert "Ratio" not in " ".join(printed)


def test_eval_beside_full_attention(capsys: pytest.CaptureFixture[str]) -> None:
    """Perplexities come last, and without full attention the reader is told what is missing."""
    summary = Summary(
        *("perplexity", "forced", "refreshkv-mixed", "perplexity", 123.456, 1.0, 234.56),
        *(200, 1234.0, None, 1.0, 1.0, 1.0, 1.0, None, None, 1.00184, 0.99975, 1.3456),
        *(0.9999, 0.00123),
    )
    eval_view.show([summary], Path("out"))
    printed = lines(capsys)
    at = printed.index("score ratio 95 % agree KL KV read")
    row = "refreshkv-mixed 123.46 1.0018 [0.9998, 1.3456] 100.0% 0.0012 100.0%"
    assert printed.index(row) > printed.index("perplexity", at + 1) > at
    assert "add full to --methods" not in " ".join(printed)
    assert "KL(full || method)" in " ".join(printed)
    assert "tokens KV read full" not in " ".join(printed)
    eval_view.show([replace(summary, ratio=None, agreement=None, kl=None)], Path("out"))
    printed = lines(capsys)
    assert "refreshkv-mixed 123.46 [1.00, 234.56] 1234 100.0% 100.0%" in printed
    assert "they are against full attention; add full to --methods." in " ".join(printed)


def test_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refreshkv.models.is_fetched", lambda name: False)
    models.show(models.listed())
    assert "gemma3-270m Gemma3 268M 32K Gemma Terms of Use no (238 MB)" in lines(capsys)


def cell(**given: Any) -> Cell:
    metric = {"metric": "perplexity", "examples": 100, "output_tokens": 16384.0, "ended": 0.99}
    numbers = {"ours": 123.45, "low": 120.01, "high": 130.02, "paper": 100.0, "kept": 1.234}
    apart = {"difference": 23.45, "difference_low": -20.01, "difference_high": 30.02}
    shares = {"paper_kept": 1.175, "kv_read_share": 1.0, "same_as_full": 1.0}
    return Cell(method="m", **{**metric, **numbers, **apart, **shares, **given})


def test_reproduce(capsys: pytest.CaptureFixture[str]) -> None:
    row = ABLATIONS.rows[-1]
    found = cell(column="arxiv", row=row.name, label=row.label)
    reproduce_view.show(ABLATIONS, ["title"], {"arxiv": "A note."}, [found], Path("out"))
    printed = lines(capsys)
    assert "ours 95 % paper apart 95 % kept paper" in printed
    figures = "123.5 [120.0, 130.0] 100.0 +23.45 [-20.01, 30.02] 1.234 1.175"
    assert any(one.endswith(figures) for one in printed)
    assert "Arxiv, perplexity: A note." in printed


def test_reproduce_problems(capsys: pytest.CaptureFixture[str]) -> None:
    found = cell(column="own", row="full", label="full attention", metric="answer right")
    reproduce_view.show(REASONING, ["title"], {}, [found], Path("out"))
    assert "full attention 123.5 [120.0, 130.0] 16384 99% 100% 100%" in lines(capsys)


def test_reproduce_plan(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Cost("chain-of-key", 1300, 100_000, 16_384, 6, 127_795_200, 16, 10, 10**12, False, 123.4)
    request = Request(table=REASONING, out=Path("out"), model="m")
    assumed = {
        "machine": "a100",
        "bandwidth": 1e12,
        "memory": 80e9,
        "flops": 1e12,
        "fixed_ms": 20.0,
    }
    reproduce_view.show_plan(request, [cost], assumed, "bfloat16")
    printed = lines(capsys)
    assert "chain-of-key 1300 100000 16384 6 128M 1e-08 1e+03! 123" in printed
    assert any(one.startswith("!: more than the 80 GB of a100") for one in printed)
