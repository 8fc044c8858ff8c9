"""No number makes a Triton kernel read or write elsewhere, or give what the reference does not."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import written_there  # isort: skip  # before any kernel
from refreshkv.kernels.backend import Backend, triton_backend
from tests.kernels import comparison, hostile
from tests.kernels.cases import Case
from tests.kernels.mutants import Mutant, mutated
from tests.kernels.test_triton_select import small_blocks


def with_tensors_of_the_cpu(kernels: Backend) -> Backend:
    operations: dict[str, Any] = {
        field.name: written_there(getattr(kernels, field.name))
        for field in fields(Backend)
        if field.name != "name"
    }
    return Backend(name="triton", **operations)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return with_tensors_of_the_cpu(triton_backend())


def test_a_selection_is_valid_whatever_the_numbers(backend: Backend) -> None:
    with small_blocks():
        hostile.check_select(backend.select, count=30)


def test_tokens_are_copied_from_and_to_places_that_are_there(backend: Backend) -> None:
    hostile.check_gather(backend.gather)
    hostile.check_insert(backend.insert, count=8)


@pytest.mark.parametrize(("case", "what", "number"), hostile.SPOILED, ids=str)
def test_nan_in_is_nan_out(backend: Backend, case: Case, what: str, number: float) -> None:
    hostile.check_attention(backend, replace(case, group=2, length=40), what, number)


@pytest.mark.parametrize("check", ["check_lengths", "check_indices", "check_causal"])
def test_what_counts_is_cut_to_what_there_is(backend: Backend, check: str) -> None:
    getattr(hostile, check)(backend, replace(hostile.EVERYTHING, group=1, length=40))


def test_heads_too_wide_for_a_kernel_go_to_the_reference(backend: Backend) -> None:
    comparison.check_attend(backend.attend, Case(dim=272, length=9))
    comparison.check_vote(backend.vote, Case(dim=272, length=9))


def test_shapes_of_nothing(backend: Backend) -> None:
    hostile.check_nothing(backend, torch.float32)


# From here on: what the lines are for. Those that keep a kernel within its memory are left alone, and the maximum that
# keeps a NaN: in the interpreter every one does.

NAN_KEY = replace(hostile.EVERYTHING, group=2, length=20)
MUTANTS = [
    Mutant("split", "tl.where(mass == 0, float(", "tl.where((mass > 0) == 0, float("),
    Mutant("verify", "votes += tl.sum(broken, 0)", "pass"),
    Mutant("select", "tl.maximum(budget, 0)", "budget"),
    Mutant("select", "tl.where(score > pooled, score, pooled)", "tl.maximum(score, pooled)"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_broken_rule_is_noticed(mutant: Mutant) -> None:
    with mutated(mutant, mutant.module):
        for module in ("rings", "select", "step", "verify"):
            importlib.import_module(f"refreshkv.kernels.triton.{module}")
        broken = with_tensors_of_the_cpu(triton_backend.__wrapped__())
        with pytest.raises(AssertionError):  # noqa: PT012
            if mutant.module == "select":
                with small_blocks():
                    hostile.check_select(broken.select, count=30)
            hostile.check_attention(broken, NAN_KEY, "query", hostile.NAN)
