"""What a decode step keeps: new tokens in the store, the ring of a KV head, what a step counts, when it is full.

A ring is the partial cache of a KV head: `ring_keys` and `ring_values` `[R, Hkv, C, D]`, both `None` for a ring of
positions alone; `ring_positions` `[R, Hkv, C]` int32, `FREE` where a slot is free; `state` `[6, R, Hkv]` int64,
contiguous, the counters of `STATE` one after the other; `budget` `[R]` int64, K of each row, of which no more than C
count. Row b's ring is `entries.rows[b]`, no ring is that of two rows. Sums of counters wrap around.

`tally` `[B, Hkv, 5]` int64 is what the steps counted, in the order of `stats.COUNTS`, and is added to. `counted` `[B]`
bool: other rows add nothing to it; `None`: all count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refreshkv.kernels.options import Entries
from refreshkv.kernels.reference.attention import entries_at, kept_rows
from refreshkv.policy.selection import FREE
from refreshkv.policy.triggers import QueryDrift

# filled: entries of the last refresh; pushed: those that entered since; steps: partial steps since; newest: the slot of
# the token pushed last; used: slots that hold a token; fetched: entries that `fetch` brought in the last step.
STATE = ("filled", "pushed", "steps", "newest", "used", "fetched")
FULL, STEPS, READ, ROUNDED, AVAILABLE = range(5)  # of a tally


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
    """Tokens go into the store, over what is there; a position that does not exist is left out.

    With a tally they are one decode step, which is counted here and nowhere else: each KV head adds 1 to the steps, and
    what its row has with these tokens to what full attention would have read.

    Args:
        entries: the store, all of it.
        new_keys, new_values: `[B, Hkv, n, D]`.
        starts: `[B]` int64, where the first token of each row goes.
        hidden: `[B]` int64, padding tokens of each row, which no step reads; with a tally.
        full: the step reads everything, and nothing that follows will say so.
    """
    count = new_keys.shape[2]
    page, entry, stored = _places(
        entries, starts[:, None] + torch.arange(count, device=new_keys.device)
    )
    assert entries.values is not None
    for buffer, new in ((entries.keys, new_keys), (entries.values, new_values)):
        buffer[page[stored], :, entry[stored]] = new.transpose(1, 2)[stored]
    if tally is not None:
        assert hidden is not None
        available = (starts + count - hidden)[:, None]
        tally[..., STEPS] += 1
        tally[..., AVAILABLE] += available
        if full:
            tally[..., FULL] += 1
            tally[..., READ] += available


def push(
    entries: Entries,
    at: Tensor,
    *,
    back: int = 0,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    state: Tensor,
    budget: Tensor,
    full: Tensor | None = None,
    tally: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """The token being decoded enters every ring, over the lowest entry if no slot is free: a partial step begins.

    It goes to slot `(filled + pushed) % K`, from 0 on for negative sums too. It is not asked whether it is there.

    Args:
        entries: the store, all of it.
        at: `[B]` int64, with `back` subtracted the position of the token; nothing enters where there is none.
        full: `[B, Hkv]` bool, heads that will read everything instead, so that what they have in the ring does not
            count as read; `None`: none.
    """
    position = (at - back)[:, None, None].expand(-1, ring_positions.shape[1], 1)
    position = position.where((position >= 0) & (position < entries.width), FREE).int()
    kept, there = kept_rows(entries, len(at), len(ring_positions))
    own, room = _own(state, budget, kept, ring_positions)
    filled, pushed, steps, newest, used, fetched = own
    newest.copy_((filled + pushed) % room.clamp(min=1))
    ring = ring_keys, ring_values, ring_positions
    pushed += _enter(entries, position, ring, filled + pushed, room, anew=True)
    steps += 1
    fetched.zero_()
    used.copy_(torch.minimum(filled + pushed, room))
    state[:, kept[there]] = own[:, there]
    _count_read(tally, used, there, full, counted)


def fetch(
    entries: Entries,
    best: Tensor,
    *,
    ends: Tensor,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    state: Tensor,
    budget: Tensor,
    full: Tensor | None = None,
    tally: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """What follows the token in each of some slots enters as a pushed one does, but what is there already (ours).

    Args:
        entries: the store, all of it.
        best: `[B, Hkv, m]` int64, slots of the ring; one that it does not have, or that is free, fetches nothing.
        ends: `[B]` int64, tokens from there on are not fetched.
        full: as in `push`.
    """
    kept, there = kept_rows(entries, len(best), len(ring_positions))
    own, room = _own(state, budget, kept, ring_positions)
    filled, pushed, _, _, used, fetched = own
    wanted = _successors(ring_positions, kept, best, ends)
    ring = ring_keys, ring_values, ring_positions
    fetched.copy_(_enter(entries, wanted, ring, filled + pushed, room))
    pushed += fetched
    used.copy_(torch.minimum(filled + pushed, room))
    state[:, kept[there]] = own[:, there]
    _count_read(tally, fetched, there, full, counted)


def refresh(
    entries: Entries,
    wanted: Tensor,
    filled: Tensor,
    *,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_positions: Tensor,
    state: Tensor,
    budget: Tensor,
    heads: Tensor | None = None,
    reference: Tensor | None = None,
    summary: Tensor | None = None,
    ends: Tensor | None = None,
    hidden: Tensor | None = None,
    tally: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """A new selection replaces what the rings hold: slots 0 .. K-1 are its positions, all others are free.

    The copies of a position that the store does not have stay what they were. With a tally each head adds a full step
    to it, and what its row has to what was read.

    Args:
        entries: the store, all of it.
        wanted: `[B, Hkv, K]` int32, `FREE` for none, K at most C.
        filled: `[B, Hkv]` int64, how many are meant.
        heads: `[B, Hkv]` bool, the others stay as they are; `None`: all.
        reference, summary: `[B, Hkv, X]`, or both `None`: the first becomes the second.
        ends, hidden: `[B]` int64, where each row ends, and its padding tokens; with a tally.
    """
    _copy(entries, wanted, ring_keys, ring_values, heads)
    kept, there = kept_rows(entries, len(wanted), len(ring_positions))
    meant = there[:, None].expand_as(filled) if heads is None else heads & there[:, None]
    new = wanted.new_full((*filled.shape, ring_positions.shape[2]), FREE)
    new[..., : wanted.shape[2]] = wanted
    own, room = _own(state, budget, kept, ring_positions)
    fresh = torch.zeros_like(own)
    fresh[0], fresh[3], fresh[4] = filled, own[3], torch.minimum(filled, room)
    row, head = meant.nonzero(as_tuple=True)
    ring_positions[kept[row], head] = new[row, head]
    state[:, kept[row], head] = fresh[:, row, head]
    if reference is not None and summary is not None:
        reference.copy_(torch.where(meant[..., None], summary, reference))
    if tally is not None:
        assert ends is not None and hidden is not None
        tells = meant if counted is None else meant & counted[:, None]
        tally[..., FULL] += tells
        tally[..., READ] += (ends - hidden)[:, None] * tells


def drift(
    query: Tensor,
    reference: Tensor,
    state: Tensor,
    *,
    stride: int,
    threshold: float,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """Which heads are full at once in this step, by `policy.triggers.QueryDrift` or because their ring is empty.

    Args:
        query: `[B, Hq, D]`.
        reference: `[B, Hkv, D]` float32, of the last full step of each head.
        state: of rings, `[6, B, Hkv]`.
        stride, threshold: of the trigger.
        per_head: each KV head decides by its own queries; else all of a row by the mean of all.

    Returns:
        `[B, Hkv]` bool, and what such a head has to remember, `[B, Hkv, D]` float32.
    """
    filled, _, steps, *_ = state
    trigger = QueryDrift(stride, threshold, "head" if per_head else "layer")
    full = trigger.before(steps + 1, query, reference) | (filled == 0)
    summary = trigger.reference(query, query.new_empty(0), state.shape[2])
    return full, summary.contiguous()


def _places(entries: Entries, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row (or page) and entry in it of `positions` `[B, n]` of each row, and which of them exist."""
    stored, size = (positions >= 0) & (positions < entries.width), entries.keys.shape[2]
    positions = positions.where(stored, 0)
    if entries.blocks is None:
        row, there = kept_rows(entries, len(positions), len(entries.keys))
        return row[:, None].expand_as(positions), positions, stored & there[:, None]
    if not entries.width:
        return positions, positions, stored
    page = entries.blocks.long().gather(1, positions // size)
    return page, positions % size, stored & (page >= 0) & (page < len(entries.keys))


def _own(
    state: Tensor, budget: Tensor, kept: Tensor, ring_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Counters `[6, B, Hkv]` of the rings `kept` `[B]`, a copy, and their number of slots in use at most, `[B, 1]`."""
    if not len(budget):
        return state.new_zeros(len(state), len(kept), state.shape[2]), kept[:, None]
    return state[:, kept], budget[kept].clamp(0, ring_positions.shape[2])[:, None]


def _successors(ring_positions: Tensor, kept: Tensor, best: Tensor, ends: Tensor) -> Tensor:
    """`[B, Hkv, m]` int32: the positions after those in the slots `best`, `FREE` where there is none."""
    slots = ring_positions.shape[2]
    if not (slots and len(ring_positions)):
        return torch.full_like(best, FREE, dtype=torch.int32)
    inside = (best >= 0) & (best < slots)
    held = ring_positions[kept].gather(-1, best.where(inside, 0)).long()
    after = inside & (held >= 0) & (held + 1 < ends[:, None, None])
    return (held + 1).where(after & (held < 2**31 - 1), FREE).int()


def _enter(
    entries: Entries,
    wanted: Tensor,
    ring: tuple[Tensor | None, Tensor | None, Tensor],
    turn: Tensor,
    room: Tensor,
    anew: bool = False,
) -> Tensor:
    """Entries of the store enter each ring one after the other, but those that are there already; how many, `[B, Hkv]`.

    Args:
        wanted: `[B, Hkv, m]` int32, positions, `FREE` for none.
        ring: its keys, values and positions.
        turn: `[B, Hkv]` int64, the slot of the first, before the remainder by `room` `[B, 1]`.
        anew: it is not asked whether they are there.
    """
    ring_keys, ring_values, ring_positions = ring
    keys, values, stored = entries_at(entries, wanted)
    kept, there = kept_rows(entries, len(wanted), len(ring_positions))
    if not (ring_positions.shape[2] and len(ring_positions)):
        return torch.zeros_like(turn)
    missing = stored & (there[:, None] & (room > 0))[..., None]
    if not anew:
        missing &= ~(ring_positions[kept][:, :, None] == wanted[..., None]).any(-1)
    for i, enters in enumerate(missing.unbind(-1)):
        row, head = enters.nonzero(as_tuple=True)
        at = kept[row], head, (turn % room.clamp(min=1))[row, head]
        if ring_keys is not None and ring_values is not None:
            assert values is not None
            ring_keys[at], ring_values[at] = keys[row, head, i], values[row, head, i]
        ring_positions[at] = wanted[row, head, i]
        turn = turn + enters
    return missing.sum(-1)


def _copy(
    entries: Entries,
    wanted: Tensor,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    heads: Tensor | None,
) -> None:
    """The entries at the positions `wanted` `[B, Hkv, K]` go to slots 0 .. K-1 of the rings of `heads`."""
    if ring_keys is None or ring_values is None:
        return
    keys, values, stored = entries_at(entries, wanted)
    assert values is not None
    kept, there = kept_rows(entries, len(wanted), len(ring_keys))
    stored = stored & there[:, None, None]
    if heads is not None:
        stored = stored & heads[..., None]
    row, head, slot = stored.nonzero(as_tuple=True)
    ring_keys[kept[row], head, slot] = keys[row, head, slot]
    ring_values[kept[row], head, slot] = values[row, head, slot]


def _count_read(
    tally: Tensor | None,
    read: Tensor,
    there: Tensor,
    full: Tensor | None,
    counted: Tensor | None,
) -> None:
    """`read` `[B, Hkv]` entries of the rings, where they are `there` `[B]`."""
    if tally is None:
        return
    counts = there if counted is None else there & counted
    wanted = counts[:, None].expand_as(read) if full is None else counts[:, None] & ~full
    tally[..., READ] += read.where(wanted, 0)
