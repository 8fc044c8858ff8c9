"""The timings in README.md and docs/bench.md are what the rows say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from refreshkv.bench import record
from refreshkv.bench.report import LEFT_OUT

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_a_document_is_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    written = tables.rewrite(text, tables.DOCUMENTS[name](ROOT / "benchmarks" / "results"))
    assert text == written, "run `python benchmarks/tables.py`"


@pytest.mark.parametrize("write", tables.DOCUMENTS.values())
def test_without_rows_nothing_is_claimed(write: Callable[[Path], str], tmp_path: Path) -> None:
    text = write(tmp_path)
    assert text.startswith(("No row yet", "### On a CPU\n\nNo row yet"))
    assert "|" not in text


def test_newest_rows_in_order(record_row: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {**record_row, "context": 65536, "ms.partial": 444.0},
        {**record_row, "context": 8192, "ms.partial": 111.0},
        {**record_row, "context": 8192, "ms.partial": 222.0, "ms.default": None},
        {**record_row, "context": 8192, "shape": "demo", "ms.partial": 333.0},
    ]
    record.append(tmp_path / "decode-cpu.csv", rows)
    text = tables.section(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| 2 x")]
    assert [line.split(" | ")[0] for line in lines] == ["| 2 x 8K", "| 2 x 64K"] * 2
    assert "222" in lines[0] and "| - |" in lines[0] and "444" in lines[1]
    assert "111" not in text and "333" not in text
    assert "| 2 x 8K | 32 | 3 | 50% |" in text
    assert "| FlashAttention |" in text and record_row["ms.flash"] > 0


def test_the_readme_has_few_rows(record_row: dict[str, Any], tmp_path: Path) -> None:
    rows = [{**record_row, "context": 1024 * size, "ms.mix": 100.0 + size} for size in range(1, 13)]
    record.append(tmp_path / "decode-cpu.csv", rows)
    text = tables.summary(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| 2 x")]
    assert len(lines) == 10 and "| 101 |" in lines[0] and "3 drafts of which 50% stand" in text


def test_kernels(tmp_path: Path) -> None:
    row = {
        "shape": "llama-3.1-8b",
        "context": 32768,
        "batch": 8,
        "budget": 3277,
        "draft": 8,
        "device": "GPU 9000",
        "dtype": "bfloat16",
        "threads": 1,
        "versions.kernels": "Triton",
        "kernel": "attend",
        "ms": 0.0123,
        "bandwidth_share": 0.834,
        "rival": "torch sdpa",
        "rival_ms": 0.0456,
    }
    record.append(tmp_path / "kernels-cuda.csv", [row])
    assert "| 8 x 32K, `attend` | 12.3 | 83% | torch sdpa | 45.6 |" in tables.section(tmp_path)


def test_generate(tmp_path: Path) -> None:
    """Medians over the turns of the newest run."""
    row = {
        **{"shape": "bundled", "context": 2048, "batch": 1, "device": "GPU 9000", "threads": 1},
        **{"dtype": "bfloat16", "versions.kernels": "Triton", "time": "now", "new": 64},
        **{"new_tokens": 64, "prefill_s": 0.5, "later_tokens_per_s": 321.0, "same_tokens": 63},
    }
    rows = [
        {**row, "variant": "full", "turn": turn, "tokens_per_s": speed, "time": time}
        for time, turn, speed in (("then", 1, 999.0), ("now", 1, 100.0), ("now", 2, 200.0))
    ]
    record.append(tmp_path / "generate-cuda.csv", [*rows, {**rows[-1], "variant": "fast"}])
    text = tables.section(tmp_path)
    assert "| 1 x 2K | full | 64 | 0.50 | 150 | 321 | 63 |" in text and "999" not in text
    assert "| 1 x 2K | fast | 64 | 0.50 | 200 | 321 | 63 |" in text and "the bundled model" in text


@pytest.mark.parametrize(
    "text", ["nothing", tables.BEGIN, f"{tables.END} {tables.BEGIN}", tables.BEGIN * 2 + tables.END]
)
def test_markers_that_are_missing(text: str) -> None:
    with pytest.raises(ValueError, match="lacks the markers"):
        tables.rewrite(text, "new")


def test_rewriting_keeps_the_rest_and_is_stable() -> None:
    text = f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n"
    once = tables.rewrite(text, "new")
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once
    assert "new" in once and tables.rewrite(once, "new") == once


@pytest.fixture
def record_row(record: dict[str, Any]) -> dict[str, Any]:
    """A row of `bench decode` of a shape that is shown."""
    from refreshkv.bench.record import flat

    return {**flat(record, LEFT_OUT), "shape": "llama-3.2-1b"}
