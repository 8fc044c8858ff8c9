"""The tables of docs/fidelity.md, from summaries."""

from __future__ import annotations

import math
from dataclasses import replace

from experiments.tables import family_table, kinds_table, table, task_table
from refreshkv.evals.summary import Summary

FULL = Summary(
    task="breadth-needle",
    mode="free",
    method="full",
    metric="its task's",
    score=0.916,
    ci_low=0.8,
    ci_high=1.0,
    examples=12,
    output_tokens=30.0,
    answer_tokens=28.0,
    kv_read_share=1.0,
    full_share=1.0,
    effective_stride=1.0,
    kv_read_most=1.0,
    same_as_full=1.0,
    passes_per_token=None,
)
LOSSLESS = replace(
    FULL, method="refreshkv", kv_read_share=0.236, kv_read_most=0.31, passes_per_token=1.084
)
LOSSY = replace(FULL, method="snapkv", score=0.1, kv_read_share=0.124, same_as_full=1 / 12)


def test_a_row_a_family() -> None:
    others = [replace(row, task="breadth-reversed", score=0.5) for row in (FULL, LOSSLESS, LOSSY)]
    lines = family_table([FULL, LOSSLESS, LOSSY, *others]).splitlines()
    assert lines[0] == "| | full solves | `refreshkv` | `snapkv` |"
    assert lines[2] == "| needle | 92 | 100, 24, 1.08 | 8, 12 |"
    assert lines[3] == "| reversed | 50 | 100, 24, 1.08 | 8, 12 |"


def test_a_row_a_task_and_method() -> None:
    lines = task_table([FULL, LOSSLESS, LOSSY]).splitlines()
    assert lines[2].startswith("| **breadth-needle**, 12 prompts |")
    assert lines[4] == "| `refreshkv` | 91.6 | 80.0-100.0 | 100.0 | 23.6 | 31.0 | 1.08 |"
    assert lines[5] == "| `snapkv` | 10.0 | 80.0-100.0 | 8.3 | 12.4 | 100.0 | 1 |"


def test_a_row_a_method_beside_full_attention() -> None:
    fed = replace(FULL, task="perplexity", mode="forced", score=12.345, examples=24)
    beside = {"ratio": 1.00184, "ratio_low": 0.99975, "ratio_high": 1.0035}
    mixed = replace(fed, method="x", kv_read_share=0.1951, agreement=0.952, kl=0.00312, **beside)
    lines = table([mixed, replace(mixed, method="y", agreement=None, kl=None)]).splitlines()
    assert lines[0].startswith("| 24 documents | perplexity | of full attention's | 95 % | agree")
    assert lines[2] == "| `x` | 12.35 | 1.0018 | 0.9998-1.0035 | 95.2 | 0.0031 | 19.5 |"
    assert lines[3] == "| `y` | 12.35 | 1.0018 | 0.9998-1.0035 | - | - | 19.5 |"


def test_the_table_is_the_one_that_fits() -> None:
    assert table([FULL]) == family_table([FULL])
    other = replace(FULL, task="key-value")
    assert table([FULL, other]) == task_table([FULL, other])
    texts = [replace(row, task="continuation", examples=24) for row in (FULL, LOSSLESS, LOSSY)]
    head, _, *cells = [line.split(" | ") for line in table(texts).splitlines()]
    assert [row[1] for row in (head, *cells)] == ["same text", "24/24", "24/24", "2/24"]


def test_ratios_by_kind_of_text() -> None:
    records = [
        {
            **{"task": "perplexity", "mode": "forced", "method": method, "example": str(i)},
            **{"score": 1.0 + far * (i + 1), "said": [1, 2, 3 + far], "kl": 0.1},
            **{"output_tokens": 3, "prompt_tokens": 9, "source": f"a/0{i}-{kind}.txt"},
        }
        for i, kind in enumerate(("table", "code", "table"))
        for method, far in (("full", 0), ("x", 1))
    ]
    head, _, full, x = kinds_table(records).splitlines()
    assert head == "| | code | table |"
    assert full == "| `full` | 1.0000, 100.0 | 1.0000, 100.0 |"
    assert x == f"| `x` | {math.exp(2):.4f}, 66.7 | {math.exp(2):.4f}, 66.7 |"
    assert kinds_table([*records, {**records[0], "source": "a/b.txt"}]) == ""
    assert kinds_table([{**records[0], "source": None}]) == kinds_table([]) == ""
