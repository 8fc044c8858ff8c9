"""Where entries lie, as `entries.h` is told."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from refreshkv.kernels import options
from refreshkv.kernels.native.build import address, whole


def numbers(*names: str) -> list[tuple[str, type]]:
    """Fields of a structure."""
    return [(name, ctypes.c_int64) for name in names]


def pointers(*names: str) -> list[tuple[str, type]]:
    """Fields of a structure: addresses of tensors, or null."""
    return [(name, ctypes.c_void_p) for name in names]


class Entries(ctypes.Structure):
    """`struct Entries` of `entries.h`, field by field; `made_of` keeps alive what it points at."""

    _fields_ = (
        *pointers("keys", "values", "blocks", "positions", "rows"),
        *numbers("kept", "kv_heads", "size", "pages", "listed", "count"),
        *numbers(*(f"{of}_{step}" for of in ("key", "value") for step in ("row", "head", "token"))),
    )

    def __init__(self, entries: options.Entries) -> None:
        keys, values = entries.keys, entries.values
        indices = entries.blocks, entries.positions, entries.rows
        blocks, positions, rows = (whole(x, torch.int32) for x in indices)
        self.made_of = keys, values, blocks, positions, rows
        super().__init__(
            *map(address, self.made_of),
            *keys.shape[:3],
            -1 if blocks is None else blocks.shape[1],
            -1 if positions is None else len(positions),
            entries.count,
            *strides(keys),
            *strides(values),
        )


def strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Bytes from one row, head and token to the next."""
    if tensor is None:
        return (0, 0, 0)
    (row, head, token, _), size = tensor.stride(), tensor.element_size()
    return (row * size, head * size, token * size)
