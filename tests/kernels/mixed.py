"""Inputs of the mixed mode for the comparisons: entries of a case, and codes as a store may keep them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Attended, AttendOptions, Entries
from refreshkv.policy.rounding import BLOCK
from tests.helpers import relative_rms
from tests.kernels import hostile
from tests.kernels.cases import Case, in_float32

Mixed = Callable[..., Attended]
Encode = Callable[..., None]
EACH = 2  # blocks of a page of codes
# Relative RMS of outputs; log-sum-exp, absolute. In bfloat16 a query times the step of a channel is rounded too.
CLOSE = {torch.float32: (1e-5, 1e-5), torch.float16: (5e-4, 1e-4), torch.bfloat16: (9e-3, 1e-2)}

# What an entry or a block changes that is read in one way here and in another there.
EDGE = (3e-2, 6e-2)


@dataclass(frozen=True)
class MixedCase(Case):
    """`code_pages`: codes in pages, one of which is not there. `budget`: of the first row; others get one less."""

    length: int = 333
    bits: int = 2
    value_bits: int = 2
    budget: int = 20
    code_pages: bool = False
    skip: float = 0.0

    def dense(self) -> tuple[Tensor, Entries, AttendOptions]:
        """Channels differ in size, and in where they lie."""
        query, entries, options = super().dense()
        gen = torch.Generator().manual_seed(self.dim)

        def channels(numbers: Tensor) -> Tensor:
            size, middle = torch.rand(2, 1, numbers.shape[-1], generator=gen)
            return self.with_spare(numbers.float() * (size + 0.2) + 2 * middle - 1)

        return query, Entries(channels(entries.keys), channels(entries.values)), options

    def visible(self, gen: torch.Generator) -> Tensor | None:
        shown = super().visible(gen)
        if shown is not None and self.hidden == "holes":
            shown[..., : BLOCK + 6] = True  # a block of which everything is seen
            shown[-1, :, 2 * BLOCK : 3 * BLOCK] = False  # and one of which nothing
        return shown

    def first(self) -> Tensor:
        """Where the blocks of each row begin: here and there before the first token, or among the first."""
        return torch.tensor([0, self.length * 2 // 3 if self.hidden == "left" else 37, -70])[
            : self.rows
        ]

    def room(self, entries: Entries) -> Codes:
        blocks = self.length // BLOCK + 2
        dims = entries.keys.shape[-1], self.value_dim or self.dim
        if self.code_pages:
            pages = -(-blocks // EACH)
            there = torch.randperm(
                self.rows * pages + 1, generator=torch.Generator().manual_seed(2)
            )
            like = entries.keys.new_zeros(len(there), self.kv_heads, 1)
            table = there[:-1].reshape(self.rows, pages).int()
            table[0, 1:2] = -1
            return replace(Codes.room(like, dims, EACH, self.bits, self.value_bits), blocks=table)
        rows = self.rows if entries.rows is None else int(entries.rows.max()) + 1
        like = entries.keys.new_zeros(rows, self.kv_heads, 1)
        return Codes.room(like, dims, blocks, self.bits, self.value_bits)

    def span(self) -> dict[str, Any]:
        """What `encode` is told: some blocks of each row, in part before and behind what there is."""
        ends = (self.length - self.first()) // BLOCK
        return {"first": self.first(), "begin": torch.tensor([0, 1, -1])[: self.rows],
                "end": ends + torch.tensor([0, 0, 9])[: self.rows], "most": int(ends.max()) + 2}  # fmt: skip

    def mixed(self) -> tuple[tuple[Tensor, Entries, Codes, AttendOptions], dict[str, Any]]:
        """What `attend_mixed` is given, with codes of the reference: of a row fewer, of one more than there is."""
        query, entries, options = self.inputs()
        codes = self.room(entries)
        ends = (self.length - self.first()).clamp(min=0) // BLOCK
        seen = None if options.visible is None else options.visible[:, 0]
        every = {"first": self.first(), "begin": torch.zeros_like(ends), "end": ends + 2}
        reference.encode(entries, codes, **every, most=int(ends.max()) + 2, visible=seen)
        finished = ends - torch.tensor([0, 1, -9])[: self.rows]
        budget = self.budget - torch.arange(self.rows)
        return (query, entries, codes, options), {
            "first": self.first(), "finished": finished, "budget": budget.clamp(min=0), "skip": self.skip,
        }  # fmt: skip


EVERYTHING = MixedCase(
    rows=3, hidden="holes", softcap=3.0, sinks=True, value_dim=48, code_pages=True
)
BROKEN = [MixedCase(), EVERYTHING]


def check_encode(encode: Callable[..., None], case: MixedCase) -> None:
    """Bit for bit, and nothing else is written."""
    _, entries, options = case.inputs()
    ours, theirs = case.room(entries), case.room(entries)
    for part in (*ours.tensors, *theirs.tensors):
        part.fill_(0x1234)
    seen = None if options.visible is None else options.visible[:, 0]
    encode(entries, ours, **case.span(), visible=seen)
    reference.encode(entries, theirs, **case.span(), visible=seen)
    for name, actual, expected in zip(
        ("keys", "key grids", "values", "value grids"), ours.tensors, theirs.tensors, strict=True
    ):
        assert bool((expected != 0x1234).any()) or case.length < 200
        assert torch.equal(actual, expected), f"{name} are off"


def counted(attend: Mixed) -> Callable[..., tuple[Attended, Tensor]]:
    """`attend` with a tally of its own; returns what it gives, and `[B, Hkv, 2]` of what only the step could know.

    That is how many covered entries were read exactly, and of how many blocks the values. The tally is a view, and not
    0 before; what else has to be in it is worked out here number by number.
    """

    def run(
        query: Tensor, entries: Entries, codes: Codes, options: AttendOptions, **given: Any
    ) -> tuple[Attended, Tensor]:
        rows, heads = len(query), entries.kv_heads
        around = torch.full((2, heads, 3, rows), 5, device=query.device)
        tally = around[1, :, 1:].permute(2, 0, 1)
        attended = attend(query, entries, codes, options, **given, tally=tally)
        assert bool((around[0] == 5).all() and (around[1, :, 0] == 5).all())
        counts, (of_keys, of_values) = tally - 5, codes.block_bytes
        lengths = None if options.lengths is None else options.lengths.expand(rows, heads)
        for row in range(rows):
            finished = min(max(int(given["finished"][row]), 0), codes.row_blocks)
            covered = max(int(given["first"][row]) + BLOCK * finished, 0)
            for head in range(heads):
                length = entries.count if lengths is None else int(lengths[row, head])
                asked = options.heads is None or bool(options.heads[row, head])
                always = max(min(max(length, 0), entries.count) - covered, 0), finished * of_keys
                counts[row, head] -= torch.tensor(always).to(counts) * asked
        assert not (counts[..., 1] % of_values).any()
        counts[..., 1] //= of_values
        return attended, counts

    return run


def check_mixed(
    attend: Mixed,
    case: MixedCase,
    strict: bool = True,
    off_by: float = 0.0,
) -> None:
    """As the reference in float32; `strict`: as many exact ones, where no weight lies at the edge of a bucket."""
    (query, entries, codes, options), given = case.mixed()
    ours, exact = counted(attend)(query, entries, codes, options, **given)
    wide = query.float(), in_float32(entries), codes, options
    theirs, expected = counted(reference.attend_mixed)(*wide, **given)
    assert exact.dtype == torch.int64 and exact.shape == expected.shape
    assert bool((exact[..., 0] <= given["budget"][:, None]).all())
    off = (exact - expected).abs().max()
    assert off <= (0 if strict else 8), f"{off} entries too many or too few are exact"
    assert ours.output.dtype == case.dtype and ours.lse.dtype == torch.float32
    most, most_lse = EDGE if off else CLOSE[case.dtype]
    error = relative_rms(ours.output, theirs.output)
    assert error <= most, f"output is off by {error}"
    assert torch.equal(ours.lse.isfinite(), theirs.lse.isfinite())
    lse = (ours.lse - theirs.lse)[theirs.lse.isfinite()].abs().max()
    assert lse <= max(most_lse, off_by), f"log-sum-exp is off by {lse}"


def check_broken_numbers(
    attend: Mixed, encode: Encode, cases: list[MixedCase], dtype: torch.dtype = torch.float32
) -> None:
    """One number that is none, before the codes are made of it: what comes out is what the reference says."""
    for case in (replace(case, dtype=dtype) for case in cases):
        for what in ("query", "keys", "values", "sinks", "hidden"):
            for number in (hostile.NAN, hostile.INF):
                if what in ("sinks", "hidden") and not case.sinks:
                    continue
                several, entries, options, _ = hostile.spoiled(case, what, number)
                query = several[:, :, -1]
                ours, theirs = case.room(entries), case.room(entries)
                seen = None if options.visible is None else options.visible[:, 0]
                encode(entries, ours, **case.span(), visible=seen)
                reference.encode(entries, theirs, **case.span(), visible=seen)
                assert all(map(torch.equal, ours.tensors, theirs.tensors))
                _, given = case.mixed()
                wide = Entries(entries.keys.float(), entries.values.float())
                expected, _ = counted(reference.attend_mixed)(
                    query.float(), wide, theirs, options, **given
                )
                (output, lse), exact = counted(attend)(query, entries, ours, options, **given)
                assert bool((exact[..., 0] <= given["budget"][:, None]).all())
                if what == "hidden":
                    assert not output.isnan().any()
                hostile.close(output, expected.output, case.dtype)
                hostile.close(lse, expected.lse, case.dtype)


def check_broken_places(attend: Mixed, encode: Encode, count: int = 30) -> None:
    """Blocks, pages, rows, lengths and budgets of any size."""
    for seed in range(count):
        gen = torch.Generator().manual_seed(seed)
        case = MixedCase(rows=3, dim=16, kv_heads=1, group=2, code_pages=seed % 2 == 0,
                         layout=("", "rows", "pages", "pages rows")[seed % 4])  # fmt: skip
        (query, entries, codes, options), given = case.mixed()

        def some(most: int, gen: torch.Generator = gen) -> Tensor:
            return hostile.integers((3,), most, gen)

        if entries.rows is not None:
            entries = replace(entries, rows=hostile.indices((3,), len(codes.keys), gen))
        if codes.blocks is not None:
            codes = replace(
                codes, blocks=hostile.indices(tuple(codes.blocks.shape), len(codes.keys), gen)
            )
        if entries.blocks is not None:
            near = entries.blocks.where(torch.rand(entries.blocks.shape, generator=gen) < 0.7, -5)
            entries = replace(entries, blocks=near)
        kind = replace(options, lengths=hostile.integers((3, 1), case.length, gen))
        for finished in (given["finished"], some(6)):
            for first in (given["first"], some(case.length), some(3) - 70):
                named = {"first": first, "finished": finished, "budget": some(30)}
                expected, exact = counted(reference.attend_mixed)(
                    query, entries, codes, kind, **named
                )
                ours, found = counted(attend)(query, entries, codes, kind, **named)
                hostile.close(ours.output, expected.output, case.dtype)
                hostile.close(ours.lse, expected.lse, case.dtype)
                assert torch.equal(found, exact)
                if (
                    codes.blocks is not None
                    and codes.blocks.flatten().unique().numel() < codes.blocks.numel()
                ):
                    continue  # two blocks at one place: which is written last, nobody says
                if entries.rows is not None and entries.rows.unique().numel() < 3:
                    continue
                parts = [replace(codes, keys=codes.keys.clone(), key_grids=codes.key_grids.clone(),
                                 values=codes.values.clone(), value_grids=codes.value_grids.clone())
                         for _ in range(2)]  # fmt: skip
                span = {"first": first, "begin": some(5), "end": finished, "most": 4}
                encode(entries, parts[0], **span)
                reference.encode(entries, parts[1], **span)
                assert all(map(torch.equal, parts[0].tensors, parts[1].tensors))
