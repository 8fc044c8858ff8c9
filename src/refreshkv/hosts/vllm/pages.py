"""Where things lie in the KV cache of one vLLM layer: keys and values, and behind them in each page their codes (ours).

vLLM hands a layer its cache as `[N, Hkv, P, D + Dv]`: N blocks of P tokens, keys before values, the strides of the
layout in use. The mixed mode asks for larger pages (`page_size_padded` of the spec) and keeps the codes of a page in
what is added. So vLLM counts their memory like any other, and they share the life of the block: they are valid wherever
a prefix hit or a resumed request finds it again, and are overwritten when it is filled anew.

Letters: N pages, Hkv KV heads, P tokens of a page, D and Dv dims of a key and a value; B rows of a step, M pages a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from refreshkv.config import BLOCK, Rounding
from refreshkv.kernels.codes import Codes, code_width
from refreshkv.kernels.options import Entries

_ALIGNED = 64  # bytes: codes begin at whole cache lines
_CODE = torch.int16


@dataclass(frozen=True)
class PageShape:
    """What a page of a layer is for.

    Attributes:
        heads: Hkv.
        tokens: P, a multiple of 64 where there are codes.
        dims: D and Dv.
        dtype: of keys and values.
        rounding: of the codes; `None`: there are none.
    """

    heads: int
    tokens: int
    dims: tuple[int, int]
    dtype: torch.dtype
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        if self.rounding is not None and self.tokens % BLOCK:
            raise ValueError(
                f"RefreshKV keeps codes of {BLOCK} tokens at a time, so vLLM's block size must be a multiple of that;"
                f" got {self.tokens}: give --block-size {BLOCK} or {2 * BLOCK}"
            )

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.heads * self.tokens * sum(self.dims) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of a page: keys and values, and their codes."""
        size = self.kv_bytes + sum(prod(part) * _CODE.itemsize for part in self._parts())
        return -(-size // _ALIGNED) * _ALIGNED if self.rounding is not None else size

    @property
    def words(self) -> str:
        """For a log."""
        more = (
            f", {self.bytes / self.kv_bytes - 1:.1%} more than without codes"
            if self.rounding
            else ""
        )
        return f"pages of {self.tokens} tokens take {self.bytes:,} bytes{more}"

    def _parts(self) -> list[tuple[int, ...]]:
        """Shapes of the code tensors of one page: keys, their grids, values, their grids."""
        if self.rounding is None:
            return []
        bits = self.rounding.key_bits, self.rounding.value_bits
        room = self.heads, self.tokens // BLOCK
        return [
            (*room, width)
            for dim, b in zip(self.dims, bits, strict=True)
            for width in (code_width(dim, b), dim)
        ]

    def codes(self, cache: Tensor) -> Codes:
        """The codes behind the keys and values of `cache` `[N, Hkv, P, D + Dv]`.

        Raises:
            ValueError: its pages have no room for them, or do not lie in one piece each.
        """
        expected = (self.heads, self.tokens, sum(self.dims))
        page = cache.stride(0) * cache.element_size()
        if tuple(cache.shape[1:]) != expected or page < self.bytes or not _in_one_piece(cache):
            raise ValueError(
                f"vLLM gave pages of {page} bytes and the shape {tuple(cache.shape[1:])}; RefreshKV asked for"
                f" {self.bytes} bytes and {expected}. Use another KV cache layout (VLLM_KV_CACHE_LAYOUT=LBNHC)"
            )
        raw = torch.empty(0, dtype=_CODE, device=cache.device)
        begin = (cache.storage_offset() * cache.element_size() + self.kv_bytes) // _CODE.itemsize
        parts = []
        for shape in self._parts():
            strides = page // _CODE.itemsize, prod(shape[1:]), shape[2], 1
            part = raw.set_(cache.untyped_storage(), begin, (len(cache), *shape), strides)
            parts.append(part.detach())
            raw = torch.empty(0, dtype=_CODE, device=cache.device)
            begin += prod(shape)
        return Codes(*parts)


@dataclass(frozen=True, eq=False)
class Pages:
    """The cache of one layer as the kernels take it.

    Attributes:
        keys, values: `[N, Hkv, P, D]`, `[N, Hkv, P, Dv]`, views of vLLM's tensor.
        codes: of all pages, without a block table; `None` where there are none.
    """

    keys: Tensor
    values: Tensor
    codes: Codes | None

    @classmethod
    def of(cls, cache: Tensor, shape: PageShape) -> Pages:
        """What `cache` `[N, Hkv, P, D + Dv]` holds."""
        keys, values = cache.split(shape.dims, dim=-1)
        return cls(keys, values, None if shape.rounding is None else shape.codes(cache))

    @property
    def size(self) -> int:
        """P."""
        return self.keys.shape[2]

    def entries(
        self, blocks: Tensor, positions: Tensor | None = None, rows: Tensor | None = None
    ) -> Entries:
        """The entries of some rows: `blocks` `[B, M]` int32, the rest as in `Entries`."""
        return Entries(self.keys, self.values, blocks, positions, rows)

    def codes_at(self, blocks: Tensor) -> Codes:
        """The codes of some rows."""
        assert self.codes is not None
        return Codes(*self.codes.tensors, blocks)


def _in_one_piece(cache: Tensor) -> bool:
    """Whether the heads, tokens and dims of a page fill its first bytes, in whatever order."""
    sizes = [(s, n) for n, s in zip(cache.shape[1:], cache.stride()[1:], strict=True) if n > 1]
    reach = 1
    for stride, size in sorted(sizes):
        if stride != reach:
            return False
        reach *= size
    return True
