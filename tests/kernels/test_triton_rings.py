"""Rings are kept in Triton as the reference says, what is counted with them too, and a broken kernel is noticed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import run_there, written_there  # isort: skip  # before any kernel
from tests.kernels import rings
from tests.kernels.cases import Case
from tests.kernels.mutants import Mutant, mutated

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


# From here on: what the lines of the kernels are for. A hostile row or page is among the inputs above. No mutant writes
# outside of its tensors: interpreted, it would write into whatever lies there.

CHANGES = {
    ("write", "begin"): (
        ("kept, head, start + token, inside", "kept, head, start + token * 0, inside"),
        ("(block == 0)", "(block > 0)"),
        ("available = start + count", "available = count"),
        ("add_to(tally, row, head, STEP, one, tells)", "pass"),
        ("if FULL:", "if not FULL:"),
        ("token * value_token", "token * 0"),
        ("keys_ptr += row * key_row", "keys_ptr += row * 0"),
    ),
    ("drift", "begin"): (
        ("query_ptr += head * MEMBERS", "query_ptr += 0 * MEMBERS"),
        ("total / MEMBERS", "total / (MEMBERS + 1)"),
        ("tl.where(cosine > 1, 1.0, cosine) <= threshold", "tl.where(cosine > 1, 1.0, cosine) < threshold"),
        ("(steps % stride == 0) & drifted", "drifted"),
        (") & drifted)", "))"),
        ("| empty)", ")"),
        ("tl.load(state_ptr + STEPS * counters + own) + 1", "tl.load(state_ptr + STEPS * counters + own)"),
        ("STEPS * counters", "0 * counters"),
    ),
    ("push", "rings"): (
        ("slot_after(filled + pushed, room) + one", "slot_after(pushed, room) + one"),
        ("- BACK", "- 0"),
        ("tl.store(positions_ptr + slot, position.to(tl.int32), mask=enters)", "pass"),
        ("pushed += tl.sum(enters.to(tl.int64), 0)", "pass"),
        ("tl.load(steps_at) + 1", "tl.load(steps_at)"),
        ("head, NEWEST) + one, slot)", "head, NEWEST) + one, slot * 0)"),
        ("used = tl.minimum(filled + pushed, room)", "used = filled + pushed"),
        ("row * kv_heads + head) == 0", "row * kv_heads + head) != 0"),
    ),
    ("fetch", "rings"): (
        ("(held == 0)", "(held == held)"),
        ("filled + pushed + order, room", "filled + pushed + 0 * order, room"),
        ("order >= total - room", "order < room"),
        ("wanted = before.to(tl.int64) + 1", "wanted = before.to(tl.int64)"),
        ("(wanted < tl.load(ends_ptr + row))", "(wanted == wanted)"),
        ("tl.store(pushed_at, pushed + total)", "pass"),
        ("head, FETCHED), total)", "head, FETCHED), total * 0)"),
        ("row, head, kv_heads, total)", "row, head, kv_heads, total * 0)"),
    ),
    ("refresh", "rings"): (
        ("meant = (slot < count)", "meant = (slot < count - 1)"),
        ("tl.store(positions_ptr + slot, wanted, mask=slot < ring.slots)", "pass"),
        ("head, FILLED), filled)", "head, FILLED), none)"),
        ("head, STEPS), none)", "head, STEPS), none + 1)"),
        ("tl.minimum(filled, room_of(ring, own))", "filled"),
        ("tl.store(reference_ptr + dims, summary", "tl.store(reference_ptr + dims, summary * 0"),
        ("- tl.load(hidden_ptr + row)", "- 0"),
        ("FULL_STEP, none + 1", "FULL_STEP, none"),
    ),
    ("push", "books"): (
        ("tells = tells & tl.load(tally.rows_ptr + row)", "pass"),
        ("row * tally.row + head", "row * 0 + head"),
    ),
    ("fetch", "books"): (
        ("tl.load(at) + amount", "amount"),
        ("ring.values_ptr + own *", "ring.values_ptr + 0 *"),
    ),
    ("refresh", "books"): (
        ("slot * ring.key_entry", "slot // 2 * ring.key_entry"),
        ("tl.load(ring.budget_ptr + own)", "tl.load(ring.budget_ptr)"),
    ),
    ("refresh", "layout"): (
        ("heads_ptr + row * kv_heads + head", "heads_ptr + row * kv_heads"),
        ("page * store.key_row", "row * store.key_row"),
    ),
    ("push", "layout"): (("page * store.value_row", "page // 2 * store.value_row"),),
}  # fmt: skip
MUTANTS = [
    (name, Mutant(module, *change))
    for (name, module), changes in CHANGES.items()
    for change in changes
]


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, MODULES[name]) as broken, pytest.raises(AssertionError):
        check(name, broken)


def test_a_merge_that_writes_too_much_is_noticed() -> None:
    mutant = Mutant(
        "common", "if not tl.load(heads_ptr + (row * queries + query) // MEMBERS):", "if False:"
    )
    with mutated(mutant, "step") as broken, pytest.raises(AssertionError):
        rings.check_into(written_there(broken.attend_and_score), Case(length=300))
