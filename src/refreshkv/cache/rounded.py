"""A copy of the full store in few bits: the codes of its finished blocks, at two bits a sixth of its size (ours)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.store import GROWTH, Store
from refreshkv.kernels.codes import Codes
from refreshkv.policy.rounding import BLOCK


class RoundedCopy:
    """Codes of the blocks of 64 tokens that are complete; those of a row begin at its first visible position.

    A block's codes depend on its keys and values alone, so they are made when a step first needs them, and what a crop
    or a row that is taken elsewhere leaves of them stays true.

    Args:
        bits, value_bits: of a code.
        store: where the numbers come from; a fixed copy has room for all its positions at once, and never moves.
        fixed: see `LayerCache`.

    Attributes:
        codes: `None` before the first step.
        first: `[B]` int64, where the first block of each row begins.
        finished: `[B]` int64, blocks of each row that have codes.
    """

    def __init__(self, bits: int, value_bits: int, store: Store, *, fixed: bool = False) -> None:
        self.bits, self.value_bits = bits, value_bits
        self.fixed = fixed
        self.codes: Codes | None = None
        self.first: Tensor | None = None
        self.finished: Tensor | None = None
        if fixed:
            self._start(store, store.width // BLOCK)

    def begin_at(self, store: Store, first: Tensor) -> None:
        """The rows of `store` begin at the positions `first` `[B]`; where that is news, every block is made again."""
        if self.first is None or self.finished is None:
            self._start(store, 0)
        assert self.first is not None and self.finished is not None
        self.finished.masked_fill_(self.first != first, 0)
        self.first.copy_(first)

    def follow(
        self, store: Store, ends: Tensor, visible: Tensor | None, most: int | None = None
    ) -> None:
        """Make the codes of all blocks that are complete among the first `ends` `[B]` positions.

        `visible` `[B, width]` bool. `most`: no row has more that are new; `None`: the device is asked.
        """
        assert self.first is not None and self.finished is not None and self.codes is not None
        complete = torch.div(ends - self.first, BLOCK, rounding_mode="floor").clamp(min=0)
        if most is None:
            most = int((complete - self.finished).max())
        if most > 0:
            if not self.fixed:
                self._reserve(int(complete.max()))
            store.encode(
                self.codes,
                first=self.first,
                begin=self.finished,
                end=complete,
                most=most,
                visible=visible,
            )
            self.finished.copy_(torch.maximum(complete, self.finished))

    def crop(self, length: Tensor | int) -> None:
        """Only the first `length` positions remain, a number or `[B]`."""
        if self.first is not None and self.finished is not None:
            left = torch.div(length - self.first, BLOCK, rounding_mode="floor").clamp(min=0)
            self.finished.copy_(torch.minimum(self.finished, left))

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`, `[B']` int64."""
        if self.codes is None or self.first is None or self.finished is None:
            return
        state = [*self.codes.tensors, self.first, self.finished]
        taken = [tensor.index_select(0, rows) for tensor in state]
        if self.fixed:
            for tensor, new in zip(state, taken, strict=True):
                tensor.copy_(new)
        else:
            self.codes, (self.first, self.finished) = Codes(*taken[:4]), taken[4:]

    def grow(self, store: Store) -> None:
        """Room for the blocks of all positions of a fixed store that has grown."""
        assert self.codes is not None
        blocks = store.width // BLOCK - self.codes.keys.shape[2]
        parts = (F.pad(part, (0, 0, 0, blocks)) for part in self.codes.tensors)
        self.codes = Codes(*parts)

    def reset(self) -> None:
        """Nothing is finished; in the fixed form the memory stays."""
        if not self.fixed:
            self.codes = self.first = self.finished = None
        elif self.finished is not None:
            self.finished.zero_()

    def tensors(self) -> list[Tensor]:
        """All that a step reads and writes."""
        state = [] if self.codes is None else [*self.codes.tensors]
        return state + [x for x in (self.first, self.finished) if x is not None]

    @property
    def bytes(self) -> int:
        """Memory that the codes take."""
        codes = () if self.codes is None else self.codes.tensors
        return sum(part.numel() * part.element_size() for part in codes)

    def _start(self, store: Store, blocks: int) -> None:
        keys, values = store.room_for(0)
        self.codes = Codes.room(
            keys, (keys.shape[-1], values.shape[-1]), blocks, self.bits, self.value_bits
        )
        self.first = torch.zeros(store.rows, dtype=torch.int64, device=store.device)
        self.finished = torch.zeros_like(self.first)

    def _reserve(self, blocks: int) -> None:
        """Room for so many blocks of a row, and some more whenever there was not."""
        assert self.codes is not None
        held = self.codes.keys.shape[2]
        if blocks > held:
            more = max(blocks, int(held * GROWTH)) + 4 - held
            keys, key_grids, values, value_grids = (
                F.pad(part, (0, 0) * (part.dim() - 3) + (0, more)) for part in self.codes.tensors
            )
            self.codes = replace(
                self.codes,
                keys=keys,
                key_grids=key_grids,
                values=values,
                value_grids=value_grids,
            )
