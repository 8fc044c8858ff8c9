"""The CPU kernels equal the reference in every case, and a broken one is noticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import CPU, REFERENCE, Backend, backend_for, cpu, reference
from refreshkv.kernels.cpu_threads import in_shares
from refreshkv.policy.selection import FREE, Selection
from tests.kernels.comparison import (
    ATTENTION_CHECKS,
    CASES,
    EVERYTHING,
    PER_HEAD,
    PLAIN,
    TOLERANCE,
    Case,
    check_attend,
    check_gather,
    check_select,
    check_verify,
)

OPS = [field.name for field in fields(Backend) if field.name != "name"]
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("op", OPS)
def test_signatures_are_those_of_the_reference(op: str) -> None:
    assert inspect.signature(getattr(CPU, op)) == inspect.signature(getattr(REFERENCE, op))


def test_cpu_tensors_get_the_cpu_kernels_and_other_devices_the_reference() -> None:
    assert backend_for(torch.device("cpu")) is CPU
    assert backend_for(torch.device("meta")) is REFERENCE


@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", ATTENTION_CHECKS)
def test_equals_the_reference(op: str, case: Case, dtype: torch.dtype) -> None:
    ATTENTION_CHECKS[op](getattr(CPU, op), replace(case, dtype=dtype))


@pytest.mark.parametrize("case", PER_HEAD, ids=str)
@pytest.mark.parametrize("op", ATTENTION_CHECKS)
def test_each_head_may_be_masked_differently(op: str, case: Case) -> None:
    ATTENTION_CHECKS[op](getattr(CPU, op), case)


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, *CASES[-2:]], ids=str)
def test_without_the_fused_kernel_of_torch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "flash", None)
    check_attend(cpu.attend, case)


def test_gather_writes_the_filled_slots_and_nothing_else() -> None:
    check_gather(cpu.gather)


def test_select_equals_the_worked_examples() -> None:
    check_select(cpu.select)


@pytest.mark.parametrize("budget", [[40, 40], [40, 3], [1, 2]], ids=str)
def test_insert_leaves_what_the_reference_leaves(budget: list[int]) -> None:
    gen = torch.Generator().manual_seed(sum(budget))
    store = torch.randn(2, 2, 2, 90, 8, generator=gen).unbind(0)
    # Rings that hold the places from 0, and three other places and one free entry to come, of which some are there.
    ring: dict[str, Tensor] = {
        "ring_keys": torch.randn(2, 2, 40, 8, generator=gen),
        "ring_values": torch.randn(2, 2, 40, 8, generator=gen),
        "ring_positions": torch.arange(40).expand(2, 2, -1).clone(),
        "filled": torch.tensor([[40, 30], [3, 1]]),
        "pushed": torch.tensor([[0, 15], [1, 0]]),
    }
    wanted = torch.tensor([[[80, 5, 81, 82], [7, FREE, 3, 9]], [[50, 51, 52, 53], [60, 2, 61, 62]]])
    theirs = {name: tensor.clone() for name, tensor in ring.items()}
    entered = cpu.insert(*store, wanted, **ring, budget=torch.tensor(budget))
    assert torch.equal(
        entered, reference.insert(*store, wanted, **theirs, budget=torch.tensor(budget))
    )
    for name, tensor in ring.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("threads", [1, 3])
def test_verify_on_threads_of_its_own_leaves_torch_its_number(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            check_verify(CPU.verify, Case(length=5000, kv_heads=2, rows=2))
        assert torch.get_num_threads() == threads
        seen: list[int] = []
        other = Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [threads]
    finally:
        torch.set_num_threads(before)


def test_a_failure_on_a_thread_is_raised() -> None:
    def work(items: Sequence[int]) -> None:
        if 1 in items:
            raise ValueError("one")

    with pytest.raises(ValueError, match="one"):
        in_shares(work, [0, 1, 2])


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("op", ATTENTION_CHECKS)
def test_the_default_dtype_does_not_matter(op: str) -> None:
    ATTENTION_CHECKS[op](getattr(CPU, op), EVERYTHING)


# From here on: the comparisons notice what is wrong.

BREAKS: dict[str, Callable[[Any], Any]] = {
    "scale": lambda scale: scale * 1.1,
    "softcap": lambda softcap: None,
    "sinks": lambda sinks: sinks + 0.25,
    "visible": lambda visible: None,
    "reduction": lambda reduction: "max" if reduction == "mean" else "mean",
    "newest": lambda newest: newest * 0,
    "starts": lambda starts: starts - 1,
    "counts": lambda counts: None,
    "window": lambda window: None if window is None else window + 1,
}


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("op", "option"),
    [
        (op, option)
        for op in ATTENTION_CHECKS
        for option in BREAKS
        if option in inspect.signature(getattr(CPU, op)).parameters
    ],
)
def test_a_wrong_option_is_noticed(op: str, option: str, dtype: torch.dtype) -> None:
    def broken(*tensors: Tensor, **options: Any) -> Any:
        return getattr(CPU, op)(*tensors, **options | {option: BREAKS[option](options[option])})

    with pytest.raises(AssertionError, match="is off by"):
        ATTENTION_CHECKS[op](broken, replace(EVERYTHING, dtype=dtype))


@pytest.mark.parametrize(
    "broken",
    [
        lambda source, positions, out, heads: cpu.gather(source, positions, out),
        lambda source, positions, out, heads: cpu.gather(source, positions.clamp(0), out, heads),
        lambda source, positions, out, heads: cpu.gather(source.flip(2), positions, out, heads),
    ],
    ids=["heads ignored", "free slots written", "other rows"],
)
def test_a_wrong_gather_is_noticed(broken: Callable[..., None]) -> None:
    with pytest.raises(AssertionError):
        check_gather(broken)


def _earlier_token_wins(
    scores: Tensor, budget: Tensor, *, visible: Tensor, **options: Any
) -> Selection:
    chosen = cpu.select(scores.flip(-1), budget, visible=visible.flip(-1), **options)
    return chosen._replace(positions=scores.shape[-1] - 1 - chosen.positions)


@pytest.mark.parametrize(
    "broken",
    [
        lambda scores, budget, **o: cpu.select(scores, budget, **o | {"visible": None}),
        lambda scores, budget, **o: cpu.select(scores, budget, **o | {"pool_kernel": 1}),
        lambda scores, budget, **o: cpu.select(scores, budget - 1, **o),
        _earlier_token_wins,
        lambda scores, budget, **o: cpu.select(scores, budget, **o | {"recent": 0}),
        lambda scores, budget, **o: cpu.select(scores, budget, **o | {"anchors": None}),
        lambda scores, budget, **o: cpu.select(scores, budget, **o | {"ends": None}),
    ],
    ids=[
        "mask ignored",
        "not pooled",
        "one too few",
        "earlier token wins",
        "recent ignored",
        "anchors ignored",
        "ends ignored",
    ],
)
def test_a_wrong_selection_is_noticed(broken: Callable[..., Selection]) -> None:
    with pytest.raises(AssertionError):
        check_select(broken)
