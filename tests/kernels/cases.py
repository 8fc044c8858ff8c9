"""Inputs of attention for the comparisons: a case is made densely, and then laid out as a store may keep it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy.selection import FREE
from tests.helpers import left_padding

QUERIES = 5  # of a row, where an operation takes several
SPARE_ROWS = 2  # kept for no row of the batch, where there are `rows`
# Words of `Case.layout`; "" is dense. Without a list, rows and pages have nothing to do with each other in attention.
WHOLE = ("", "rows", "pages", "pages rows")
LAYOUTS = (*WHOLE, "list", "list rows", "list pages", "list pages rows")


@dataclass(frozen=True)
class Case:
    """Inputs of an attention.

    `hidden` is the mask: none, left padding, holes, holes that differ by KV head; or "free", which is no mask but
    positions of a list that are `FREE`: all of one KV head, and one of another.
    """

    rows: int = 2
    kv_heads: int = 2
    group: int = 4
    length: int = 65
    dim: int = 64
    value_dim: int | None = None
    softcap: float | None = None
    sinks: bool = False
    hidden: str = ""
    layout: str = ""
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(type(self), k)}
        return "-".join(f"{k}={v}" for k, v in changed.items()) or "plain"

    def dense(self) -> tuple[Tensor, Entries, AttendOptions]:
        """Query, entries without pages, list or rows, and options that hide what is hidden."""
        gen = torch.Generator().manual_seed(self.length)
        heads = self.kv_heads * self.group
        query = torch.randn(self.rows, heads, self.dim, generator=gen).to(self.dtype)
        keys, values = (
            self.with_spare(torch.randn(self.rows, self.kv_heads, self.length, dim, generator=gen))
            for dim in (self.dim, self.value_dim or self.dim)
        )
        options = AttendOptions(
            scale=1.2 * self.dim**-0.5,  # not the default of torch's own attention
            softcap=self.softcap,
            sinks=(torch.randn(heads, generator=gen) + 3).to(self.dtype) if self.sinks else None,
            visible=self.visible(gen),
        )
        return query, Entries(keys, values), options

    def inputs(self) -> tuple[Tensor, Entries, AttendOptions]:
        """What a kernel is given: the entries as `layout` keeps them."""
        query, entries, options = self.dense()
        if self.hidden != "free":
            return query, laid_out(entries, self.layout), options
        entries = laid_out(entries, self.layout, free=~options.visible)
        return query, entries, replace(options, visible=None)

    def wide(self) -> tuple[Tensor, Entries, AttendOptions]:
        """What the reference is given: dense, and in float32."""
        query, entries, options = self.dense()
        return query.float(), in_float32(entries), options

    def several(self) -> tuple[Tensor, Tensor]:
        """T queries `[B, Hq, T, D]` in place of one, and where they start: at the end, and earlier from row to row."""
        gen = torch.Generator().manual_seed(self.length + 1)
        queries = min(QUERIES, self.length)
        shape = (self.rows, self.kv_heads * self.group, queries, self.dim)
        query = torch.randn(*shape, generator=gen).to(self.dtype)
        latest = self.length - queries
        return query, torch.tensor([latest // (row + 1) for row in range(self.rows)])

    def with_spare(self, content: Tensor) -> Tensor:
        """The view that a store gives out: what lies behind it must never be read."""
        rows, heads, length, dim = content.shape
        buffer = torch.full((rows, heads, length + 33, dim), torch.nan, dtype=self.dtype)
        buffer[:, :, :length] = content.to(self.dtype)
        return buffer[:, :, :length]

    def visible(self, gen: torch.Generator) -> Tensor | None:
        if not self.hidden:
            return None
        if self.hidden == "left":
            return left_padding([0, self.length * 2 // 3], self.length)[:, None]
        heads = 1 if self.hidden == "holes" else self.kv_heads
        shown = torch.rand(self.rows, heads, self.length, generator=gen) < 0.7
        shown[..., self.length // 2] = True
        if self.hidden == "free":
            assert self.rows * heads > 1, "everything would be hidden"
            shown[0, 0], shown[-1, -1] = True, False
            shown[0, 0, 0] = self.length == 1
        return shown


def in_float32(entries: Entries) -> Entries:
    values = None if entries.values is None else entries.values.float()
    return replace(entries, keys=entries.keys.float(), values=values)


def laid_out(entries: Entries, layout: str, free: Tensor | None = None) -> Entries:
    """Dense `entries` as a store with pages, a list of positions, or rows of its own keeps them; NaN in between.

    `free` `[B, Hkv, n]` bool is what a list leaves out.
    """
    gen = torch.Generator().manual_seed(5)
    keys, values = entries.keys, entries.values
    assert values is not None
    both = torch.cat([keys, values], -1)  # K beside V, as vLLM keeps them
    rows, heads, length, _ = both.shape
    positions = kept = blocks = None
    if "list" in layout:
        length += 7
        order = torch.rand(rows, heads, length, generator=gen).argsort(-1)[..., :-7]
        both = (
            torch.full((rows, heads, length, both.shape[-1]), torch.nan)
            .to(both)
            .scatter(2, order[..., None].expand_as(both), both)
        )
        positions = order if free is None else order.masked_fill(free, FREE)
        positions = positions.int()
    if "rows" in layout:
        kept = torch.randperm(rows + SPARE_ROWS, generator=gen)[:rows]
        positions = None if positions is None else spread(positions, kept, rows + SPARE_ROWS, 0)
        if "pages" not in layout:
            both = spread(both, kept, rows + SPARE_ROWS, torch.nan)
    if "pages" in layout:
        page = next(size for size in range(16, 0, -1) if length % size == 0)
        each = length // page
        blocks = torch.randperm(rows * each + 3, generator=gen)[: rows * each]
        parts = both.unflatten(2, (each, page)).transpose(1, 2).flatten(0, 1)
        both = spread(parts, blocks, rows * each + 3, torch.nan)
        blocks = blocks.view(rows, each).int()
    if layout:
        keys, values = both[..., : keys.shape[-1]], both[..., keys.shape[-1] :]
    return Entries(keys, values, blocks, positions, None if kept is None else kept.int())


def spread(tensor: Tensor, indices: Tensor, count: int, rest: float) -> Tensor:
    """`count` rows, those at `indices` from `tensor`."""
    wide = tensor.new_full((count, *tensor.shape[1:]), rest)
    wide[indices] = tensor
    return wide


def empty_stores(dtype: torch.dtype) -> Iterator[tuple[int, Entries]]:
    """How many rows, and entries for them that are none, whatever is missing."""
    some = torch.randn(3, 2, 7, 64).to(dtype)
    none = torch.zeros(2, 2, 4, dtype=torch.int32)
    listed, blocks, rows = none[..., :3], none[:, 0], none[:, 0, 0]
    yield 0, Entries(some[:0], some[:0])
    yield 0, Entries(some, some, blocks[:0])
    yield 2, Entries(some[:2, :, :0], some[:2, :, :0])
    for kept in (some[:0], some[:, :, :0]):
        yield 2, Entries(kept, kept, rows=rows)
        yield 2, Entries(kept, kept, blocks)
        yield 2, Entries(kept, kept, positions=listed, rows=rows)
        yield 2, Entries(kept, kept, blocks, listed)
    yield 2, Entries(some, some, blocks[:, :0])
    yield 2, Entries(some, some, blocks[:, :0], listed)
    yield 2, Entries(some, some, positions=listed[..., :0])
    yield 2, Entries(some, some, positions=listed[:0], rows=rows)


PLAIN = Case()
EVERYTHING = Case(softcap=2.0, sinks=True, hidden="holes")
# Every layout with little and with much in it.
LAID_OUT = [
    replace(case, layout=layout, value_dim=48)
    for layout in LAYOUTS[1:]
    for case in (
        PLAIN,
        replace(EVERYTHING, rows=3, length=300),
        *([Case(hidden="free", length=64)] if "list" in layout else []),
    )
]
CASES = [
    PLAIN,
    *[Case(group=group) for group in (1, 2, 3, 8)],
    *[Case(length=length) for length in (1, 2, 63, 64, 1000, 5000)],
    *[Case(dim=dim) for dim in (80, 128, 256)],
    *[Case(value_dim=48, length=length) for length in (65, 5000)],
    *[Case(softcap=2.0, length=length) for length in (65, 5000)],
    *[Case(sinks=True, length=length) for length in (1, 65, 5000)],
    *[Case(hidden="left", length=length) for length in (65, 1000, 5000)],
    *[Case(hidden="holes", length=length) for length in (65, 5000)],
    Case(softcap=2.0, sinks=True, hidden="holes", value_dim=80),
    Case(softcap=2.0, sinks=True, hidden="left", length=5000),
    Case(sinks=True, hidden="left", group=1, kv_heads=1),
    *LAID_OUT,
]
# What a ring asks for; a full step masks all heads of a row alike.
PER_HEAD = [Case(hidden="per head", softcap=c, length=n) for c in (None, 2.0) for n in (65, 5000)]
