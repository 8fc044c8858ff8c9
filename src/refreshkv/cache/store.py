"""The full KV cache of one layer: every token, kept in buffers that grow in place."""

from __future__ import annotations

import torch
from torch import Tensor

_SPARE = 256  # tokens of head room whenever a buffer is (re)allocated
_GROWTH = 1.25  # so the copies of all re-allocations add up to four per token
_RESERVE_BEYOND = (
    4096  # tokens: an answer of this length fits without re-allocation after any prompt
)


class DenseStore:
    """K and V of all tokens, `[B, Hkv, length, D]` views into buffers with spare capacity.

    An append writes in place. When the capacity is used up both buffers are re-allocated a quarter larger, so that the
    copies add up to a constant per token; `reserve` (tokens) avoids them where the final length is known. A host may
    announce its model's whole context, so no more than about twice what is needed is reserved.
    """

    def __init__(self, reserve: int = 0) -> None:
        self.reserve = reserve
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def is_allocated(self) -> bool:
        """Whether anything was ever appended since the last `reset`."""
        return self._keys is not None

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, length, D]` view, after RoPE."""
        return self._buffer(self._keys)[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, length, D]` view."""
        return self._buffer(self._values)[:, :, : self.length]

    @property
    def entry_bytes(self) -> int:
        """Bytes of the K and V of one token and one KV head."""
        keys, values = self._buffer(self._keys), self._buffer(self._values)
        return keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens, `[B, Hkv, n, D]`, at the end."""
        end = self.length + keys.shape[2]
        self._keys = self._with_room(self._keys, keys, end)
        self._values = self._with_room(self._values, values, end)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end

    def write(self, keys: Tensor, values: Tensor, starts: Tensor) -> None:
        """Tokens `[B, Hkv, n, D]` of row i go to the places `starts[i]` and after, `[B]` int64, over what is there.

        The store is as long as its longest row; a shorter row ends in zeros, or in what it held there before.
        """
        end = int(starts.max()) + keys.shape[2]
        self._keys = self._with_room(self._keys, keys, end)
        self._values = self._with_room(self._values, values, end)
        # A kernel may multiply a hidden place by zero, and unused room may hold NaN.
        self._keys[:, :, self.length : end] = 0
        self._values[:, :, self.length : end] = 0
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        places = starts[:, None] + torch.arange(keys.shape[2], device=keys.device)
        self._keys[rows, :, places] = keys.transpose(1, 2)
        self._values[rows, :, places] = values.transpose(1, 2)
        self.length = max(self.length, end)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on; their room is used again.

        Raises:
            ValueError: a negative length.
        """
        if length < 0:
            raise ValueError(f"cannot crop to {length} tokens")
        self.length = min(self.length, length)

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`; repeats and omissions are allowed. `[B']` int64."""
        self._keys = self._take(self._buffer(self._keys), rows)
        self._values = self._take(self._buffer(self._values), rows)

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.length = 0
        self._keys = self._values = None

    def _with_room(self, buffer: Tensor | None, like: Tensor, needed: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= needed:
            return buffer
        grown = 0 if buffer is None else int(buffer.shape[2] * _GROWTH)
        capacity = max(needed + _SPARE, grown, min(self.reserve, 2 * needed + _RESERVE_BEYOND))
        rows, heads, _, dim = like.shape
        new = like.new_empty(rows, heads, capacity, dim)
        if buffer is not None:
            new[:, :, : self.length] = buffer[:, :, : self.length]
        return new

    def _take(self, buffer: Tensor, rows: Tensor) -> Tensor:
        new = buffer.new_empty(rows.shape[0], *buffer.shape[1:])
        for target, source in enumerate(rows.tolist()):  # only the used part is copied, once
            new[target, :, : self.length] = buffer[source, :, : self.length]
        return new

    @staticmethod
    def _buffer(buffer: Tensor | None) -> Tensor:
        if buffer is None:
            raise RuntimeError("the store is empty: append before reading")
        return buffer


def is_identity(rows: Tensor, count: int) -> bool:
    """Whether taking `rows` of `count` rows changes nothing."""
    return rows.shape[0] == count and bool((rows == torch.arange(count, device=rows.device)).all())
