"""The full store in buffers of fixed size, for steps that are compiled or captured in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.store import Store
from refreshkv.kernels.backend import Backend
from refreshkv.kernels.operators import OPERATORS
from refreshkv.kernels.options import Entries


class StaticStore(Store):
    """Buffers that are given, all of whose positions masks and scores are about.

    Args:
        keys, values: `[B, Hkv, C, D]`, finite where there is no token yet.
        ends: `[B]` int64 on their device, where each row ends. It is changed in place and nowhere else.
    """

    ends: Tensor

    def __init__(self, keys: Tensor, values: Tensor, ends: Tensor) -> None:
        self._held = keys, values
        self.ends = self._own_ends = ends

    def let_rows_differ(self, ends: Tensor) -> None:
        """They always may; here `ends` are those of several stores, until `level`."""
        self.ends = ends

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
        """See `Store.write`. What lies beyond a row is finite already; a token for which there is no room is lost."""
        self.backend.write(self.entries(), keys, values, starts=starts)

    def append(self, keys: Tensor, values: Tensor, **counts: Any) -> None:
        """See `Store.append`. There must be room."""
        self.backend.write(self.entries(), keys, values, starts=self.ends, **counts)
        self.ends.add_(keys.shape[2])

    def grow(self, width: int) -> None:
        """Room for `width` tokens a row, at least as many as there was."""
        self._held = tuple(F.pad(x, (0, 0, 0, width - x.shape[2])) for x in self._buffers())  # type: ignore[assignment]

    def level(self, length: int) -> None:
        self.ends = self._own_ends
        self.ends.fill_(length)

    def crop(self, length: int) -> None:
        """Raises: rows end where somebody else counts."""
        raise NotImplementedError("the static form of RefreshKV's cache cannot be cropped")

    def take_rows(self, rows: Tensor) -> None:
        """See `Store.take_rows`; as many rows as before."""
        for tensor in (*self._buffers(), self.ends):
            tensor.copy_(tensor.index_select(0, rows))

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.level(0)
