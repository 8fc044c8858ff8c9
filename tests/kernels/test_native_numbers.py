"""No number makes a C++ kernel leave its memory, in any build, and a broken rule is noticed; `make test-sanitized`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refreshkv.kernels.backend import CPU
from refreshkv.kernels.native import attention, build
from refreshkv.kernels.native import selection as native_selection
from tests.helpers import needs_compiler
from tests.kernels import comparison, hostile
from tests.kernels.test_native import BUILDS, built, mutant

pytestmark = needs_compiler

HOLES = replace(hostile.EVERYTHING, dtype=torch.bfloat16, length=300)
CAPPED = replace(HOLES, softcap=2.0)


def check_attention() -> None:
    for what in ("query", "keys", "values", "sinks", "hidden"):
        hostile.check_attention(CPU, HOLES, what, hostile.NAN)
    hostile.check_attention(CPU, CAPPED, "keys", hostile.NAN)
    hostile.check_attention(CPU, HOLES, "query", hostile.INF)


@pytest.mark.parametrize("name", BUILDS)
def test_nan_in_is_nan_out_in_every_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = built(name)
    monkeypatch.setattr(attention, "compiled", lambda: library)
    check_attention()
    query, keys, values, options = HOLES.inputs()
    options["sinks"] = options["sinks"].float()
    options["sinks"].view(torch.int32)[1] = -1  # a NaN that rounding as a number would make 0
    assert bool(CPU.attend(query, keys, values, **options).output[:, 1].isnan().all())


def insert(store: list[torch.Tensor], ring: dict[str, torch.Tensor]) -> torch.Tensor:
    return native_selection.insert(*store, **ring)


def check_selection() -> None:
    comparison.check_select(native_selection.select)
    hostile.check_select(native_selection.select)


def check_copies() -> None:
    comparison.check_gather(native_selection.gather)
    hostile.check_gather(native_selection.gather)
    hostile.check_insert(insert)


def check_ranks() -> None:
    hostile.check_top_slots(native_selection.top_slots)


# Each leaves the kernel within its memory: without a bound it would not be there to be noticed.
MUTANTS: list[tuple[str, str, str, Callable[[], None]]] = [
    ("selection.cpp", "score > 0 ? score : 0", "score > 0.2f ? score : 0", check_selection),
    ("selection.cpp", "visible && !visible[i] ? 0.0f : counted", "counted", check_selection),
    ("selection.cpp", "back <= 2 * reach", "back < 2 * reach", check_selection),
    ("selection.cpp", "kAnchor = 2.0f", "kAnchor = 0.0f", check_selection),
    ("selection.cpp", "kRecent = 4.0f", "kRecent = 1.5f", check_selection),
    ("selection.cpp", "anchor < 0 || anchor >= end", "anchor <= 0 || anchor >= end", check_selection),
    ("selection.cpp", "ranked[anchor] = shelf.own[anchor] + lift;", "ranked[anchor] += lift;", check_selection),
    ("selection.cpp", "(job.recent[row], 0, end)", "(job.recent[row], 1, end)", check_selection),
    ("selection.cpp", "if (!visible[i]) ranked[i] = -1.0f;", ";", check_selection),
    ("selection.cpp", "(int64_t{1} << 32) + position", "(int64_t{1} << 32) + (position ^ 1)", check_selection),
    ("selection.cpp", "std::nth_element(keys.begin(), keys.end() - count, keys.end());", "", check_selection),
    ("selection.cpp", "std::sort(keys.end() - count, keys.end());", "", check_selection),
    ("selection.cpp", "if (heads && !heads[part]) continue;", "", check_copies),
    ("selection.cpp", "wanted[slot] >= 0 &&", "wanted[slot] > 0 &&", check_copies),
    ("selection.cpp", "(next % budget + budget) % budget", "next < 0 ? 0 : next % budget", check_copies),
    ("selection.cpp", "== held + job.slots)\n", "!= nullptr)\n", check_copies),
    ("selection.cpp", "held[slot] = position;", ";", check_copies),
    ("selection.cpp", "uint64_t(job.pushed[part]) + 1", "uint64_t(job.pushed[part])", check_copies),
    ("selection.cpp", "static_cast<int64_t>(missing.size())", "0", check_copies),
    ("selection.cpp", "slot == newest[part] ? -1.0f : ", "", check_ranks),
    ("selection.cpp", "keys[place - 1] < key; --place", "keys[place - 1] > key; --place", check_ranks),
    ("attention.cpp", "result.total[i] == 0;", "!(result.total[i] > 0);", check_attention),
    ("attention.cpp", "broken += factors[i] * 0;", ";", check_attention),
    ("attention.cpp", "part.visible ? part.visible + place : nullptr, bench", "nullptr, bench", check_attention),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "check"), MUTANTS, ids=[m[1] for m in MUTANTS])
def test_a_broken_rule_is_noticed(
    file: str,
    old: str,
    new: str,
    check: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = native_selection if file == "selection.cpp" else attention
    healthy = module.compiled()
    broken: ctypes.CDLL = mutant(file, old, new, file, tmp_path, monkeypatch)
    for name in ("attend",) if module is attention else ("select", "gather", "insert", "top_slots"):
        kernel = f"refreshkv_{name}"
        getattr(broken, kernel).argtypes = getattr(healthy, kernel).argtypes
    monkeypatch.setattr(module, "compiled", lambda: broken)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [check_attention, check_selection, check_copies, check_ranks])
def test_the_checks_pass_unbroken(check: Callable[[], None]) -> None:
    assert build.library() is not None
    check()
