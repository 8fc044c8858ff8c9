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
from tests.kernels.cases import Case, in_float32

Mixed = Callable[..., tuple[Attended, Tensor]]
EACH = 2  # blocks of a page of codes
# Relative RMS of outputs; log-sum-exp, absolute. In bfloat16 a query times the step of a channel is rounded too.
CLOSE = {torch.float32: (1e-5, 1e-5), torch.float16: (5e-4, 1e-4), torch.bfloat16: (9e-3, 1e-2)}


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


def check_mixed(attend: Mixed, case: MixedCase, strict: bool = True) -> None:
    """As the reference in float32; `strict`: as many exact ones, where no weight lies at the edge of a bucket."""
    (query, entries, codes, options), given = case.mixed()
    ours, exact = attend(query, entries, codes, options, **given)
    wide = query.float(), in_float32(entries), codes, options
    theirs, expected = reference.attend_mixed(*wide, **given)
    assert exact.dtype == torch.int64 and exact.shape == expected.shape
    assert bool((exact[..., 0] <= given["budget"][:, None]).all())
    off = (exact - expected).abs().max()
    assert off <= (0 if strict else 8), f"{off} entries too many or too few are exact"
    assert ours.output.dtype == case.dtype and ours.lse.dtype == torch.float32
    most, most_lse = CLOSE[case.dtype]
    error = relative_rms(ours.output, theirs.output)
    assert error <= most, f"output is off by {error}"
    assert torch.equal(ours.lse.isfinite(), theirs.lse.isfinite())
    lse = (ours.lse - theirs.lse)[theirs.lse.isfinite()].abs().max()
    assert lse <= most_lse, f"log-sum-exp is off by {lse}"
