"""What fills a ring, the partial cache of a KV head: copies of a selection, and single entries after it."""

from __future__ import annotations

from torch import Tensor

from refreshkv.kernels.options import Entries
from refreshkv.kernels.reference.attention import entries_at, kept_rows


def gather(
    entries: Entries,
    wanted: Tensor,
    *,
    ring_keys: Tensor,
    ring_values: Tensor,
    heads: Tensor | None = None,
) -> None:
    """Copy the entries at the positions `wanted` to slots 0 .. K-1 of each ring.

    Free slots (positions that the store does not have) and heads that `heads` leaves out keep what they held.

    Args:
        entries: the store, all of it.
        wanted: `[B, Hkv, K]` int32, `FREE` for none.
        ring_keys, ring_values: `[R, Hkv, C, D]`, C at least K; row b's ring is `entries.rows[b]`.
        heads: `[B, Hkv]` bool; `None`: all.
    """
    keys, values, stored = entries_at(entries, wanted)
    assert values is not None
    kept, there = kept_rows(entries, len(wanted), len(ring_keys))
    stored = stored & there[:, None, None]
    if heads is not None:
        stored = stored & heads[..., None]
    row, head, slot = stored.nonzero(as_tuple=True)
    ring_keys[kept[row], head, slot] = keys[row, head, slot]
    ring_values[kept[row], head, slot] = values[row, head, slot]


def insert(
    entries: Entries,
    wanted: Tensor,
    *,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    filled: Tensor,
    pushed: Tensor,
    budget: Tensor,
) -> Tensor:
    """Entries of the store enter each ring one after the other, in place, but those that are there already.

    Args:
        entries: the store, all of it.
        wanted: `[B, Hkv, m]` int32, distinct positions in it, `FREE` for none.
        ring_keys, ring_values: `[R, Hkv, C, D]`; row b's ring is `entries.rows[b]`. `None`: a ring of positions alone.
        ring_positions: `[R, Hkv, C]` int32, `FREE` where a slot is free.
        filled, pushed: `[R, Hkv]` int64; the next entry goes to slot `(filled + pushed) % K`, from 0 on for negative
            ones too, and counts in `pushed`.
        budget: `[R]` int64, K of each row, at most C. Nothing enters where it is 0.

    Returns:
        `[B, Hkv]` int64, how many entered.
    """
    keys, values, stored = entries_at(entries, wanted)
    kept, there = kept_rows(entries, len(wanted), len(ring_positions))
    slots = ring_positions.shape[2]
    if not (slots and len(ring_positions)):
        return filled.new_zeros(wanted.shape[:2])
    held = (ring_positions[kept][:, :, None] == wanted[..., None]).any(-1)
    room = budget[kept].clamp(max=slots)
    missing = stored & ~held & (there & (room > 0))[:, None, None]
    for i, enters in enumerate(missing.unbind(-1)):
        slot = (filled[kept] + pushed[kept]) % room.clamp(min=1)[:, None]
        row, head = enters.nonzero(as_tuple=True)
        at = kept[row], head, slot[row, head]
        if ring_keys is not None and ring_values is not None:
            assert values is not None
            ring_keys[at], ring_values[at] = keys[row, head, i], values[row, head, i]
        ring_positions[at] = wanted[row, head, i]
        pushed[kept[row], head] += 1
    return missing.sum(-1)
