"""`refreshkv bench`: options reach `refreshkv.bench`, tables are printed, and bad input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from refreshkv.bench import decode, kernels
from refreshkv.bench.record import read

Run = Callable[..., Result]
SMALL = (
    "--shape",
    "demo",
    "--context",
    64,
    "--budget",
    16,
    "--device",
    "cpu",
    "--dtype",
    "float32",
)
DECODE = ("bench", "decode", *SMALL, "--draft", 2, "--steps", 1, "--cycles", 1)
KERNELS = ("bench", "kernels", *SMALL, "--draft", 2, "--repeats", 1)
SCALE = (
    *("bench", "scale", "--shape", "demo", "--contexts", "64,96", "--batches", 1, "--budgets", 16),
    *("--strides", "10,2", "--steps", 1, "--device", "cpu", "--dtype", "float32"),
)
GENERATE = (
    *("bench", "generate", "--shape", "demo", "--context", 48, "--new", 6, "--turns", 1),
    *("--device", "cpu", "--dtype", "float32"),
)
PLAN = ("bench", "plan", "--model", "llama-3.1-8b", "--context", 131072, "--batch", 4)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder without results, a machine of one GB/s, and the threads as they were."""
    monkeypatch.chdir(tmp_path)
    for module in (decode, kernels):
        monkeypatch.setattr(module, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("refreshkv.bench.timing._MOST_COPIES", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_decode_options(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def stop(**options: Any) -> None:
        given.update(options)
        raise ValueError("seen")

    monkeypatch.setattr("refreshkv.bench.decode.run", stop)
    path = tmp_path / "d.csv"
    options = ("--stride", "never", "--skip", "default, empty", "--results", path, "--threads", 1)
    result = run(*DECODE, "--batch", 2, "--acceptance", 0.5, *options)
    assert result.exit_code == 2 and "seen" in result.stderr
    assert given == {
        "batch": 2,
        "context": 64,
        "shape": "demo",
        "budget": 16,
        "stride": None,
        "draft": 2,
        "acceptance": 0.5,
        "device": "cpu",
        "dtype": "float32",
        "steps": 1,
        "cycles": 1,
        "static": None,
        "compiled": False,
        "threads": 1,
        "skip": ("default", "empty"),
        "results": path,
        "progress": False,
    }
    run("bench", "decode", "--device", "cpu", "--sizes", "1x8192,4x512")
    assert (given["batch"], given["context"], given["results"]) == (1, 8192, None)
    assert (given["budget"], given["stride"], given["draft"], given["acceptance"]) == (
        *(0.125, 10, 8, 0.85),
    )


def test_decode(run: Run, last_json: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    result = run(*DECODE, "--plot", "plot.png", "--json")
    record = last_json(result)
    assert {"mix_over_static", "mix_over_default", "mix_over_own_dense", "share_of_ideal"} <= set(
        record["ratios"]
    )
    for shown in ("own_dense", "partial step", "share_of_ideal", "at acceptance"):
        assert shown in result.stdout
    (row,) = read(tmp_path / "benchmarks" / "results" / "decode-cpu.csv")
    assert row["ms.mix"] == record["ms"]["mix"]
    assert row["ratios.share_of_ideal"] == record["ratios"]["share_of_ideal"]
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")


def test_several_sizes(run: Run, last_json: Callable[..., Any]) -> None:
    skip = "static,default,snapkv,empty,mixed,exact,full"
    record = last_json(run(*DECODE, "--sizes", "1x64,2x96", "--skip", skip, "--json"))
    assert [(one["batch"], one["context"]) for one in record["runs"]] == [(1, 64), (2, 96)]
    assert record["context"] == 96 and record["ms"]["own_dense"] > 0
    assert record["ms"]["exact"] is None and record["ratios"]["share_of_ideal"] is None


def test_kernels(run: Run, last_json: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    result = run(*KERNELS, "--plot", "k.png", "--no-record", "--json")
    names = [one["kernel"] for one in last_json(result)["kernels"]]
    assert "attend_and_score" in names and "fastest other" in result.stdout
    assert Path("k.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "benchmarks" / "results").iterdir())


def test_generate(run: Run, last_json: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    result = run(*GENERATE, "--sizes", "1x48,2x32", "--skip", "published, fast", "--json")
    record = last_json(result)
    assert [(one["batch"], one["context"]) for one in record["runs"]] == [(1, 48), (2, 32)]
    assert list(record["variants"]) == ["dynamic", "full", "lossless"]
    assert "the lossless mode, preset 'default'" in result.stdout
    rows = read(tmp_path / "benchmarks" / "results" / "generate-cpu.csv")
    assert [row["variant"] for row in rows] == ["dynamic", "full", "lossless"] * 2
    assert rows[-1]["tokens_per_s"] == record["variants"]["lossless"]["tokens_per_s"]


@pytest.mark.parametrize("command", [DECODE, KERNELS, GENERATE])
def test_half_precision(command: tuple[Any, ...], run: Run, last_json: Callable[..., Any]) -> None:
    """The last --dtype counts."""
    record = last_json(run(*command, "--dtype", "float16", "--json"))
    assert record["dtype"] == "float16"


def test_a_size_is_written_before_the_next_is_timed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in the third of three sizes."""
    right, sizes = decode.take_turns, []

    def turns(*given: Any) -> Any:
        sizes.append(len(read(Path("d.csv"))))
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(decode, "take_turns", turns)
    skip = ("--skip", "static,default,snapkv,empty,mixed,exact,full")
    result = run(*DECODE, *skip, "--sizes", "1x64,2x64,1x96", "--results", "d.csv")
    assert result.exit_code != 0 and sizes == [0, 1, 2]
    assert [(row["batch"], row["context"]) for row in read(Path("d.csv"))] == [(1, 64), (2, 64)]


def test_scale_and_the_check_of_its_rows(run: Run, last_json: Callable[..., Any]) -> None:
    result = run(*SCALE, "--results", "scale.csv", "--plot", "s.png", "--json")
    assert set(last_json(result)["fits"]) == {"own_dense", "partial", "full"}
    assert "stride 2:" in result.stdout and Path("s.png").exists()
    checked = run("bench", "plan", "--check", "scale.csv", "--json")
    record = last_json(checked)
    assert [one["context"] for one in record["rows"]] == [64, 96]
    errors = [abs(one["error_by_bytes"]) for one in record["rows"]]
    assert record["median_error_by_bytes"] == pytest.approx(sum(errors) / 2)
    assert record["median_error_by_fit"] is None and "median error" in checked.stdout


def test_plan(run: Run, last_json: Callable[..., Any]) -> None:
    result = run(*PLAN, "--budget", 0.1, "--device", "h200", "--json")
    record = last_json(result)
    # weights without the embedding table, and 128 KiB a token
    weights, entry = 2 * (8_030_261_248 - 128256 * 4096), 131072
    full = weights + 4 * 131072 * entry
    mix = weights + 4 * (0.9 * 13108 + 0.1 * 131072) * entry
    assert record["modes"]["mix"]["speed_up"] == pytest.approx(full / mix, rel=1e-4)
    assert record["memory"]["fits"] and "fits in 141" in result.stdout
    no = last_json(run(*PLAN, "--device", "a100", "--json"))
    assert not no["memory"]["fits"]
    faster = last_json(run(*PLAN, "--budget", 0.1, "--bandwidth", 9600, "--json"))
    half = record["modes"]["full"]["ms"] / 2
    assert faster["modes"]["full"]["ms"] == pytest.approx(half, rel=1e-3)


def test_plan_of_a_folder(run: Run, last_json: Callable[..., Any], tiny: Path) -> None:
    record = last_json(run("bench", "plan", "--model", tiny, "--context", 100, "--json"))
    config = json.loads((tiny / "config.json").read_text())
    entry = config["num_hidden_layers"] * config["num_key_value_heads"] * 2 * 8 * 2
    assert record["memory"]["cache"] == 100 * entry


BAD = {
    "acceptance": ((*DECODE, "--acceptance", 1.5), "acceptance is a share of the drafts in [0, 1]"),
    "not a number": ((*DECODE, "--acceptance", "nan"), "got nan"),
    "draft": ((*DECODE, "--draft", 0), "Invalid value for '--draft': 0 is not in the range"),
    "shape": ((*DECODE, "--shape", "dmo"), "unknown shape 'dmo'; did you mean 'demo'?"),
    "shape of kernels": ((*KERNELS, "--shape", "dmo"), "unknown shape 'dmo'"),
    "variant": ((*DECODE, "--skip", "drafts"), "unknown variant 'drafts'"),
    "variant of generate": ((*GENERATE, "--skip", "fst"), "unknown variant 'fst'; did you mean"),
    "foreign file of generate": ((*GENERATE, "--results", "foreign.csv"), "has other columns"),
    "sizes": ((*DECODE, "--sizes", "8192"), "'8192' is no list of rows x context"),
    "sizes of nothing": ((*DECODE, "--sizes", "0x64"), "'0x64' is no list"),
    "budget": ((*KERNELS, "--budget", 0), "budget must be at least 1 token"),
    "foreign file": ((*DECODE, "--results", "foreign.csv"), "has other columns"),
    "foreign file of kernels": ((*KERNELS, "--results", "foreign.csv"), "has other columns"),
    "foreign file of scale": ((*SCALE, "--results", "foreign.csv"), "has other columns"),
    "plot": ((*DECODE, "--plot", "nowhere/p.png"), "there is no folder nowhere"),
    "list": ((*SCALE, "--contexts", "64,x"), "'64,x' is no list of integers from 1"),
    "one size": ((*SCALE, "--contexts", "64"), "a fit needs two sizes"),
    "device": ((*PLAN, "--device", "h20"), "unknown device 'h20'; did you mean 'h200'?"),
    "bandwidth": ((*PLAN, "--bandwidth", 0), "'--bandwidth': 0.0 is not in the range"),
    "model": (("bench", "plan", "--model", "./none"), "model folder './none' does not exist"),
    "stride": ((*PLAN, "--stride", 0), "stride must be an integer >= 1"),
    "check": (("bench", "plan", "--check", "foreign.csv"), "has no rows of `bench decode`"),
    "check of nothing": (("bench", "plan", "--check", "none.csv"), "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, run: Run) -> None:
    Path("foreign.csv").write_text("a,b\n1,2\n")
    arguments, message = BAD[case]
    result = run(*arguments)
    assert result.exit_code == 2, result.exception
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert Path("foreign.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("name", ["decode", "kernels", "generate", "scale", "plan"])
def test_help(name: str, run: Run) -> None:
    result = run("bench", name, "--help")
    assert result.exit_code == 0 and "--json" in result.stdout
