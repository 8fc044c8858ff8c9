"""Operations that keep rings and count, for any backend: inputs of each, against the reference.

Everything that an operation is given is compared afterwards, whether it may write there or not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.options import Entries
from refreshkv.kernels.reference.rings import STATE
from refreshkv.policy.selection import FREE
from tests.kernels.cases import SPARE_ROWS, WHOLE, Case
from tests.kernels.hostile import indices, integers

ROWS, HEADS, LENGTH = 3, 2, 40
WRITERS = ("write", "push", "fetch", "refresh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def calls(name: str, count: int, far: bool) -> Iterator[dict[str, Any]]:
    """Arguments of an operation, all by name; with `far` some of the numbers point nowhere."""
    for seed in range(count):
        gen = torch.Generator().manual_seed(seed)
        layout, dtype = WHOLE[seed % len(WHOLE)], DTYPES[seed // 4 % len(DTYPES)]
        dim = (8, 80, 64)[seed // 2 % 3]
        case = Case(ROWS, length=LENGTH, dim=dim, value_dim=48, layout=layout, dtype=dtype)
        entries = case.inputs()[1]
        if far:
            spoil(entries, seed)
        yield {"entries": entries, **ARGUMENTS[name](entries, seed, gen, far)}


def spoil(entries: Entries, seed: int) -> None:
    """A row and two pages that are not there, or are."""
    if entries.rows is not None:
        own = int(entries.rows[seed % ROWS])
        entries.rows[seed % ROWS] = (-1, ROWS + SPARE_ROWS, 2**31 - 1, -(2**31), own)[seed % 5]
    if entries.blocks is not None:
        entries.blocks[0, :2] = torch.tensor([-1, len(entries.keys)])


def around(shape: tuple[int, ...], most: int, gen: torch.Generator, far: bool) -> Tensor:
    """Numbers 0 .. `most`, or of any size."""
    if far:
        return integers(shape, most, gen)
    return torch.randint(0, most + 1, shape, generator=gen)


def perhaps(seed: int, gen: torch.Generator, *shape: int) -> Tensor | None:
    """`None`, or flags."""
    return None if seed % 3 == 0 else torch.rand(shape, generator=gen) < 0.5


def tally_of(seed: int, gen: torch.Generator) -> Tensor | None:
    """A tally, which need not lie in one piece, or none."""
    if seed % 5 == 4:
        return None
    wide = torch.randint(100, (HEADS, ROWS, 7), generator=gen)
    return (
        wide.transpose(0, 1)[..., 1:6] if seed % 2 else wide.transpose(0, 1)[..., :5].contiguous()
    )


def ring_of(entries: Entries, seed: int, gen: torch.Generator, far: bool) -> dict[str, Any]:
    """Rings that hold some of the store already."""
    kept = ROWS + SPARE_ROWS * (entries.rows is not None)
    slots = (9, 1, 30)[seed % 3]
    capacity = around((kept,), slots, gen, far)
    capacity[:2] = capacity[:2].clamp(max=2)  # fewer than may be fetched
    state = around((len(STATE), kept, HEADS), slots, gen, far)
    order = torch.rand(kept, HEADS, LENGTH, generator=gen).argsort(-1)[..., :slots]
    taken = torch.arange(slots) < state[0][..., None]
    positions = indices((kept, HEADS, slots), LENGTH, gen) if far else order.where(taken, FREE)
    ring: dict[str, Any] = {"ring_keys": None, "ring_values": None}
    if seed % 4 != 3:
        widths = [x.shape[-1] for x in (entries.keys, entries.values)]
        both = torch.randn(kept, HEADS, slots, sum(widths), generator=gen).to(entries.keys.dtype)
        ring = dict(zip(ring, both.split(widths, -1), strict=True))
    return ring | {"ring_positions": positions.int(), "state": state, "budget": capacity}


def to_write(entries: Entries, seed: int, gen: torch.Generator, far: bool) -> dict[str, Any]:
    count = (1, 3, LENGTH)[seed % 3]
    new = [
        torch.randn(ROWS, count, HEADS, x.shape[-1], generator=gen).to(x.dtype).transpose(1, 2)
        for x in (entries.keys, entries.values)
    ]
    return {
        "new_keys": new[0],
        "new_values": new[1],
        "starts": around((ROWS,), LENGTH - count, gen, far),
        "tally": tally_of(seed, gen),
        "hidden": around((ROWS,), 3, gen, far),
        "full": seed % 2 == 0,
    }


def to_push(entries: Entries, seed: int, gen: torch.Generator, far: bool) -> dict[str, Any]:
    back = seed % 2
    return {
        "at": around((ROWS,), LENGTH - 1, gen, far) + back,
        "back": back,
        **ring_of(entries, seed, gen, far),
        "full": perhaps(seed, gen, ROWS, HEADS),
        "tally": tally_of(seed, gen),
        "counted": perhaps(seed + 1, gen, ROWS),
    }


def to_fetch(entries: Entries, seed: int, gen: torch.Generator, far: bool) -> dict[str, Any]:
    ring = ring_of(entries, seed, gen, far)
    slots = ring["ring_positions"].shape[2]
    count = min((1, 3, 8)[seed % 3], slots)
    return {
        "best": torch.rand(ROWS, HEADS, slots + 2, generator=gen).argsort(-1)[..., :count] - 1,
        "ends": around((ROWS,), LENGTH, gen, far),
        **ring,
        "full": perhaps(seed, gen, ROWS, HEADS),
        "tally": tally_of(seed, gen),
        "counted": perhaps(seed + 1, gen, ROWS),
    }


def to_refresh(entries: Entries, seed: int, gen: torch.Generator, far: bool) -> dict[str, Any]:
    ring = ring_of(entries, seed, gen, far)
    slots = ring["ring_positions"].shape[2]
    count = max(0, slots - seed % 4)
    wanted = torch.rand(ROWS, HEADS, LENGTH, generator=gen).argsort(-1)[..., :count]
    width = (0, 4, 64)[seed % 3]
    summary = torch.randn(ROWS, 1, width, generator=gen).expand(-1, HEADS, -1)
    remembered = {"reference": torch.randn(ROWS, HEADS, width, generator=gen), "summary": summary}
    return {
        "wanted": indices((ROWS, HEADS, count), LENGTH, gen) if far else wanted.int(),
        "filled": around((ROWS, HEADS), count, gen, far),
        **ring,
        "heads": perhaps(seed, gen, ROWS, HEADS),
        **(remembered if width else {}),
        "ends": around((ROWS,), LENGTH, gen, far),
        "hidden": around((ROWS,), 3, gen, far),
        "tally": tally_of(seed, gen),
        "counted": perhaps(seed + 1, gen, ROWS),
    }


ARGUMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "write": to_write,
    "push": to_push,
    "fetch": to_fetch,
    "refresh": to_refresh,
}


def check_writer(name: str, operation: Callable[..., None], count: int = 16) -> None:
    """What is written is what the reference writes, bit for bit; the operation may leave nothing out."""
    for far in (False, True):
        changed = 0
        for given in calls(name, count, far):
            before, ours, theirs = (copy.deepcopy(given) for _ in range(3))
            operation(**ours)
            getattr(reference, name)(**theirs)
            for what, tensor in tensors(theirs):
                assert alike(dict(tensors(ours))[what], tensor), f"{name} of {given.keys()}: {what}"
                changed += not alike(dict(tensors(before))[what], tensor)
        assert changed > count, f"{name} has nothing to do in these cases"


def tensors(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in given.items():
        if isinstance(value, Entries):
            yield from tensors({f"entries.{field}": x for field, x in vars(value).items()})
        elif isinstance(value, Tensor):
            yield name, value


def alike(one: Tensor, other: Tensor) -> bool:
    same = one == other
    return bool((same | one.isnan() & other.isnan() if one.is_floating_point() else same).all())


def check_drift(drift: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Heads that are full, and what they would remember; none is so near to the threshold that rounding decides."""
    some = every = 0
    for seed in range(16):
        gen = torch.Generator().manual_seed(seed)
        dtype, group, dim = DTYPES[seed % 3], (1, 3, 4)[seed % 3], (8, 80, 64)[seed // 3 % 3]
        query = torch.randn(ROWS, HEADS * group, 2 * dim, generator=gen).to(dtype)[..., :dim]
        if seed == 5:
            query[0, 1, 3] = torch.nan
        state = around((len(STATE), ROWS, HEADS), 5, gen, far=seed % 4 == 3)
        kept = torch.randn(ROWS, HEADS, dim, generator=gen)
        given = {"stride": 1 + seed % 3, "threshold": (0.1, 1.0, -2.0)[seed % 3]}
        given["per_head"] = seed % 2 == 0
        if seed % 3 == 1:  # as near as can be: threshold 1 means always
            kept = reference.drift(query, kept, state, **given)[1]
        full, summary = drift(query, kept, state, **given)
        expected, remembered = reference.drift(query, kept, state, **given)
        assert torch.equal(full, expected), given
        torch.testing.assert_close(summary, remembered, equal_nan=True)
        some, every = some + int(expected.sum()), every + expected.numel()
    assert 0 < some < every


def check_into(attend_and_score: Callable[..., Any], case: Case) -> None:
    """The heads asked for are written where the others stay as they are."""
    query, entries, options = case.inputs()
    heads = torch.tensor([[True, False], [False, True]])
    options = options.over(options.visible, heads=heads)
    wanted = heads.repeat_interleave(case.group, 1)
    (plain, _), _ = attend_and_score(query, entries, options)
    into = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain.dtype)
    old = into.clone()
    (output, _), _ = attend_and_score(query, entries, options, into=into)
    assert output is into or torch.equal(output, into)
    assert torch.equal(into[wanted], plain[wanted]) and torch.equal(into[~wanted], old[~wanted])
    everything = options.over(options.visible)
    (plain, _), _ = attend_and_score(query, entries, everything)
    attend_and_score(query, entries, everything, into=into)
    assert torch.equal(into, plain)
