"""`bench.kernels`: every kernel is timed, and none that is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refreshkv.bench import kernels
from refreshkv.bench.checks import WrongResultError
from refreshkv.bench.job import Job
from refreshkv.bench.record import read
from refreshkv.kernels.backend import CPU, Backend
from refreshkv.policy.selection import Selected

SMALL = {"shape": "demo", "dtype": "float32", "context": 96, "batch": 2, "budget": 16, "draft": 3}
NAMES = [
    *("attend", "attend_and_rank", "attend_at", "attend_full", "attend_and_score"),
    *("score", "select", "refresh", "verify", "attend_mixed", "encode"),
]
JOB = Job(**SMALL)


def test_every_kernel(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    found = kernels.run(**SMALL, steps=1, results=path, progress=False)
    assert [one["kernel"] for one in found["kernels"]] == NAMES
    for one in found["kernels"]:
        assert one["ms"] > 0 and one["rival_ms"] > 0 and one["relative_rms_error"] < 2e-6
        assert one["rival_over_ours"] == pytest.approx(one["rival_ms"] / one["ms"], rel=1e-3)
        share = one["bytes"] / (one["ms"] * 1e-3) / 1e9
        assert one["bandwidth_share"] == pytest.approx(share, rel=1e-3)
    # 2 rows, 2 KV heads of 64 numbers of 4 bytes: K and V
    moved = {one["kernel"]: one["bytes"] for one in found["kernels"]}
    assert (
        moved["attend"] == 2 * 2 * 2 * 64 * 4 * 16 and moved["attend_full"] == 6 * moved["attend"]
    )
    # One block of 64 in two bits, a grid of 16 bits for each of its channels; 16 exact entries and the 32 after it.
    codes = 2 * 2 * 2 * 64 * (64 * 2 + 16) // 8
    assert moved["attend_mixed"] == codes + 3 * moved["attend"]
    assert moved["encode"] == codes + 4 * moved["attend"]
    rows = read(path)
    assert [row["kernel"] for row in rows] == NAMES
    assert rows[0]["versions.torch"] == torch.__version__


def broken(name: str, run: Callable[..., Any]) -> Backend:
    return dataclasses.replace(CPU, **{name: run})


def shifted(*given: Any, **options: Any) -> Selected:
    found = CPU.select(*given, **options)
    return Selected(found.positions + 7, found.filled)


@pytest.mark.parametrize(
    "name, backend, message",
    [
        (
            "refresh",
            broken("refresh", lambda *given, **ring: None),
            "refresh: differs from the reference",
        ),
        ("select", broken("select", shifted), "select: .* of its indices"),
        (
            "attend_full",
            broken("attend", lambda query, *rest: CPU.attend(query * 1.01, *rest)),
            "attend_full: differs",
        ),
        (
            "verify",
            broken(
                "verify",
                lambda *given, starts, **guess: CPU.verify(*given, starts=starts - 1, **guess),
            ),
            "verify: differs",
        ),
        (
            "attend_mixed",
            broken(
                "attend_mixed",
                lambda *given, budget, **rows: CPU.attend_mixed(*given, budget=budget * 0, **rows),
            ),
            "attend_mixed: differs",
        ),
        ("encode", broken("encode", lambda *given, **rows: None), "encode: differs"),
    ],
)
def test_a_wrong_kernel_is_found(name: str, backend: Backend, message: str) -> None:
    case, given = kernels.cases_of(JOB, CPU)[name], kernels.Operands(JOB, seed=0)
    assert kernels.check(name, case, CPU, given, torch.float32) < 2e-6
    with pytest.raises(WrongResultError, match=message):
        kernels.check(name, case, backend, given, torch.float32)


def test_rows_are_written_as_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at the fourth kernel, as by a time limit: three rows are there."""
    path, right, calls = tmp_path / "kernels.csv", kernels.take_turns, []

    def turns(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(kernels, "take_turns", turns)
    with pytest.raises(KeyboardInterrupt):
        kernels.run(**SMALL, steps=1, results=path, progress=False)
    assert [row["kernel"] for row in read(path)] == NAMES[:3]


def test_a_rival_that_does_not_run_and_a_kernel_without_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_compiler(*given: Any) -> None:
        raise RuntimeError("no compiler\nand more")

    def no_memory(*given: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    rivals = kernels.attention_rivals
    monkeypatch.setattr(
        kernels, "attention_rivals", lambda *given: {**rivals(*given), "other": no_compiler}
    )
    monkeypatch.setattr(kernels, "_refresh", no_memory)
    found = kernels.run(**SMALL, steps=1, progress=False)
    assert found["notes"] == {
        "refresh": "left out: OutOfMemoryError: no room",
        "other": "left out: RuntimeError: no compiler",
    }
    assert [one["kernel"] for one in found["kernels"]] == [n for n in NAMES if n != "refresh"]


def test_a_rival_that_no_graph_can_hold_is_timed_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def capture(one: Any, device: torch.device) -> bool:
        asked.append(one)
        if len(asked) > 1:
            raise RuntimeError("not permitted when stream is capturing")
        return True

    monkeypatch.setattr(kernels.Timed, "capture", capture)
    case, given = kernels.cases_of(JOB, CPU)["attend"], kernels.Operands(JOB, seed=0)
    found = kernels._timed(case, CPU, [given], JOB)
    assert found["cuda_graph"] and found["rival_ms"] > 0 and len(asked) == 3


@pytest.mark.parametrize("rows", [1, 2])
def test_rivals_compute_the_same(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(rows, *size, 64, generator=generator) for size in ((4,), (2, 9), (2, 9))
    )
    expected = kernels.REFERENCE.attend(
        query, kernels.Entries(keys, values), kernels.AttendOptions(scale=0.125)
    ).output
    found = kernels.attention_rivals(torch.device("cpu"), rows)
    assert set(found) == {"torch sdpa", "torch sdpa, not packed"}
    for rival in found.values():
        torch.testing.assert_close(rival(query, keys, values), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_error_of_a_hundredth_is_found_in_16_bits(dtype: str) -> None:
    job = Job(**{**SMALL, "dtype": dtype, "context": 192})
    given = kernels.Operands(job, seed=0)
    for name, case in kernels.cases_of(job, CPU).items():
        kernels.check(name, case, CPU, given, job.dtype)
    wrong = broken(
        "attend",
        lambda *rest: CPU.attend(*rest)._replace(output=CPU.attend(*rest).output * 1.01),
    )
    with pytest.raises(WrongResultError, match="attend_full: differs"):
        kernels.check(
            "attend_full", kernels.cases_of(job, CPU)["attend_full"], wrong, given, job.dtype
        )


def test_less_than_a_block_has_no_codes() -> None:
    names = set(kernels.cases_of(Job(**{**SMALL, "context": 63}), CPU))
    assert names == {*NAMES} - {"attend_mixed", "encode"}


def test_operands_differ_and_select_what_is_gathered() -> None:
    first, second = kernels.Operands(JOB, 0), kernels.Operands(JOB, 1)
    assert not torch.equal(first.full.keys, second.full.keys)
    row, head, slot = 1, 0, 3
    position = first.positions[row, head, slot]
    assert torch.equal(first.kept.keys[row, head, slot], first.full.keys[row, head, position])
