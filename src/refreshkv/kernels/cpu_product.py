"""Queries with keys, weights with values: the two products of attention on CPU, for one KV head that lies in one piece.

The long operand is read where it lies, once. CPU torch rounds the product of 16-bit operands to their dtype. What each
way to multiply takes is in docs/log.md.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_BLOCK = (
    4096  # tokens: half a megabyte of 16-bit keys, one of float32, stays in the second-level cache
)
_FEW = 8  # queries
_MOST_KEPT = 64 << 20  # bytes
_LINE = 64  # bytes of a cache line


class _Kept(threading.local):
    """Memory that a thread uses again: fresh memory costs its page faults, which is as much as a pass over it."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """`[size]` uint8, what the last call gave included."""
        if size <= len(self._bytes):
            return self._bytes[:size]
        with torch.inference_mode(False):  # else it could be written in that mode alone
            new = torch.empty(size, dtype=torch.uint8)
        if size <= _MOST_KEPT:
            self._bytes = new
        return new


_kept = _Kept()


class Room:
    """Where the products of up to `queries` queries with up to `length` tokens are left; one at a time in a thread.

    Few queries of a 16-bit dtype are bound by memory, and their logits are rounded to it, as in eager attention. More
    are bound by arithmetic, and float32 on converted blocks of keys costs them little more than 16 bits do.

    Args:
        votes: rows of a reduction over the group, at most `queries`.
        dim: of a key; dtype: of keys and values.
    """

    def __init__(self, queries: int, votes: int, length: int, dim: int, dtype: torch.dtype) -> None:
        block = min(_BLOCK, length) * dim if queries > _FEW else 0
        numels = (queries * length, queries * length, votes * length, block)
        dtypes = (torch.float32, dtype, torch.float32, torch.float32)
        sizes = [
            -(-numel * kind.itemsize // _LINE) * _LINE
            for numel, kind in zip(numels, dtypes, strict=True)
        ]
        self._logits, self._rounded, self._reduced, self._keys = (
            memory.view(kind)[:numel]
            for memory, numel, kind in zip(
                _kept.take(sum(sizes)).split(sizes), numels, dtypes, strict=True
            )
        )

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`[m, D]` float32 and `[n, D]` -> `[m, n]` float32."""
        out = _shaped(self._logits, len(queries), len(keys))
        if len(queries) <= _FEW:
            columns = _shaped(self._rounded, len(keys), len(queries))
            _tall_product(keys, queries.T.to(keys.dtype).contiguous(), columns)
            return out.copy_(columns.T)
        if keys.dtype == torch.float32:
            return torch.mm(queries, keys.T, out=out)
        for block, place in zip(keys.split(_BLOCK), out.split(_BLOCK, 1), strict=True):
            converted = _shaped(self._keys, *block.shape).copy_(block)
            torch.mm(queries, converted.T, out=place)
        return out

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """`[m, n]` float32 and `[n, D]` -> `[m, D]`; the weights are rounded to the dtype of the values."""
        if values.dtype != torch.float32:
            weights = _shaped(self._rounded, *weights.shape).copy_(weights)
        return weights @ values

    def reduced(self, rows: int, length: int) -> Tensor:
        """`[rows, length]` float32 of no content."""
        return _shaped(self._reduced, rows, length)


def _tall_product(tall: Tensor, narrow: Tensor, out: Tensor) -> None:
    """`[n, D] @ [D, m]`: the long operand first and as a stack of blocks takes a third of other ways."""
    whole = len(tall) // _BLOCK * _BLOCK
    if whole:
        blocks, places = (x[:whole].unflatten(0, (-1, _BLOCK)) for x in (tall, out))
        torch.bmm(blocks, narrow.expand(len(blocks), -1, -1), out=places)
    torch.mm(tall[whole:], narrow, out=out[whole:])


def _shaped(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)
