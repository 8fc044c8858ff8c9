"""`refreshkv bench`: options reach `refreshkv.bench`, and its record is printed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refreshkv.bench import exact
from refreshkv.bench.common import WrongResultError
from refreshkv.exact import ExactLayer

RECORD = {
    "shape": "demo",
    "context": 64,
    "batch": 1,
    "budget": 8,
    "stride": None,
    "device": "a CPU",
    "dtype": "float32",
    "ms": {"partial": 1.25, "full": 2.5, "default": None, "mix": 1.5},
    "ms_range": {"partial": [1.0, 2.0], "full": [2.0, 3.0]},
    "ratios": {"mix_over_static": 2.0, "mix_over_default": None},
}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run` was called with."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "refreshkv.bench.decode.run", lambda **options: (seen.update(options), RECORD)[1]
    )
    return seen


def test_options(
    given: dict[str, Any], run: Callable[..., Any], last_json: Callable[..., Any], tmp_path: Path
) -> None:
    result = run(
        *(
            "bench",
            "decode",
            "--shape",
            "demo",
            "--context",
            64,
            "--batch",
            2,
            "--budget",
            "8",
            "--stride",
            "never",
        ),
        *(
            "--device",
            "cpu",
            "--steps",
            3,
            "--threads",
            1,
            "--skip",
            "default, empty",
            "--dtype",
            "float32",
        ),
        *("--results", tmp_path / "decode.csv", "--json"),
    )
    assert last_json(result) == RECORD
    assert given == {
        "shape": "demo",
        "context": 64,
        "batch": 2,
        "budget": 8,
        "stride": None,
        "device": "cpu",
        "dtype": "float32",
        "steps": 3,
        "threads": 1,
        "skip": ("default", "empty"),
        "results": tmp_path / "decode.csv",
        "progress": False,
    }


def test_defaults(given: dict[str, Any], run: Callable[..., Any]) -> None:
    result = run("bench", "decode")
    assert result.exit_code == 0, result.exception
    assert given["budget"] == 0.125
    assert given["stride"] == 10
    for expected in ("partial", "1.25", "1.00 - 2.00", "mix_over_static", "2.000"):
        assert expected in result.stdout


@pytest.mark.slow
def test_real_run(run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    record = last_json(
        run(
            "bench",
            "decode",
            "--shape",
            "demo",
            "--context",
            256,
            "--steps",
            2,
            "--device",
            "cpu",
            "--json",
        )
    )
    assert {"partial", "full", "mix", "static", "default"} <= set(record["ms"])
    assert {"mix_over_static", "mix_over_default", "mix_over_own_dense", "share_of_ideal"} <= set(
        record["ratios"]
    )


EXACT = ("bench", "exact", "--shape", "demo", "--context", 512, "--batch", 2, "--cycles", 1)
ON_CPU = ("--device", "cpu", "--dtype", "float32", "--threads", 1)


@pytest.fixture
def _same_threads() -> Iterator[None]:
    """The process has as many threads afterwards."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_same_threads")
def test_exact(run: Callable[..., Any], last_json: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "results" / "exact.csv"
    options = ("--draft", 3, "--tokens-per-pass", 2.5, "--results", path, "--json")
    result = run(*EXACT, *ON_CPU, *options)
    record = last_json(result)
    assert (record["budget"], record["draft"], record["tokens_per_pass"]) == (32, 3, 2.5)
    ms, ratios = record["ms"], record["ratios"]
    assert set(ms) == {"own_dense", "static", "draft", "verify", "cycle", "exact"}
    assert ms["exact"] == pytest.approx(ms["cycle"] / 2.5, abs=1e-3)
    expected = ms["own_dense"] / ms["exact"]
    assert ratios["exact_over_own_dense"] == pytest.approx(expected, rel=1e-2)
    assert ratios["exact_over_static"] == pytest.approx(ms["static"] / ms["exact"], rel=1e-2)
    assert ratios["passes_per_token"] == 1.6
    assert ratios["kv_read_share"] == pytest.approx((3 * 32 + 512) / (2.5 * 512))
    # Of the demo shape, in float32: 4 layers, 2 KV heads of 64, 2 rows.
    attention = 256 * (256 + 2 * 128 + 256)
    weights = 4 * (512 * 256 + 4 * (attention + 3 * 256 * 512 + 2 * 256) + 256)
    entry = 4 * 2 * 64 * 2 * 4 * 2
    ideal = (weights + 512 * entry) * 2.5 / (4 * weights + (3 * 32 + 512) * entry)
    assert ratios["ideal_over_own_dense"] == pytest.approx(ideal, abs=1e-4)
    assert ratios["share_of_ideal"] == pytest.approx(expected / ideal, rel=1e-2)
    assert 0 < record["relative_rms_error"]["verify"] < 2e-6
    for shown in ("one draft pass", "tokens per pass 2.5", "share_of_ideal"):
        assert shown in result.stdout
    without = last_json(run(*EXACT, *ON_CPU, *options, "--skip", "static"))
    assert without["ms"]["static"] is None and without["ratios"]["exact_over_static"] is None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ms.static"] for row in rows] == [str(ms["static"]), ""]
    assert rows[0]["ratios.share_of_ideal"] == str(ratios["share_of_ideal"])
    assert {"device", "threads", "versions.torch"} <= set(rows[0])


def test_committed_tokens_have_the_given_mean() -> None:
    cpu = torch.device("cpu")
    job = exact.Job("demo", 512, 2, 32, cpu, torch.float32, 7, 7.25, 8)
    kept = [job.kept(cycle) for cycle in range(8)]
    assert set(kept) == {7, 8} and sum(kept) == 58


def test_exact_with_a_wrong_full_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ExactLayer.verify
    monkeypatch.setattr(ExactLayer, "verify", lambda *given: right(*given) * 1.01)
    path = tmp_path / "exact.csv"
    with pytest.raises(WrongResultError, match="verify: logits differ from single steps by"):
        exact.run(
            shape="demo",
            context=64,
            draft=2,
            tokens_per_pass=2,
            dtype="float32",
            skip=("static",),
            results=path,
            progress=False,
        )
    assert not path.exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--draft", 0), "Invalid value for '--draft': 0 is not in the range x>=1"),
        (("--draft", 3), "over 3 drafts yields 1 to 4 tokens; got 4.5 tokens per pass"),
        (("--tokens-per-pass", "nan"), "got nan tokens per pass"),
        (("--shape", "dmo"), "unknown shape 'dmo'; did you mean 'demo'?"),
        (("--skip", "draft"), "unknown variant 'draft'; (one of: static)"),
    ],
)
def test_exact_bad_input(options: tuple[Any, ...], message: str, run: Callable[..., Any]) -> None:
    result = run(*EXACT, "--device", "cpu", "--tokens-per-pass", 4.5, *options)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and message in result.stderr


def test_exact_help(run: Callable[..., Any]) -> None:
    result = run("bench", "exact", "--help")
    assert result.exit_code == 0
    assert "--tokens-per-pass" in result.stdout
