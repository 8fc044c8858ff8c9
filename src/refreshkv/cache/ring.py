"""The partial cache of one layer: a ring of K slots per (row, KV head), sorted lowest score first.

`Ring` knows which positions are in it and counts; `CopiedRing` keeps copies of their keys and values beside, which a
partial step reads in one piece, and `IndexedRing` reads them from the store. Letters as in `kernels.options`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.store import Store
from refreshkv.kernels.options import Attended, AttendOptions, Entries
from refreshkv.kernels.reference.rings import STATE
from refreshkv.policy.selection import FREE, Selected

_SPARE = 64  # slots of head room when a ring grows towards its budget


class Ring(ABC):
    """Positions of the selected tokens, and of those after them.

    A refresh fills slots 0 .. n-1 with the n = min(K, tokens) best, lowest score first. The j-th new token
    goes to slot (n + j) mod K, j from 0: the free slots first, then over the lowest-scored entry, the next
    lowest, and so on. So after j partial steps a full ring holds the K-j best of the last refresh and the j
    newest tokens. Attention does not care about the order of slots, because RoPE is already applied.

    Entries that follow the most attended ones may be fetched in between; they too push out the lowest.

    Args:
        store: the full cache.
        budget: `[B]` int64, K of each row.
        slots: as many for every row, whatever its budget, allocated at once; `None`: the ring grows with what it holds,
            so that a generous budget costs no memory.

    Attributes:
        positions: `[B, Hkv, C]` int32, the position of each entry in the full store, `FREE` where there is none.
        state: `[6, B, Hkv]` int64, the counters that follow, in the order of `reference.rings.STATE`.
        filled: `[B, Hkv]` int64, n at the last refresh; 0 where nothing was selected yet, or it is void.
        pushed: `[B, Hkv]` int64, entries pushed since then, fetched ones included.
        steps: `[B, Hkv]` int64, partial steps since then.
        newest: `[B, Hkv]` int64, the slot of the token pushed last.
        used: `[B, Hkv]` int64, how many slots hold a token.
        fetched: `[B, Hkv]` int64, entries fetched in the last step.
    """

    # What has a row for each of the batch, beside the state, but for the budget, which is the cache's.
    ROWS: tuple[str, ...] = ("positions",)

    def __init__(self, store: Store, budget: Tensor, slots: int | None = None) -> None:
        self._store = store
        self._slots = slots
        rows, heads, device = store.rows, store.kv_heads, budget.device
        self.positions = torch.full(
            (rows, heads, slots or 0), FREE, dtype=torch.int32, device=device
        )
        self.state = torch.zeros(len(STATE), rows, heads, dtype=torch.int64, device=device)
        self.allow(budget)
        self._most = 0  # no row uses more slots than this; known without asking the device

    def allow(self, budget: Tensor) -> None:
        """K of each row, `[B]` int64, from here on; counts in the next refresh of a row."""
        self.budget = budget
        self._largest = self._slots or int(budget.max())

    def hold(self, slots: int) -> None:
        """So many slots for every row of a ring that has a fixed number, none of them fewer than before."""
        if slots > self.positions.shape[2]:
            self._slots = slots
            self._grow(slots)

    @property
    def filled(self) -> Tensor:
        return self.state[0]

    @property
    def pushed(self) -> Tensor:
        return self.state[1]

    @property
    def steps(self) -> Tensor:
        return self.state[2]

    @property
    def newest(self) -> Tensor:
        return self.state[3]

    @property
    def used(self) -> Tensor:
        return self.state[4]

    @property
    def fetched(self) -> Tensor:
        return self.state[5]

    def refresh(self, selection: Selected, heads: Tensor | None = None, **more: Any) -> None:
        """Replace the entries of `heads` (`[B, Hkv]` bool; `None` is all) by a new selection from the store.

        `more`: what the trigger remembers, and what is counted; see `reference.refresh`.
        """
        self._reserve(max(selection.positions.shape[-1], self._most))
        self._store.refresh(
            selection.positions, selection.filled, **self._own(), heads=heads, **more
        )

    def push(self, positions: Tensor, back: int = 0, **counts: Any) -> None:
        """The token being decoded, at `positions - back` `[B]`, enters: over the lowest entry if no slot is free.

        `counts`: what is counted; see `reference.push`.
        """
        self._reserve(self._most + 1)
        self._store.push(positions, back=back, **self._own(), **counts)

    def attend(
        self,
        query: Tensor,
        options: AttendOptions,
        *,
        successor: int = 0,
        end: Tensor | None = None,
        **counts: Any,
    ) -> Attended:
        """Attention `[B, Hq, D]` over the ring; then what follows the most attended entries is fetched.

        With m fetched a step a ring has turned over after K / (m + 1) steps without a refresh.

        Args:
            query: `[B, Hq, D]`, of the token pushed last.
            options: of the model.
            successor: how many entries fetch the token after them (ours; paper: 0).
            end: `[B]` int64, tokens from there on are not fetched. Without `successor` there is none.
            counts: what is counted; see `reference.fetch`.
        """
        attended, best = self._attend(query, options.over(lengths=self.used), successor)
        if successor:
            assert end is not None
            self._reserve(self._most + best.shape[2])
            self._store.fetch(best, ends=end, **self._own(), **counts)
        return attended

    def void(self) -> None:
        """What was selected is no longer true: the next step of every row is full."""
        for counter in (self.filled, self.pushed, self.used):
            counter.zero_()
        self.positions.fill_(FREE)

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`, `[B']` int64; `allow` says what K they have."""
        for name in (*self.ROWS, "state"):
            old = getattr(self, name)
            new = old.index_select(1 if name == "state" else 0, rows)
            if self._slots is None:
                setattr(self, name, new)
            else:
                old.copy_(new)

    def tensors(self) -> list[Tensor]:
        """All that a step reads and writes, but for the budget."""
        return [*(getattr(self, name) for name in self.ROWS), self.state]

    @abstractmethod
    def _attend(self, query: Tensor, options: AttendOptions, count: int) -> tuple[Attended, Tensor]:
        """Attention, and the slots of the `count` most attended entries but the newest, `[B, Hkv, count]` int64."""

    def _own(self) -> dict[str, Any]:
        """What the operations on rings call it."""
        keys, values = self._copies()
        return {
            "ring_keys": keys,
            "ring_values": values,
            "ring_positions": self.positions,
            "state": self.state,
            "budget": self.budget,
        }

    def _copies(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of the entries, where the ring has its own."""
        return None, None

    def _reserve(self, slots: int) -> None:
        """Room for `slots` slots, at most the largest budget."""
        self._most = min(slots, self._largest)
        capacity = self.positions.shape[2]
        if self._most > capacity:
            self._grow(min(self._largest, self._most + max(_SPARE, self._most // 4)))

    def _grow(self, slots: int) -> None:
        self.positions = F.pad(self.positions, (0, slots - self.positions.shape[2]), value=FREE)


class CopiedRing(Ring):
    """A ring with keys and values of its own.

    Attributes:
        keys, values: `[B, Hkv, C, D]`.
    """

    ROWS = ("keys", "values", *Ring.ROWS)

    def __init__(self, store: Store, budget: Tensor, slots: int | None = None) -> None:
        super().__init__(store, budget, slots)
        self.keys, self.values = store.room_for(slots or 0)

    def _attend(self, query: Tensor, options: AttendOptions, count: int) -> tuple[Attended, Tensor]:
        entries = Entries(self.keys, self.values)
        return self._store.attend_and_rank(query, entries, options, newest=self.newest, count=count)

    def _copies(self) -> tuple[Tensor | None, Tensor | None]:
        return self.keys, self.values

    def _grow(self, slots: int) -> None:
        extra = slots - self.positions.shape[2]
        super()._grow(slots)
        self.keys = F.pad(self.keys, (0, 0, 0, extra))
        self.values = F.pad(self.values, (0, 0, 0, extra))


class IndexedRing(Ring):
    """A ring of positions alone: 4 bytes a slot, and the entries are read where they lie in the store."""

    def _attend(self, query: Tensor, options: AttendOptions, count: int) -> tuple[Attended, Tensor]:
        return self._store.attend_at(
            query, self.positions, options, newest=self.newest, count=count
        )


RINGS = {"copied": CopiedRing, "indexed": IndexedRing}
