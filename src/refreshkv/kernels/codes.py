"""How the codes of `policy.rounding` lie in memory: bit by bit, in the order in which matrix products want numbers.

A block of 64 tokens is cut into tiles, of keys 16 tokens x 32 dims, of values 32 tokens x 16 dims. Two numbers that are
neighbours along the summed dimension (dims of keys, tokens of values) make a pair, as in a packed bfloat16 operand. A
tile is a *plane* of 32 int16 for each bit: number `2 * column + parity` of a plane holds, in its bit s, that bit of the
code at pair s. So a register of a plane gives, shifted by s, the s-th row of a packed operand.

Letters: R rows, Hkv KV heads, N blocks of a row, D head dim, rounded up to whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refreshkv.policy.rounding import BLOCK, Rounded, restored

_LONG, _SHORT = 32, 16  # numbers of a tile along the summed dimension, and across
_PAIR = 2
_PLANE = _SHORT * _PAIR  # int16 of a plane


@dataclass(frozen=True, eq=False)
class Codes:
    """Rounded copies of whole blocks, and where those of each row lie among them.

    Attributes:
        keys, values: `[R, Hkv, N, W]` int16, planes; or, with `blocks`, pages `[pages, Hkv, blocks a page, W]`.
        key_grids, value_grids: `[R, Hkv, N, D]` int16, the grid of each dim.
        blocks: `[B, M]` int32, as in `Entries`. `None`: no pages, and row b lies where `Entries.rows` says.
    """

    keys: Tensor
    key_grids: Tensor
    values: Tensor
    value_grids: Tensor
    blocks: Tensor | None = None

    @classmethod
    def room(
        cls, like: Tensor, dims: tuple[int, int], blocks: int, bits: int, value_bits: int
    ) -> Codes:
        """For `blocks` blocks of each row and KV head of `like` `[R, Hkv, ...]`; keys and values have `dims`."""
        shape = (*like.shape[:2], blocks)
        widths = (code_width(dim, b) for dim, b in zip(dims, (bits, value_bits), strict=True))
        keys, values = (like.new_zeros(*shape, width, dtype=torch.int16) for width in widths)
        key_grids, value_grids = (like.new_zeros(*shape, dim, dtype=torch.int16) for dim in dims)
        return cls(keys, key_grids, values, value_grids)

    @property
    def bits(self) -> int:
        """Bits of the code of a key's number."""
        return self.keys.shape[-1] // code_width(self.key_grids.shape[-1], 1)

    @property
    def value_bits(self) -> int:
        """Bits of the code of a value's number."""
        return self.values.shape[-1] // code_width(self.value_grids.shape[-1], 1)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, their grids, values, their grids."""
        return self.keys, self.key_grids, self.values, self.value_grids

    @property
    def row_blocks(self) -> int:
        """Blocks of a row that there is room for."""
        return self.keys.shape[2] * (1 if self.blocks is None else self.blocks.shape[1])

    @property
    def block_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values of one block of one KV head."""
        widths = [part.shape[-1] * part.element_size() for part in self.tensors]
        return sum(widths[:2]), sum(widths[2:])


def code_width(dim: int, bits: int) -> int:
    """int16 of a block of `dim` dims, keys or values."""
    return _padded(dim) * BLOCK // (_LONG * _SHORT) * bits * _PLANE


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Codes of keys `[..., 64, D]` -> `[..., W]` int16."""
    return _pack(_whole(codes, _LONG).mT, bits)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Codes of values `[..., 64, D]` -> `[..., W]` int16."""
    return _pack(_whole(codes, _LONG), bits)


def restored_keys(codes: Codes) -> Tensor:
    """Keys `[R, Hkv, N * 64, D]` float32."""
    dim = codes.key_grids.shape[-1]
    numbers = _unpack(codes.keys, _padded(dim), BLOCK).mT[..., :dim]
    return restored(Rounded(numbers, codes.key_grids)).flatten(2, 3)


def restored_values(codes: Codes) -> Tensor:
    """Values `[R, Hkv, N * 64, D]` float32."""
    dim = codes.value_grids.shape[-1]
    numbers = _unpack(codes.values, BLOCK, _padded(dim))[..., :dim]
    return restored(Rounded(numbers, codes.value_grids)).flatten(2, 3)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """`[..., summed, across]`, whole tiles -> `[..., W]` int16."""
    tiles = codes.unflatten(-2, (-1, _SHORT, _PAIR)).unflatten(-1, (-1, _SHORT))
    lanes = tiles.movedim((-5, -2, -1, -3, -4), (-5, -4, -3, -2, -1))  # tiles, column, parity, pair
    shifts = torch.arange(_SHORT, device=codes.device, dtype=torch.int32)
    planes = torch.stack([(((lanes >> bit) & 1) << shifts).sum(-1) for bit in range(bits)], -3)
    return planes.flatten(-5).to(torch.int16)


def _unpack(planes: Tensor, summed: int, across: int) -> Tensor:
    """The inverse: `[..., W]` int16 -> `[..., summed, across]` int32."""
    tiles = planes.int().unflatten(-1, (summed // _LONG, across // _SHORT, -1, _SHORT, _PAIR))
    shifts = torch.arange(_SHORT, device=planes.device, dtype=torch.int32)
    lanes = torch.zeros_like(tiles[..., 0, :, :])[..., None].expand(
        *tiles.shape[:-3], _SHORT, _PAIR, _SHORT
    )
    for bit in range(tiles.shape[-3]):
        lanes = lanes + (((tiles[..., bit, :, :, None] >> shifts) & 1) << bit)
    return lanes.movedim((-5, -4, -3, -2, -1), (-5, -2, -1, -3, -4)).flatten(-2).flatten(-4, -2)


def _whole(codes: Tensor, multiple: int) -> Tensor:
    """Zeros up to whole tiles behind the last dimension."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % multiple))


def _padded(dim: int) -> int:
    return dim + -dim % _LONG
