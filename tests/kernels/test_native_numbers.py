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
from refreshkv.kernels.native import rings as native_rings
from refreshkv.kernels.native import selection as native_selection
from tests.helpers import needs_compiler
from tests.kernels import comparison, hostile, rings
from tests.kernels.cases import LAYOUTS
from tests.kernels.test_native import BUILDS, built, mutant

pytestmark = needs_compiler

HOLES = replace(hostile.EVERYTHING, dtype=torch.bfloat16, length=300)
CAPPED = replace(HOLES, softcap=2.0)


def check_attention() -> None:
    for what in ("query", "keys", "values", "sinks", "hidden"):
        hostile.check_attention(CPU, HOLES, what, hostile.NAN)
    hostile.check_attention(CPU, CAPPED, "keys", hostile.NAN)
    hostile.check_attention(CPU, HOLES, "query", hostile.INF)
    for layout in LAYOUTS[1:]:
        hostile.check_attention(CPU, replace(HOLES, layout=layout), "hidden", hostile.NAN)
    hostile.check_indices(CPU, replace(hostile.EVERYTHING, length=64))


@pytest.mark.parametrize("name", BUILDS)
def test_nan_in_is_nan_out_in_every_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = built(name)
    monkeypatch.setattr(attention, "compiled", lambda: library)
    check_attention()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query, entries, options = replace(HOLES, dtype=dtype).inputs()
        options.sinks.view(torch.int32 if dtype == torch.float32 else torch.int16)[1] = -1
        assert bool(CPU.attend(query, entries, options).output[:, 1].isnan().all())
        query[0, 1, 3] = entries.keys[1, 1, 150, 5] = torch.nan
        for kept in (query[0, 1], entries.keys[1, 1, 150]):  # any NaN, whatever its bits
            bits = kept.view(torch.int32 if dtype == torch.float32 else torch.int16)
            bits[kept.isnan()] = -1
        output = CPU.attend(query, entries, options).output
        assert bool(output[0, 1].isnan().all() and output[1, 4:].isnan().all())


def check_selection() -> None:
    comparison.check_select(native_selection.select)
    hostile.check_select(native_selection.select)


def check_rings() -> None:
    for name in rings.WRITERS:
        rings.check_writer(name, getattr(native_rings, name), count=48)


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
    ("rings.cpp", "return static_cast<int64_t>(uint64_t(a) - uint64_t(b));", "return a;", check_rings),
    ("rings.cpp", "slot * value.token, from_value", "slot * value.token, from_key", check_rings),
    ("rings.cpp", "(row * kv_heads + head) * slots", "head * slots", check_rings),
    ("rings.cpp", "state[(which * kept + row)", "state[(which * kept)", check_rings),
    ("rings.cpp", "(held(row, head) % room + room) % room", "held(row, head) % room * 0", check_rings),
    ("rings.cpp", "plus(counter(kFilled, row, head), ", "plus(0, ", check_rings),
    ("rings.cpp", "std::min(held(row, head), room(row))", "held(row, head)", check_rings),
    ("rings.cpp", "(rows && !rows[of_row])", "false", check_rings),
    ("rings.cpp", "of_row * row + of_head * head", "of_row * row", check_rings),
    ("rings.cpp", "sum = plus(sum, amount);", "sum = amount;", check_rings),
    ("rings.cpp", "if (job.full) job.tally.add(kFull, row, head, 1);", "", check_rings),
    ("rings.cpp", "if (job.full) job.tally.add(kRead", "job.tally.add(kRead", check_rings),
    ("rings.cpp", "job.tally.add(kStep, row, head, 1);", ";", check_rings),
    ("rings.cpp", "held.find(plus(job.starts[row], token)", "held.find(job.starts[row]", check_rings),
    ("rings.cpp", "new_value + token * job.value.token", "new_value", check_rings),
    ("rings.cpp", "minus(job.at[row], job.back)", "job.at[row]", check_rings),
    ("rings.cpp", "[slot] = static_cast<int32_t>(position);", "[slot] = -1;", check_rings),
    ("rings.cpp", "steps = plus(steps, 1);", ";", check_rings),
    ("rings.cpp", "ring.counter(kNewest, into, head) = slot;", ";", check_rings),
    ("rings.cpp", "ring.counter(kFetched, into, head) = 0;\n", "\n", check_rings),
    ("rings.cpp", "add(kRead, row, head, ring.counter(kUsed, into, head))", "add(kRead, row, head, 1)", check_rings),
    ("rings.cpp", "add(kRead, row, head, entered)", "add(kRead, row, head, 1)", check_rings),
    ("rings.cpp", "if (after < job.ends[row]) ", "", check_rings),
    ("rings.cpp", "== positions + ring.slots)\n", "!= nullptr)\n", check_rings),
    ("rings.cpp", "positions[slot] = one.position;", ";", check_rings),
    ("rings.cpp", "ring.counter(kFetched, into, head) = entered;", ";", check_rings),
    ("rings.cpp", "(job.heads && !job.heads[part])) continue;", "false) continue;", check_rings),
    ("rings.cpp", "if (key) ring.put(into, head, slot, key, value);", ";", check_rings),
    ("rings.cpp", "std::fill(positions + count, positions + ring.slots, -1);", ";", check_rings),
    ("rings.cpp", "{kPushed, kSteps, kFetched}", "{kPushed, kFetched}", check_rings),
    ("rings.cpp", "ring.counter(kFilled, into, head) = job.filled[part];", ";", check_rings),
    ("rings.cpp", "if (job.reference) std::copy_n", "if (false) std::copy_n", check_rings),
    ("rings.cpp", "minus(job.ends[row], job.hidden[row])", "job.ends[row]", check_rings),
    ("selection.cpp", "slot == newest[part] ? -1.0f : ", "", check_ranks),
    ("selection.cpp", "keys[rank - 1] < key; --rank", "keys[rank - 1] > key; --rank", check_ranks),
    ("chunk.h", "result.total[i] == 0;", "!(result.total[i] > 0);", check_attention),
    ("attention.cpp", "broken += factors[i] * 0;", ";", check_attention),
    ("entries.h", "keys[i] = values[i] = none;", "keys[i] = none;", check_attention),
    ("entries.h", "visible && !visible[i] ? -1 : position", "position", check_attention),
    ("entries.h", "position < 0 || position >=", "position <= 0 || position >=", check_attention),
    ("entries.h", "row >= 0 && row < among ? row : -1", "row > 0 && row < among ? row : -1", check_attention),
    ("entries.h", "if (of_list < 0) there_ = false;", "if (of_list < 0) there_ = true;", check_attention),
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
    module, names = {
        check_attention: (attention, ("attend",)),
        check_rings: (native_rings, rings.WRITERS),
    }.get(check, (native_selection, ("select", "top_slots")))
    healthy, source = module.compiled(), f"{module.__name__.rpartition('.')[2]}.cpp"
    broken: ctypes.CDLL = mutant(file, old, new, source, tmp_path, monkeypatch)
    for name in names:
        kernel = f"refreshkv_{name}"
        getattr(broken, kernel).argtypes = getattr(healthy, kernel).argtypes
    monkeypatch.setattr(module, "compiled", lambda: broken)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [check_attention, check_selection, check_rings, check_ranks])
def test_the_checks_pass_unbroken(check: Callable[[], None]) -> None:
    assert build.library() is not None
    check()
