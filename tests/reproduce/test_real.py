"""A table on a real model, in its small form: the path from end to end, and the order of the methods."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from refreshkv.cli import cli


def test_ablations_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    given = ["reproduce", "ablations", "--model", "smollm2-135m", "--small", "--limit", "1"]
    result = CliRunner().invoke(cli, [*given, "--out", str(tmp_path)], prog_name="refreshkv")
    assert result.exit_code == 0, (result.stderr, result.exception)
    cells = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert [cell["column"] for cell in cells] == ["arxiv"] * 5 + ["html-0.5k"] * 7
    arxiv = {cell["row"]: cell["ours"] for cell in cells[:5]}
    assert (
        1 < arxiv["full"] < 10
    )  # a text that repeats itself; 49,152 for a model that knows nothing
    assert arxiv["full"] < arxiv["stride-10"] < arxiv["snapkv-1"]
    assert arxiv["no-full-attention"] < arxiv["no-reselection"]
