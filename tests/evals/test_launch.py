"""One process is a team of its own; what several do is in tests/cli/test_eval.py."""

from __future__ import annotations

import sys

import pytest

from refreshkv.evals.launch import Team, join, on_cpu


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_needs_no_accelerate(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    team = join(cpu=True)
    assert team == Team(0, 1)
    assert team.is_main
    team.wait()
    team.leave()


def test_several_processes_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModuleNotFoundError, match="accelerate: pip install"):
        join(cpu=True)


@pytest.mark.parametrize(
    "gpus, cpu, told", [(False, False, True), (True, False, False), (True, True, True)]
)
def test_accelerate_is_told_of_the_cpu(
    gpus: bool, cpu: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun nothing else says it, and each process would take itself for the only one."""

    class State:
        process_index, num_processes = 1, 2

        def __init__(self, cpu: bool, timeout: object) -> None:
            seen.append(cpu)

    seen: list[bool] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    monkeypatch.setattr("accelerate.PartialState", State)
    team = join(cpu=cpu)
    assert (team.rank, team.size, team.is_main) == (1, 2, False)
    assert seen == [told]


def test_the_launcher_may_want_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert not on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert on_cpu()
