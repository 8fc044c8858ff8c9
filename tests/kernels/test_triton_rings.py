"""Rings are kept in Triton as the reference says, what is counted with them too, and a broken kernel is noticed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import run_there, written_there  # isort: skip  # before any kernel
from tests.kernels import rings
from tests.kernels.cases import Case

MODULES = {
    "write": "begin",
    "drift": "begin",
    "push": "rings",
    "fetch": "rings",
    "refresh": "rings",
}

pytestmark = pytest.mark.usefixtures("poisoned")


def kernels(module: str) -> Any:
    return importlib.import_module(f"refreshkv.kernels.triton.{module}")


def check(name: str, module: Any) -> None:
    if name == "drift":
        rings.check_drift(run_there(module.drift))
    else:
        rings.check_writer(name, written_there(getattr(module, name)))


@pytest.mark.parametrize("name", MODULES)
def test_it_equals_the_reference(name: str) -> None:
    check(name, kernels(MODULES[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_written_where_it_is_wanted(dtype: torch.dtype) -> None:
    case = Case(length=300, sinks=True, value_dim=48, dtype=dtype)
    rings.check_into(written_there(kernels("step").attend_and_score), case)
