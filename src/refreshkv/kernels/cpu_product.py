"""Queries with keys, weights with values: the two products of attention on CPU, for one KV head that lies in one piece.

Measured with AVX512 and AMX (docs/log.md): oneDNN reads a stack of short blocks as fast as the memory allows, one long
operand at half that speed or less, and a stack of heads with spare room behind each it copies first. So a head is cut
into blocks where it lies. CPU torch rounds the product of 16-bit operands to their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024  # tokens of a block in a stack
_FLOAT_BLOCK = 4096  # tokens whose keys are float32 at a time: in the second-level cache
_FEW = 8  # queries: more are multiplied in float32
_STACKS = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


class Room:
    """Where both products of up to `queries` queries with up to `length` tokens leave what they compute.

    It serves one head after the other: fresh memory costs its page faults, which is as much as a pass over it.

    Few queries of a 16-bit dtype are bound by memory, and their logits are rounded to it, as in eager attention. More
    are bound by arithmetic, and float32 on converted blocks of keys costs them no more than 16 bits do.
    """

    def __init__(self, queries: int, length: int, dim: int, dtype: torch.dtype) -> None:
        self._logits = torch.empty(queries * length, dtype=torch.float32)
        self._keys = torch.empty(min(_FLOAT_BLOCK, length), dim, dtype=torch.float32)
        self._rounded = torch.empty(queries * length, dtype=dtype)

    def logits(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`[m, D]` float32 and `[n, D]` -> `[m, n]` float32; valid until the next call."""
        shape = (len(queries), len(keys))
        out = self._logits[: shape[0] * shape[1]].view(shape)
        if len(queries) <= _FEW:
            columns = self._rounded[: out.numel()].view(shape[::-1])
            return out.copy_(_tall_product(keys, queries.T.to(keys.dtype), columns).T)
        if keys.dtype == torch.float32:
            return torch.mm(queries, keys.T, out=out)
        for block, place in zip(keys.split(_FLOAT_BLOCK), out.split(_FLOAT_BLOCK, 1), strict=True):
            torch.mm(queries, self._keys[: len(block)].copy_(block).T, out=place)
        return out

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """`[m, n]` float32 and `[n, D]` -> `[m, D]` float32; the weights are rounded to the dtype of the values."""
        even = _even(values)
        mixed = (weights[:, even:].to(values.dtype) @ values[even:]).float()
        if even:
            # Not a view of the rows, which would be copied once more.
            stack = self._rounded[: len(weights) * even].view(-1, len(weights), _BLOCK)
            stack.copy_(weights[:, :even].unflatten(1, (-1, _BLOCK)).transpose(0, 1))
            mixed += torch.bmm(stack, _blocks(values, even)).sum(0, dtype=torch.float32)
        return mixed


def _tall_product(tall: Tensor, narrow: Tensor, out: Tensor) -> Tensor:
    """`[n, D] @ [D, m]` into `out`: several times faster with the long operand first."""
    even = _even(tall)
    if even:
        blocks = _blocks(tall, even)
        torch.bmm(blocks, narrow.contiguous().expand(len(blocks), -1, -1), out=_blocks(out, even))
    torch.mm(tall[even:], narrow, out=out[even:])
    return out


def _even(long: Tensor) -> int:
    """How many of the tokens `[n, D]` go into blocks: none where that does not pay."""
    blocks = len(long) // _BLOCK if _STACKS.get(long.dtype) else 0
    return blocks * _BLOCK if blocks > 1 else 0


def _blocks(long: Tensor, even: int) -> Tensor:
    return long[:even].unflatten(0, (-1, _BLOCK))
