"""What the Triton kernels share: launch settings, the cut of a row into splits, one step of the softmax, the merge.

One query token gives a GPU too little to do, so the entries of a head are cut into splits, a program each (split-K).
Each leaves its output and log-sum-exp in float32 scratch, and `merge` combines them. How many splits there are follows
from shapes alone, and each takes its share of the length that the device holds: nothing here asks the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Attended

P = ParamSpec("P")
R = TypeVar("R")

# Programs that fill a Hopper GPU once (132 SMs, two each), and as many as keep its last wave short.
FILL, WAVES = 264, 2112
LONG_SPLIT = 1024  # entries of a split that make its start and its merge cheap
MOST_SPLITS = 256
_MERGED_AT_ONCE = 16  # splits
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: entries a block, warps a program, stages of its software pipeline."""

    block: int
    warps: int
    stages: int


def on_its_device(operation: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device, which need not be that of the first argument."""

    @functools.wraps(operation)
    def run(*given: P.args, **named: P.kwargs) -> R:
        first = next(iter((*given, *named.values())))
        with torch.cuda.device_of(getattr(first, "keys", first)):
            return operation(*given, **named)

    return run


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds `size`; tensor cores take no fewer than 16."""
    return max(
        least, 1 << max(size - 1, 0).bit_length()
    )  # a tenth of a launch cheaper than triton's


def split_count(heads: int, entries: int, block: int) -> int:
    """How many programs share each of `heads` (rows times KV heads): enough to fill a GPU, in splits worth a start."""
    fill = min(FILL // max(heads, 1), triton.cdiv(entries, block))
    waves = min(WAVES // max(heads, 1), entries // LONG_SPLIT)
    return min(max(fill, waves, 1), MOST_SPLITS)


@triton.jit
def span(length, BLOCK: tl.constexpr):
    """First and last entry (exclusive) of this program's split, axis 0 of the grid, int32; equal when it has none."""
    blocks = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(0))
    first = tl.program_id(0).to(tl.int64) * blocks * BLOCK
    last = tl.minimum(first + blocks * BLOCK, length)
    return tl.minimum(first, length).to(tl.int32), last.to(tl.int32)


@triton.jit
def finished_logits(products, scale, softcap):
    """Scaled products of query and key, capped where there is a cap: c tanh(x / c)."""
    logits = products * scale
    if softcap is not None:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits


@triton.jit
def absorb(logits, values, acc, top, mass):
    """A block of the online softmax: logits `[M, N]`, values `[N, D]` or None; new acc `[M, D]`, top and mass `[M]`.

    A maximum may drop a NaN, which the mass keeps.
    """
    new_top = tl.maximum(top, tl.max(logits, 1))
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)  # while a query has seen nothing
    # Powers of 2: the scaling becomes part of the subtraction, and exp2 needs fewer instructions than exp.
    weights = tl.exp2(logits * LOG2_E - (origin * LOG2_E)[:, None])
    decay = tl.exp2(top * LOG2_E - origin * LOG2_E)
    mass = mass * decay + tl.sum(weights, 1)
    if values is not None:
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, new_top, mass


@triton.jit
def beside_sink(lse, sink):
    """What a sink leaves for the tokens; a query that sees none has nothing to share."""
    return tl.where(lse == float("-inf"), 0.0, tl.sigmoid(lse - sink.to(tl.float32)))


@triton.jit
def merge_kernel(
    partial_ptr,  # [B, Hq * Q, S, D] float32, or None
    partial_lse_ptr,  # [B, Hq * Q, S] float32
    heads_ptr,  # [B, Hkv] bool, or None
    sinks_ptr,  # [Hq], or None
    output_ptr,  # [B, Hq * Q, D], or None
    lse_ptr,  # [B, Hq * Q] float32
    splits,
    MEMBERS: tl.constexpr,  # query tokens of a KV head
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The splits of one query; grid (Hq * Q, B)."""
    query, row = tl.program_id(0), tl.program_id(1)
    queries = tl.num_programs(0)
    if heads_ptr is not None:
        if not tl.load(heads_ptr + (row * queries + query) // MEMBERS):
            return
    own = row.to(tl.int64) * queries + query
    every = tl.arange(0, MOST)
    lses = tl.load(partial_lse_ptr + own * splits + every, mask=every < splits, other=float("-inf"))
    top = tl.max(lses, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    lse = origin + tl.log(tl.sum(tl.exp(lses - origin), 0))
    tl.store(lse_ptr + own, lse)
    if output_ptr is not None:
        total = tl.where(top == float("-inf"), 0.0, lse)
        dims = tl.arange(0, DIM_PAD)
        acc = tl.zeros([DIM_PAD], tl.float32)
        for first in range(0, splits, AT_ONCE):
            some = first + tl.arange(0, AT_ONCE)
            some_lse = tl.load(
                partial_lse_ptr + own * splits + some, mask=some < splits, other=float("-inf")
            )
            # A split that saw nothing left its output unwritten.
            used = (some_lse > float("-inf"))[:, None] & (dims < DIM)[None, :]
            offsets = (own * splits + some)[:, None] * DIM + dims[None, :]
            partial = tl.load(partial_ptr + offsets, mask=used, other=0.0)
            acc += tl.sum(tl.exp(some_lse - total)[:, None] * partial, 0)
        if sinks_ptr is not None:
            acc *= beside_sink(lse, tl.load(sinks_ptr + query // QUERIES))
        tl.store(output_ptr + own * DIM + dims, acc, mask=dims < DIM)


def merge(
    partial: Tensor | None,
    partial_lse: Tensor,
    shape: torch.Size,
    *,
    dtype: torch.dtype,
    sinks: Tensor | None,
    heads: Tensor | None,
    into: Tensor | None = None,
) -> Attended:
    """The attention of each query from that of its splits.

    Args:
        partial: `[B, Hq * Q, S, D]` float32, each split's output by itself; `None`: the log-sum-exp alone is wanted.
        partial_lse: `[B, Hq * Q, S]` float32, -inf where a split saw nothing.
        shape: of the result, `[B, Hq]` or `[B, Hq, Q]`; the output has D more.
        dtype: of the output.
        sinks: `[Hq]`; heads: `[B, Hkv]` bool.
        into: contiguous, the output where it is given.
    """
    rows, count, splits = partial_lse.shape
    lse = partial_lse.new_empty(shape)
    dim = 1 if partial is None else partial.shape[-1]
    output = lse.new_empty(*shape, dim, dtype=dtype) if into is None else into
    assert output.is_contiguous() and output.shape == (*shape, dim)
    merge_kernel[(count, rows)](
        partial,
        partial_lse,
        heads,
        sinks,
        None if partial is None else output,
        lse,
        splits,
        MEMBERS=1 if heads is None else count // heads.shape[1],
        QUERIES=count // shape[1],
        DIM=dim,
        DIM_PAD=padded(dim),
        MOST=MOST_SPLITS,
        AT_ONCE=_MERGED_AT_ONCE,
        num_warps=4,
    )
    return Attended(output, lse)
