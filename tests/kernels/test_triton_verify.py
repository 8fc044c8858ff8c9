"""The Triton kernels for several queries of a row equal the reference, and a broken one is noticed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import run_there  # isort: skip  # before any kernel
from refreshkv.kernels import REFERENCE, triton_verify
from tests.kernels.comparison import CASES, EVERYTHING, PER_HEAD, PLAIN, TOLERANCE, Case
from tests.kernels.comparison import check_verify, check_vote

CHECKS = {"verify": check_verify, "vote": check_vote}
EVERY_OP = pytest.mark.parametrize("op", CHECKS)
SHORT = [case for case in CASES + PER_HEAD if case.length < 1000]


@EVERY_OP
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_equals_the_reference(op: str, case: Case) -> None:
    CHECKS[op](run_there(getattr(triton_verify, op)), case)
