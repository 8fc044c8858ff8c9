"""What begins a decode step on a GPU: the new token goes into the store, and its query says which heads are full."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from refreshkv.kernels.options import Entries
from refreshkv.kernels.triton.books import (
    AVAILABLE,
    FILLED,
    FULL_STEP,
    READ,
    STEP,
    STEPS,
    add_to,
    copy,
    tally_of,
)
from refreshkv.kernels.triton.common import on_its_device, padded
from refreshkv.kernels.triton.layout import (
    LIMITS,
    contiguous_rows,
    kept_row,
    look_up,
    page_of,
    store_of,
    strides,
)

_COPY_BYTES = 16384  # of keys or values, of a program in `write`
_AT_ONCE = 8  # query heads that `drift` adds up
_EPSILON = tl.constexpr(1e-8)  # as in `torch.nn.functional.cosine_similarity`


@on_its_device
def write(
    entries: Entries,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    starts: Tensor,
    tally: Tensor | None = None,
    hidden: Tensor | None = None,
    full: bool = False,
) -> None:
    """See `reference.write`."""
    rows, kv_heads, count, dim = new_keys.shape
    store, limits = store_of(replace(entries, positions=None))
    new_keys, new_values = contiguous_rows(new_keys), contiguous_rows(new_values)
    value_dim = new_values.shape[-1]
    for stored, new in ((entries.keys, new_keys), (entries.values, new_values)):
        assert stored is not None and stored.shape[1::2] == new.shape[1::2], "of another model"
    most = max(1, _COPY_BYTES // (padded(max(dim, value_dim)) * new_keys.itemsize))
    block = min(most, padded(count, least=1))
    write_kernel[(triton.cdiv(count, block), kv_heads, rows)](
        store,
        *limits,
        new_keys,
        new_values,
        starts.contiguous(),
        hidden,
        tally_of(tally),
        count,
        *strides(new_keys, 3),
        *strides(new_values, 3),
        PAGE=page_of(entries),
        FULL=full,
        DIM=dim,
        DIM_PAD=padded(dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=padded(value_dim),
        BLOCK=block,
        num_warps=1 if block == 1 else 8,
    )


@on_its_device
def drift(
    query: Tensor,
    reference: Tensor,
    state: Tensor,
    *,
    stride: int,
    threshold: float,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.drift`."""
    (rows, heads, dim), kv_heads = query.shape, state.shape[2]
    assert state.is_contiguous()
    query, reference = contiguous_rows(query), contiguous_rows(reference)
    full = state.new_empty(rows, kv_heads, dtype=torch.bool)
    summary = reference.new_empty(rows, kv_heads, dim)
    drift_kernel[(kv_heads, rows)](
        query,
        reference,
        state,
        full,
        summary,
        stride,
        threshold,
        *strides(query, 2),
        *strides(reference, 2),
        MEMBERS=heads // kv_heads if per_head else heads,
        PER_HEAD=per_head,
        DIM=dim,
        DIM_PAD=padded(dim),
        AT_ONCE=_AT_ONCE,
        num_warps=4,
    )
    return full, summary


@triton.jit(do_not_specialize=LIMITS)
def write_kernel(
    store,
    width,
    kept,
    pages,
    keys_ptr,  # [B, Hkv, n, D]
    values_ptr,  # [B, Hkv, n, Dv]
    starts_ptr,  # [B] int64
    hidden_ptr,  # [B] int64, or None
    tally,
    count,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    PAGE: tl.constexpr,
    FULL: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of tokens, Hkv, B). The program of the first block counts."""
    block, head, row = (
        tl.program_id(0),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    start = tl.load(starts_ptr + row)
    if (tally.counts_ptr is not None) and (block == 0):
        available = start + count - tl.load(hidden_ptr + row)
        one, tells = tl.cast(1, tl.int64), available == available
        add_to(tally, row, head, STEP, one, tells)
        add_to(tally, row, head, AVAILABLE, available, tells)
        if FULL:
            add_to(tally, row, head, FULL_STEP, one, tells)
            add_to(tally, row, head, READ, available, tells)
    kept = kept_row(store.rows_ptr, row, kept)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < count) & (kept >= 0)
    kept = tl.maximum(kept, 0)
    key_at, value_at, exists = look_up(
        store, width, pages, row, kept, head, start + token, inside, PAGE
    )
    keys_ptr += row * key_row + head * key_head
    copy(keys_ptr, token * key_token, store.keys_ptr, key_at, exists, DIM, DIM_PAD)
    values_ptr += row * value_row + head * value_head
    copy(values_ptr, token * value_token, store.values_ptr, value_at, exists, VALUE_DIM, VALUE_PAD)


@triton.jit
def drift_kernel(
    query_ptr,  # [B, Hq, D]
    reference_ptr,  # [B, Hkv, D] float32
    state_ptr,  # [6, B, Hkv] int64
    full_ptr,  # [B, Hkv] bool
    summary_ptr,  # [B, Hkv, D] float32
    stride,
    threshold,
    query_row,
    query_head,
    reference_row,
    reference_head,
    MEMBERS: tl.constexpr,  # query heads that decide together
    PER_HEAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid (Hkv, B)."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv_heads, rows = tl.num_programs(0), tl.num_programs(1)
    dims = tl.arange(0, DIM_PAD)
    query_ptr += row * query_row
    if PER_HEAD:
        query_ptr += head * MEMBERS * query_head
    total = tl.zeros([DIM_PAD], tl.float32)
    for first in range(0, MEMBERS, AT_ONCE):
        member = first + tl.arange(0, AT_ONCE)
        some = tl.load(
            query_ptr + member[:, None] * query_head + dims[None, :],
            mask=(member < MEMBERS)[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        total += tl.sum(some.to(tl.float32), 0)
    summary = total / MEMBERS
    own = row * kv_heads + head
    tl.store(summary_ptr + own * DIM + dims, summary, mask=dims < DIM)
    reference_ptr += row * reference_row + head * reference_head
    reference = tl.load(reference_ptr + dims, mask=dims < DIM, other=0.0)
    reference /= tl.maximum(tl.sqrt(tl.sum(reference * reference, 0)), _EPSILON)
    summary /= tl.maximum(tl.sqrt(tl.sum(summary * summary, 0)), _EPSILON)
    cosine = tl.sum(summary * reference, 0)
    # Rounding can lift the cosine of a vector with itself above 1. A NaN is no drift.
    drifted = tl.where(cosine > 1, 1.0, cosine) <= threshold
    counters = tl.cast(rows, tl.int64) * kv_heads
    steps = tl.load(state_ptr + STEPS * counters + own) + 1
    empty = tl.load(state_ptr + FILLED * counters + own) == 0
    tl.store(full_ptr + own, ((steps % stride == 0) & drifted) | empty)
