"""No number makes a Triton kernel read or write elsewhere, or give what the reference does not."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import run_there, there  # isort: skip  # before any kernel
from refreshkv.kernels.backend import Backend, triton_backend
from tests.kernels import hostile
from tests.kernels.comparison import Case
from tests.kernels.mutants import Mutant, mutated
from tests.kernels.test_triton_select import small_blocks


def with_tensors_of_the_cpu(kernels: Backend) -> Backend:
    def gather(source: Tensor, positions: Tensor, out: Tensor) -> None:
        moved = there(out)
        kernels.gather(there(source), there(positions), moved)
        out.copy_(moved)

    def insert(*store: Tensor, **ring: Tensor) -> Tensor:
        moved = {name: there(tensor) for name, tensor in ring.items()}
        entered = kernels.insert(*map(there, store), **moved)
        for name, tensor in ring.items():
            tensor.copy_(moved[name])
        return entered.cpu()

    others: dict[str, Any] = {
        field.name: run_there(getattr(kernels, field.name))
        for field in fields(Backend)
        if field.name not in ("name", "gather", "insert")
    }
    return Backend(name="triton", gather=gather, insert=insert, **others)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return with_tensors_of_the_cpu(triton_backend())


def test_a_selection_is_valid_whatever_the_numbers(backend: Backend) -> None:
    with small_blocks():
        hostile.check_select(backend.select, count=30)


def test_tokens_are_copied_from_and_to_places_that_are_there(backend: Backend) -> None:
    hostile.check_gather(backend.gather)
    hostile.check_insert(lambda store, ring: backend.insert(*store, **ring), count=8)


@pytest.mark.parametrize(("case", "what", "number"), hostile.SPOILED, ids=str)
def test_nan_in_is_nan_out(backend: Backend, case: Case, what: str, number: float) -> None:
    hostile.check_attention(backend, replace(case, group=2, length=40), what, number)


def test_lengths_and_places_are_those_that_are_there(backend: Backend) -> None:
    few = replace(hostile.EVERYTHING, group=1, length=40)
    hostile.check_lengths(backend, few)
    hostile.check_places(backend, few)
    hostile.check_causal(backend, few)


def test_shapes_of_nothing(backend: Backend) -> None:
    hostile.check_nothing(backend, torch.float32)


# From here on: what the lines are for. Those that keep a kernel within its memory are left alone, and the maximum that
# keeps a NaN: in the interpreter every one does.

NAN_KEY = replace(hostile.EVERYTHING, group=2, length=20)
MUTANTS = [
    Mutant("triton_split", "tl.where(mass == 0, float(", "tl.where((mass > 0) == 0, float("),
    Mutant("triton_verify", "votes += tl.sum(broken, 0)", "pass"),
    Mutant("triton_radix", "need = tl.maximum(need, 0)", "pass"),
    Mutant("triton_select", "tl.where(score > pooled, score, pooled)", "tl.maximum(score, pooled)"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_broken_rule_is_noticed(mutant: Mutant) -> None:
    with mutated(mutant, mutant.module):
        for module in ("full", "insert", "partial", "select", "verify"):
            importlib.import_module(f"refreshkv.kernels.triton.{module}")
        broken = with_tensors_of_the_cpu(triton_backend.__wrapped__())
        with pytest.raises(AssertionError):  # noqa: PT012
            if mutant.module in ("triton_select", "triton_radix"):
                with small_blocks():
                    hostile.check_select(broken.select, count=30)
            hostile.check_attention(broken, NAN_KEY, "query", hostile.NAN)
