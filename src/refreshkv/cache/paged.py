"""The full store in pages of a pool that a block table finds, as engines with continuous batching keep it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.store import GROWTH, Store
from refreshkv.kernels.options import Entries
from refreshkv.kernels.reference.attention import laid_out

_NO_PAGE = -1


class PagedStore(Store):
    """Pages `[N, Hkv, P, D]` and a block table `[B, M]`; every row ends where it does.

    Args:
        page: P, tokens of a page.
    """

    def __init__(self, page: int = 64) -> None:
        self.page = page
        self._blocks = torch.empty(0, 0, dtype=torch.int32)
        self._free: list[int] = []

    @property
    def width(self) -> int:
        return self._blocks.shape[1] * self.page

    @property
    def rows(self) -> int:
        self._buffers()  # there are none before the first token
        return self._blocks.shape[0]

    def entries(self) -> Entries:
        return Entries(*self._buffers(), blocks=self._blocks)

    def append(self, keys: Tensor, values: Tensor, **_: Any) -> None:
        if self._held is None:
            self._allocate(keys, values)
        assert self.ends is not None
        self.write(keys, values, self.ends)
        self.ends = self.ends + keys.shape[2]

    def write(self, keys: Tensor, values: Tensor, starts: Tensor, end: int | None = None) -> None:
        if self._held is None:
            self._allocate(keys, values)
        self._reserve((starts + keys.shape[2]).tolist())
        self.backend.write(self.entries(), keys, values, starts=starts)

    def level(self, length: int) -> None:
        self.crop(length)

    def crop(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"cannot crop to {length} tokens")
        if self.ends is None:
            return
        self.ends = self.ends.clamp(max=length)
        kept = -(-int(self.ends.max()) // self.page)
        self._release(self._blocks[:, kept:])
        self._blocks = self._blocks[:, :kept].contiguous()

    def take_rows(self, rows: Tensor) -> None:
        """See `Store.take_rows`. The first to take a row keeps its pages, others get copies."""
        assert self.ends is not None
        old, sources = self._blocks, rows.tolist()
        self._blocks = old.index_select(0, rows)
        self.ends = self.ends.index_select(0, rows)
        self._release(old[[row for row in range(len(old)) if row not in sources]])
        taken = set()
        for row, source in enumerate(sources):
            if source in taken:
                there = old[source] != _NO_PAGE
                copies = self._take(int(there.sum()))
                for pages in self._buffers():
                    pages[copies.long()] = pages[old[source, there].long()]
                self._blocks[row, there] = copies
            taken.add(source)

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self._held = self.ends = None
        self._blocks = torch.empty(0, 0, dtype=torch.int32)
        self._free = []

    def dense(self) -> tuple[Tensor, Tensor]:
        """See `Store.dense`; copies, with zeros where there is no page."""
        keys, values, stored = laid_out(self.entries(), self.rows)
        assert values is not None and stored is not None
        return keys * stored[..., None], values * stored[..., None]

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        rows, heads = keys.shape[:2]
        shape = (0, heads, self.page)
        self._held = (
            keys.new_zeros(*shape, keys.shape[-1]),
            values.new_zeros(*shape, values.shape[-1]),
        )
        self._blocks = torch.empty(rows, 0, dtype=torch.int32, device=keys.device)
        self.ends = torch.zeros(rows, dtype=torch.int64, device=keys.device)

    def _reserve(self, lengths: list[int]) -> None:
        """Pages for so many tokens in each row."""
        needed = [-(-length // self.page) for length in lengths]
        missing = max(needed) - self._blocks.shape[1]
        if missing > 0:
            self._blocks = F.pad(self._blocks, (0, missing), value=_NO_PAGE)
        for row, count in enumerate(needed):
            empty = (self._blocks[row, :count] == _NO_PAGE).nonzero()[:, 0]
            if len(empty):
                self._blocks[row, empty] = self._take(len(empty))

    def _take(self, count: int) -> Tensor:
        """`[count]` int32, pages that nobody has."""
        held = len(self._buffers()[0])
        if count > len(self._free):
            more = max(count - len(self._free), int(held * (GROWTH - 1)))
            keys, values = (F.pad(x, (0, 0, 0, 0, 0, 0, 0, more)) for x in self._buffers())
            self._held = keys, values
            self._free += range(held + more - 1, held - 1, -1)
        taken = [self._free.pop() for _ in range(count)]
        return torch.tensor(taken, dtype=torch.int32, device=self._blocks.device)

    def _release(self, blocks: Tensor) -> None:
        self._free += [page for page in blocks.flatten().tolist() if page != _NO_PAGE]
