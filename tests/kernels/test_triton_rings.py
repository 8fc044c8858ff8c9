"""Rings are filled in Triton as the reference says, and a broken kernel is noticed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import written_there  # isort: skip  # before any kernel
from refreshkv.kernels import reference
from refreshkv.kernels.options import Entries
from refreshkv.policy.selection import FREE
from tests.kernels.cases import SPARE_ROWS, WHOLE, Case
from tests.kernels.comparison import check_gather
from tests.kernels.mutants import Mutant, mutated

triton_rings = importlib.import_module("refreshkv.kernels.triton.rings")

pytestmark = pytest.mark.usefixtures("poisoned")


def check_gathered(module: Any) -> None:
    check_gather(written_there(module.gather))


def test_gather_writes_the_filled_slots_and_nothing_else() -> None:
    check_gathered(triton_rings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [80, 256])
def test_gather_copies_every_bit(dim: int, dtype: torch.dtype) -> None:
    """Several blocks of slots; K and V beside each other; heads as columns."""
    gen = torch.Generator().manual_seed(dim)
    both = torch.randn(2, 200, 2, 2 * dim, generator=gen).to(dtype).transpose(1, 2)
    entries = Entries(both[..., :dim], both[..., dim:])
    wanted = torch.randint(-1, 200, (2, 2, 150), generator=gen).int()
    heads = torch.tensor([[True, False], [True, True]]).T
    ours, theirs = (
        {name: torch.zeros(2, 2, 160, dim, dtype=dtype) for name in ("ring_keys", "ring_values")}
        for _ in range(2)
    )
    written_there(triton_rings.gather)(entries, wanted, **ours, heads=heads)
    reference.gather(entries, wanted, **theirs, heads=heads)
    for name, ring in theirs.items():
        assert torch.equal(ours[name], ring), name


def rings(
    budget: list[int], wanted: int, slots: int, case: Case
) -> tuple[Entries, Tensor, dict[str, Tensor]]:
    """A store, what is wanted from it, and rings that hold some of that already."""
    gen = torch.Generator().manual_seed(slots)
    rows, heads, length = len(budget), case.kv_heads, case.length
    _, entries, _ = case.inputs()
    kept = rows if entries.rows is None else rows + SPARE_ROWS
    asked = torch.rand(rows, heads, length, generator=gen).argsort(-1)[..., :wanted]
    asked[0, 0, 0] = FREE
    capacity = torch.tensor([*budget, *[slots] * (kept - rows)])
    filled = torch.randint(0, slots + 1, (kept, heads), generator=gen).minimum(capacity[:, None])
    taken = torch.arange(slots) < filled[..., None]
    held = torch.rand(kept, heads, length, generator=gen).argsort(-1)[..., :slots]
    assert entries.values is not None
    ring_keys, ring_values = (
        torch.randn(kept, heads, slots, x.shape[-1], generator=gen).to(case.dtype)
        for x in (entries.keys, entries.values)
    )
    return (
        entries,
        asked.int(),
        {
            "ring_keys": ring_keys,
            "ring_values": ring_values,
            "ring_positions": torch.where(taken, held, FREE).int(),
            "filled": filled,
            "pushed": torch.randint(0, 9, (kept, heads), generator=gen),
            "budget": capacity,
        },
    )


def check_inserted(module: Any) -> None:
    for layout in WHOLE:
        for budget, wanted, slots, dim, dtype in (
            ([9, 9], 1, 9, 64, torch.float32),
            ([9, 4, 6], 3, 9, 80, torch.bfloat16),
            ([1, 2], 3, 2, 128, torch.float16),
            ([30], 8, 31, 64, torch.float32),
        ):
            case = Case(len(budget), length=40, dim=dim, value_dim=48, layout=layout, dtype=dtype)
            entries, asked, theirs = rings(budget, wanted, slots, case)
            ours = {name: tensor.clone() for name, tensor in theirs.items()}
            # Columns of something wider, as a view may be.
            ours["pushed"] = ours["pushed"].repeat_interleave(2, 1)[:, ::2]
            entered = written_there(module.insert)(entries, asked, **ours)
            assert torch.equal(entered, reference.insert(entries, asked, **theirs))
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), name


def test_insert_equals_the_reference() -> None:
    check_inserted(triton_rings)


# From here on: what the lines of the kernels are for. A hostile row or page is in test_triton_numbers. No mutant writes
# outside of its tensors: interpreted, it would write into whatever lies there.

CHECKS = {"insert": check_inserted, "gather": check_gathered}
MUTANTS = [
    *[
        ("insert", Mutant("rings", old, new))
        for old, new in (
            ("(held == 0)", "(held == held)"),
            ("+ pushed + order)", "+ pushed + 0 * order)"),
            ("(filled + pushed", "(pushed"),
            ("order >= total - budget", "order < budget"),
            ("tl.store(pushed_ptr, pushed + total)", "pass"),
            ("tl.load(budget_ptr + ring)", "tl.load(budget_ptr)"),
            (
                "pushed_ptr += ring * pushed_row + head * pushed_head",
                "pushed_ptr += ring * 2 + head",
            ),
            ("tl.store(ring_positions_ptr + slot, wanted.to(tl.int32), mask=written)", "pass"),
            ("ring_positions_ptr += ring *", "ring_positions_ptr += row *"),
        )
    ],
    (
        "gather",
        Mutant("rings", "slot * ring_keys_entry, exists", "slot // 2 * ring_keys_entry, exists"),
    ),
    ("gather", Mutant("rings", "wanted_ptr + slot", "wanted_ptr + slot * 0")),
    ("gather", Mutant("layout", "heads_ptr + row * kv_heads + head", "heads_ptr + row * kv_heads")),
    ("gather", Mutant("layout", "page * store.key_row", "row * store.key_row")),
    ("insert", Mutant("layout", "page * store.value_row", "page // 2 * store.value_row")),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_pass_unbroken(name: str) -> None:
    CHECKS[name](triton_rings)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(name: str, mutant: Mutant) -> None:
    with mutated(mutant, "rings") as broken, pytest.raises(AssertionError):
        CHECKS[name](broken)
