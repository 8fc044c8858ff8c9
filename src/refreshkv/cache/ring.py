"""The partial cache of one layer: a ring of K slots per (row, KV head), sorted lowest score first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.store import DenseStore
from refreshkv.kernels.backend import Backend
from refreshkv.policy.selection import FREE, Selection

_SPARE = 64  # slots of head room when the ring grows towards its budget


class PartialCache:
    """Copies of the K selected entries, contiguous so that a partial step reads nothing else.

    A refresh fills slots 0 .. n-1 with the n = min(K, tokens) best, lowest score first. The j-th new token
    goes to slot (n + j) mod K, j from 0: the free slots first, then over the lowest-scored entry, the next
    lowest, and so on. So after j partial steps a full ring holds the K-j best of the last refresh and the j
    newest tokens. Attention does not care about the order of slots, because RoPE is already applied.

    Entries that follow the most attended ones may be fetched in between (`fetch`); they too push out the lowest.

    Attributes:
        keys, values: `[B, Hkv, C, D]`; C <= K grows with what is stored, so that a generous budget costs no memory.
        positions: `[B, Hkv, C]` int64, the place of each entry in the full store, `FREE` where there is none.
        budget: `[B]` int64, K of each row.
        filled: `[B, Hkv]` int64, n at the last refresh.
        pushed: `[B, Hkv]` int64, entries pushed since then, fetched ones included.
        steps: `[B, Hkv]` int64, partial steps since then.
        newest: `[B, Hkv]` int64, the slot of the token pushed last.
        fetched: `[B, Hkv]` int64, entries fetched since then.
    """

    def __init__(self, store: DenseStore, budget: Tensor, backend: Backend) -> None:
        self._store = store
        self._backend = backend
        self.budget = budget
        rows, heads = store.keys.shape[:2]
        self.keys = store.keys.new_empty(rows, heads, 0, store.keys.shape[-1])
        self.values = store.values.new_empty(rows, heads, 0, store.values.shape[-1])
        self.positions = torch.empty(rows, heads, 0, dtype=torch.int64, device=budget.device)
        self.filled = torch.zeros(rows, heads, dtype=torch.int64, device=budget.device)
        self.pushed = torch.zeros_like(self.filled)
        self.steps = torch.zeros_like(self.filled)
        self.newest = torch.zeros_like(self.filled)
        self.fetched = torch.zeros_like(self.filled)
        self._largest = int(budget.max())
        self._most = 0  # no head uses more slots than this; known without asking the device
        self._uniform = False  # every head uses exactly `_most`
        self._full = False  # every ring is full, as far as is known

    @property
    def used(self) -> Tensor:
        """`[B, Hkv]` int64, how many slots hold a token."""
        return torch.minimum(self.filled + self.pushed, self.budget[:, None])

    def entries(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[B, Hkv, n, D]` and how many of them count, `[B, Hkv]` int64 or `None` for all."""
        keys, values = self.keys[:, :, : self._most], self.values[:, :, : self._most]
        return keys, values, None if self._uniform else self.used

    def refresh(self, selection: Selection, heads: Tensor | None = None) -> None:
        """Replace the entries of `heads` (`[B, Hkv]` bool; `None` is all) by a new selection from the store."""
        slots = selection.positions.shape[-1]
        self._reserve(slots)
        new = F.pad(selection.positions, (0, self.positions.shape[2] - slots), value=FREE)
        if heads is None:
            self.filled.copy_(selection.filled)
            self.pushed.zero_()
            self.steps.zero_()
            self.positions.copy_(new)
        else:
            self.filled.copy_(torch.where(heads, selection.filled, self.filled))
            self.pushed.masked_fill_(heads, 0)
            self.steps.masked_fill_(heads, 0)
            self.positions.copy_(torch.where(heads[..., None], new, self.positions))
        self._backend.gather(self._store.keys, selection.positions, self.keys, heads)
        self._backend.gather(self._store.values, selection.positions, self.values, heads)
        self._measure()

    def push(self, keys: Tensor, values: Tensor, positions: Tensor | int) -> None:
        """The token being decoded enters every ring, over the lowest-scored entry where there is no free slot.

        Args:
            keys, values: `[B, Hkv, D]`.
            positions: its place in the full store, for all or `[B, 1]` for each row.
        """
        self._make_room(1)
        self.newest.copy_(self._next_slot())
        self._write(self.newest, keys, values, positions)
        self.pushed += 1
        self.steps += 1
        self.fetched.zero_()

    def fetch(self, positions: Tensor) -> None:
        """Tokens of the store enter as pushed ones do, but those that are there already.

        `positions` `[B, Hkv, m]` int64, distinct in a ring, `FREE` for none. It is not a step. With m fetched a step a
        ring has turned over after K / (m + 1) steps without a refresh.
        """
        self._make_room(positions.shape[2])
        self.fetched.copy_(self._insert(positions))
        if not self._full:
            self._measure()

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`. `[B']` int64."""
        for name in (
            "keys",
            "values",
            "positions",
            "budget",
            "filled",
            "pushed",
            "steps",
            "newest",
            "fetched",
        ):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self._measure()

    def _insert(self, positions: Tensor) -> Tensor:
        """Copy tokens of the store into the rings; returns how many were not there, `[B, Hkv]`."""
        return self._backend.insert(
            self._store.keys,
            self._store.values,
            positions,
            ring_keys=self.keys,
            ring_values=self.values,
            ring_positions=self.positions,
            filled=self.filled,
            pushed=self.pushed,
            budget=self.budget,
        )

    def _next_slot(self) -> Tensor:
        return (self.filled + self.pushed) % self.budget[:, None]

    def _write(self, slot: Tensor, keys: Tensor, values: Tensor, positions: Tensor | int) -> None:
        """One entry into `slot` `[B, Hkv]` of every ring."""
        rows = torch.arange(slot.shape[0], device=slot.device)[:, None]
        heads = torch.arange(slot.shape[1], device=slot.device)
        self.keys[rows, heads, slot] = keys
        self.values[rows, heads, slot] = values
        if isinstance(positions, int):
            self.positions[rows, heads, slot] = positions
        else:
            self.positions[rows, heads, slot] = positions.expand_as(slot)

    def _make_room(self, entries: int) -> None:
        """Some head will use so many slots more."""
        if not self._full:
            self._most = min(self._most + entries, self._largest)
            self._reserve(self._most)

    def _measure(self) -> None:
        """Look at the device once, so that a step need not."""
        used = self.used
        self._largest = int(self.budget.max())
        self._most = int(used.max())
        self._full = bool((used == self.budget[:, None]).all())
        self._uniform = bool((used == self._most).all()) and bool(
            (self.budget == self.budget[0]).all()
        )

    def _reserve(self, slots: int) -> None:
        """Make room for `slots` slots, at most the largest budget."""
        capacity = self.keys.shape[2]
        if slots <= capacity:
            return
        self._allocate(max(slots, min(self._largest, slots + max(_SPARE, slots // 4))))

    def _allocate(self, slots: int) -> None:
        extra = slots - self.keys.shape[2]
        self.keys = F.pad(self.keys, (0, 0, 0, extra))
        self.values = F.pad(self.values, (0, 0, 0, extra))
        self.positions = F.pad(self.positions, (0, extra), value=FREE)
