"""The comparison of the cross-check sees every disagreement. The check itself needs kvpress: `make crosscheck`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.crosscheck.compare import compare, main, table

JOB: dict[str, Any] = {
    "prompts": {"p": [1, 2], "q": [3, 4]},
    "cases": {"same": {"agree": True}, "own": {"agree": False}},
    "budget": 2,
    "new_tokens": 3,
}
RUN = {"tokens": [7, 8, 9], "kept": [[[0, 1], [0, 2]], [[1, 2], [0, 1]]]}  # two layers, two heads


def result() -> dict[str, Any]:
    keys = [f"{case}|{prompt}" for case in JOB["cases"] for prompt in JOB["prompts"]]
    return {"versions": {}, "runs": {key: copy.deepcopy(RUN) for key in keys}}


def exit_code(folder: Path, theirs: dict[str, Any]) -> int:
    files = []
    for name, content in (("job", JOB), ("ours", result()), ("theirs", theirs)):
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(content), "utf-8")
    return main(*map(str, files))


def test_equal_results_agree(tmp_path: Path) -> None:
    assert exit_code(tmp_path, result()) == 0
    found = compare(JOB, result(), result())["same"]
    assert (found.heads, found.equal_heads, found.tokens, found.same) == (8, 8, 6, 6)


def test_one_other_token_is_a_disagreement(tmp_path: Path) -> None:
    theirs = result()
    theirs["runs"]["same|q"]["tokens"][1] = 0
    assert exit_code(tmp_path, theirs) == 1
    assert compare(JOB, result(), theirs)["same"].same == 3 + 1


def test_one_other_position_is_a_disagreement(tmp_path: Path) -> None:
    theirs = result()
    theirs["runs"]["same|p"]["kept"][1][0] = [1, 3]
    assert exit_code(tmp_path, theirs) == 1
    found = compare(JOB, result(), theirs)["same"]
    assert (found.equal_heads, found.common, found.kept) == (7, 15, 16)


def test_entries_that_only_the_peer_kept_are_a_disagreement(tmp_path: Path) -> None:
    theirs = result()
    theirs["runs"]["same|p"]["kept"][0][0] = [0, 1, 2]
    assert exit_code(tmp_path, theirs) == 1


def test_a_case_for_information_may_differ(tmp_path: Path) -> None:
    theirs = result()
    theirs["runs"]["own|q"]["tokens"] = [0, 0, 0]
    assert exit_code(tmp_path, theirs) == 0
    assert "differs (expected)" in table(compare(JOB, result(), theirs))


def test_half_a_result_is_no_agreement() -> None:
    missing, fewer_layers, fewer_tokens = result(), result(), result()
    del missing["runs"]["same|q"]
    with pytest.raises(KeyError):
        compare(JOB, result(), missing)
    del fewer_layers["runs"]["same|q"]["kept"][1]
    with pytest.raises(ValueError, match="layers or heads"):
        compare(JOB, result(), fewer_layers)
    del fewer_tokens["runs"]["same|q"]["tokens"][2]
    with pytest.raises(ValueError, match="shorter"):
        compare(JOB, result(), fewer_tokens)
