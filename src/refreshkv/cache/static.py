"""The full store in buffers of fixed size, for steps that are compiled or captured in a CUDA graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.store import Store, scatter
from refreshkv.kernels.backend import Backend
from refreshkv.kernels.operators import OPERATORS
from refreshkv.kernels.options import Entries


class StaticStore(Store):
    """Buffers that are given, all of whose positions masks and scores are about.

    Args:
        keys, values: `[B, Hkv, C, D]`, finite where there is no token yet.
        length: int64 scalar on their device, the tokens of every row, which somebody else may count.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        self._held = keys, values
        self._length = length
        self._own_ends: Tensor | None = None  # while rows differ

    @property
    def ends(self) -> Tensor:  # type: ignore[override]
        # Made anew: a graph that writes the length must not also hold a view of it.
        return self._length.expand(self.rows) if self._own_ends is None else self._own_ends

    def let_rows_differ(self, ends: Tensor) -> None:
        self._own_ends = ends

    @property
    def width(self) -> int:
        return self._buffers()[0].shape[2]

    @property
    def rows(self) -> int:
        return self._buffers()[0].shape[0]

    @property
    def backend(self) -> Backend:
        """The kernels as operators."""
        return OPERATORS

    def entries(self) -> Entries:
        return Entries(*self._buffers())

    def write(self, keys: Tensor, values: Tensor, starts: Tensor, end: int | None = None) -> None:
        """See `Store.write`. There must be room; what lies beyond a row is finite already."""
        scatter(self._buffers(), (keys, values), starts)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """See `Store.append`. There must be room."""
        positions = self._length + torch.arange(keys.shape[2], device=keys.device)
        for buffer, new in zip(self._buffers(), (keys, values), strict=True):
            buffer.index_copy_(2, positions, new)
        self._length.add_(keys.shape[2])

    def grow(self, width: int) -> None:
        """Room for `width` tokens a row, at least as many as there was."""
        self._held = tuple(F.pad(x, (0, 0, 0, width - x.shape[2])) for x in self._buffers())  # type: ignore[assignment]

    def level(self, length: int) -> None:
        self._length.fill_(length)
        self._own_ends = None

    def crop(self, length: int) -> None:
        """Raises: rows end where somebody else counts."""
        raise NotImplementedError("the static form of RefreshKV's cache cannot be cropped")

    def take_rows(self, rows: Tensor) -> None:
        """See `Store.take_rows`; as many rows as before."""
        for buffer in self._buffers():
            buffer.copy_(buffer.index_select(0, rows))
        if self._own_ends is not None:
            self._own_ends.copy_(self._own_ends.index_select(0, rows))

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._length.zero_()
        self._own_ends = None
