"""Tokens enter the rings as the reference says, and a broken kernel is noticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import there  # isort: skip  # before any kernel
from refreshkv.kernels import reference, triton_insert
from refreshkv.policy.selection import FREE
from tests.kernels.mutants import Mutant, mutated

Inserted = dict[str, Tensor]


def rings(
    budget: list[int], wanted: int, slots: int, dim: int, dtype: torch.dtype, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Inserted]:
    """A store, what is wanted from it, and rings that hold some of that already."""
    gen = torch.Generator().manual_seed(seed)
    rows, heads, length = len(budget), 2, 40
    keys, values = (
        torch.randn(rows, heads, length + 3, d, generator=gen).to(dtype)[:, :, :length]
        for d in (dim, 48)
    )
    places = torch.rand(rows, heads, length, generator=gen).argsort(-1)
    asked = places[..., :wanted].clone()
    asked[0, 0, 0] = FREE
    capacity = torch.tensor(budget)
    filled = torch.randint(0, slots + 1, (rows, heads), generator=gen).minimum(capacity[:, None])
    taken = torch.arange(slots) < filled[..., None]
    held = torch.rand(rows, heads, length, generator=gen).argsort(-1)[..., :slots]
    return (keys, values, asked), {
        "ring_keys": torch.randn(rows, heads, slots, dim, generator=gen).to(dtype),
        "ring_values": torch.randn(rows, heads, slots, 48, generator=gen).to(dtype),
        "ring_positions": torch.where(taken, held, FREE),
        "filled": filled,
        "pushed": torch.randint(0, 9, (rows, heads), generator=gen),
        "budget": capacity,
    }


def check(insert: Callable[..., Tensor]) -> None:
    for seed, (budget, wanted, slots, dim, dtype) in enumerate(
        (
            ([9, 9], 1, 9, 64, torch.float32),
            ([9, 4, 6], 3, 9, 80, torch.bfloat16),
            ([1, 2], 3, 2, 128, torch.float16),
            ([30], 8, 31, 64, torch.float32),
        )
    ):
        store, theirs = rings(budget, wanted, slots, dim, dtype, seed)
        ours = {name: tensor.clone() for name, tensor in theirs.items()}
        expected = reference.insert(*store, **theirs)
        assert torch.equal(run_and_keep(insert, store, ours), expected)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


def run_and_keep(
    insert: Callable[..., Tensor], store: tuple[Tensor, ...], ours: Inserted
) -> Tensor:
    """`insert` where kernels run, with what it wrote copied back."""
    moved = {name: there(tensor) for name, tensor in ours.items()}
    entered = insert(*(there(tensor) for tensor in store), **moved)
    ours.update({name: tensor.cpu() for name, tensor in moved.items()})
    return entered.cpu()


def test_equals_the_reference() -> None:
    check(triton_insert.insert)


def test_the_signature_is_that_of_the_reference() -> None:
    assert inspect.signature(triton_insert.insert) == inspect.signature(reference.insert)


MUTANTS = [
    Mutant("triton_insert", old, new)
    for old, new in (
        ("(there == 0)", "(there == there)"),
        ("+ pushed + place)", "+ pushed + 0 * place)"),
        ("(tl.load(filled_ptr + pair) + pushed", "(pushed"),
        ("place >= total - budget", "place < budget"),
        ("pushed + total", "pushed"),
        ("tl.load(budget_ptr + row)", "tl.load(budget_ptr)"),
        ("tl.store(positions_ptr + slot, wanted, written)", "pass"),
        ("source * values_l", "target * values_l"),
    )
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_broken_kernel_is_noticed(mutant: Mutant) -> None:
    with mutated(mutant, "triton_insert") as broken, pytest.raises(AssertionError):
        check(_of(broken))


def _of(module: ModuleType) -> Callable[..., Tensor]:
    return module.insert
