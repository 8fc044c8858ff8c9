"""The full KV cache of one layer: every token, and all that is computed over them.

Nothing above a store touches its tensors: a caller writes tokens, and asks for attention, scores, votes or copies.
Where the entries lie is the store's own: side by side in buffers that grow (`DenseStore`), in buffers of fixed size
(`StaticStore`), in pages (`PagedStore`). Letters as in `kernels.options`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels.backend import Backend, backend_for
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import Attended, AttendOptions, Entries, Scored

_SPARE = 256  # tokens of head room whenever a buffer is (re)allocated
GROWTH = 1.25  # so the copies of all re-allocations add up to four per token
# Tokens: an answer of this length fits without re-allocation after any prompt.
_RESERVE_BEYOND = 4096


class Store(ABC):
    """K and V of all tokens.

    A subclass says where they lie. The options of a verb carry what is visible, `[B or 1, Hkv or 1, width]`, and which
    heads are wanted; where each row ends the store adds itself.

    Attributes:
        ends: `[B]` int64, how many tokens each row has; `None`: all have `width`.
    """

    ends: Tensor | None = None
    _held: tuple[Tensor, Tensor] | None = None  # keys and values as they lie, `[.., Hkv, .., D]`

    @property
    @abstractmethod
    def width(self) -> int:
        """Positions that masks and scores are about: no row has more tokens."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """B."""

    @property
    def is_allocated(self) -> bool:
        """Whether anything was ever written since the last `reset`."""
        return self._held is not None

    @abstractmethod
    def entries(self) -> Entries:
        """Where the tokens lie, for a kernel.

        Raises:
            RuntimeError: there are none.
        """

    @abstractmethod
    def write(self, keys: Tensor, values: Tensor, starts: Tensor, end: int | None = None) -> None:
        """Tokens `[B, Hkv, n, D]` of row i go to the positions `starts[i]` and after, `[B]` int64, over what is there.

        Where a row ends does not change. `end`: no row's tokens reach beyond it; `None`: the device is asked.
        """

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, **counts: Any) -> None:
        """Add tokens, `[B, Hkv, n, D]`, at the end of every row.

        `counts`: a static store counts with them what they are a step of; see `reference.write`.
        """

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on; their room is used again.

        Raises:
            ValueError: a negative length.
        """

    @abstractmethod
    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`; repeats and omissions are allowed. `[B']` int64."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self._buffers()[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self._buffers()[0].device

    @property
    def backend(self) -> Backend:
        """The kernels for that device."""
        return backend_for(self.device)

    @property
    def entry_bytes(self) -> int:
        """Bytes of the K and V of one token and one KV head."""
        return sum(buffer.shape[-1] * buffer.element_size() for buffer in self._buffers())

    @property
    def lengths(self) -> Tensor:
        """`[B]` int64, how many tokens each row has."""
        if self.ends is None:
            return torch.full((self.rows,), self.width, device=self.device)
        return self.ends

    def let_rows_differ(self, ends: Tensor) -> None:
        """From here on rows end at `ends` `[B]` int64, which the caller changes; so far the lengths that they have."""
        self.ends = ends

    def level(self, length: int) -> None:
        """Every row has at least `length` tokens, and keeps those."""
        self.ends = None
        self.crop(length)

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Raises `ValueError` for tokens that do not fit each other or what the store holds."""
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must agree in rows, KV heads and tokens"
            )
        if not self.is_allocated:
            return
        for kind, new, held in zip(
            ("keys", "values"), (keys, values), self._buffers(), strict=True
        ):
            for name, theirs, ours in (
                ("rows", new.shape[0], self.rows),
                ("KV heads", new.shape[1], held.shape[1]),
                ("head dim", new.shape[3], held.shape[3]),
                ("dtype", new.dtype, held.dtype),
                ("device", new.device, held.device),
            ):
                if theirs != ours:
                    raise ValueError(
                        f"the cache holds {name} {ours}, the new {kind} have {theirs}; use a new cache"
                    )

    def room_for(self, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, slots, D]` of zeros, of the dtype and on the device of these."""
        shape = (self.rows, self.kv_heads, slots)
        keys, values = (x.new_zeros(*shape, x.shape[-1]) for x in self._buffers())
        return keys, values

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, width, D]`, for attention that is not ours."""
        entries = self.entries()
        assert entries.values is not None
        return entries.keys, entries.values

    def attend(self, query: Tensor, options: AttendOptions) -> Attended:
        """Attention of one query a row, `[B, Hq, D]`."""
        return self.backend.attend(query, self.entries(), self._within(options))

    def score(self, query: Tensor, options: AttendOptions) -> Scored:
        """The attention that each token receives from one query a row, without touching the values."""
        return self.backend.score(query, self.entries(), self._within(options))

    def attend_and_score(
        self, query: Tensor, options: AttendOptions, into: Tensor | None = None
    ) -> tuple[Attended, Scored]:
        """Both, from one pass; see `reference.attend_and_score`."""
        within = self._within(options)
        return self.backend.attend_and_score(query, self.entries(), within, into=into)

    def verify(
        self,
        queries: Tensor,
        options: AttendOptions,
        *,
        starts: Tensor,
        counts: Tensor | None = None,
        window: int | None = None,
        expected: Tensor | None = None,
    ) -> tuple[Attended, Scored]:
        """Attention of several queries a row, `[B, Hq, T, D]`, causal from `starts` on; see `reference.verify`."""
        rows = {"starts": starts, "counts": counts, "window": window, "expected": expected}
        return self.backend.verify(queries, self.entries(), options, **rows)

    def vote(
        self,
        queries: Tensor,
        options: AttendOptions,
        *,
        starts: Tensor,
        counts: Tensor | None = None,
    ) -> Scored:
        """The scores of `verify` without touching the values."""
        return self.backend.vote(queries, self.entries(), options, starts=starts, counts=counts)

    def attend_mixed(
        self,
        query: Tensor,
        codes: Codes,
        options: AttendOptions,
        ends: Tensor | None = None,
        **rules: Any,
    ) -> Attended:
        """Attention of one query a row over codes, and few tokens exactly; see `reference.attend_mixed`.

        `ends` `[B]`: over the first so many positions; `None`: those that a row has.
        """
        within = self._within(options)
        if ends is not None:
            within = options.over(options.visible, lengths=ends[:, None])
        return self.backend.attend_mixed(query, self.entries(), codes, within, **rules)

    def encode(self, codes: Codes, **blocks: Any) -> None:
        """The codes of blocks of these tokens; see `reference.encode`."""
        self.backend.encode(self.entries(), codes, **blocks)

    def attend_at(
        self,
        query: Tensor,
        positions: Tensor,
        options: AttendOptions,
        *,
        newest: Tensor,
        count: int,
    ) -> tuple[Attended, Tensor]:
        """Attention over the tokens at `positions` `[B, Hkv, K]` int32, `FREE` ones left out, and the best of them.

        As `reference.attend_and_rank`; the options are those of the list.
        """
        listed = replace(self.entries(), positions=positions)
        return self.attend_and_rank(query, listed, options, newest=newest, count=count)

    def attend_and_rank(
        self, query: Tensor, entries: Entries, options: AttendOptions, *, newest: Tensor, count: int
    ) -> tuple[Attended, Tensor]:
        """As `reference.attend_and_rank`, over entries of anybody; without scores where `count` is 0."""
        if not count:
            none = newest.new_empty(*newest.shape, 0)
            return self.backend.attend(query, entries, options), none
        return self.backend.attend_and_rank(query, entries, options, newest=newest, count=count)

    def push(self, at: Tensor, **ring: Any) -> None:
        """The newest token enters a ring; see `reference.push`."""
        self.backend.push(self.entries(), at, **ring)

    def fetch(self, best: Tensor, **ring: Any) -> None:
        """What follows the best slots of a ring enters it; see `reference.fetch`."""
        self.backend.fetch(self.entries(), best, **ring)

    def refresh(self, wanted: Tensor, filled: Tensor, **ring: Any) -> None:
        """A selection replaces what a ring holds; see `reference.refresh`."""
        self.backend.refresh(self.entries(), wanted, filled, **ring)

    def _buffers(self) -> tuple[Tensor, Tensor]:
        if self._held is None:
            raise RuntimeError("the store is empty: append before reading")
        return self._held

    def _within(self, options: AttendOptions) -> AttendOptions:
        if self.ends is None:
            return options
        return options.over(options.visible, lengths=self.ends[:, None], heads=options.heads)


class DenseStore(Store):
    """`[B, Hkv, width, D]` views into buffers with spare capacity.

    An append writes in place. When the capacity is used up both buffers are re-allocated a quarter larger, so that the
    copies add up to a constant per token; `reserve` (tokens) avoids them where the final length is known. A host may
    announce its model's whole context, so no more than about twice what is needed is reserved.
    """

    def __init__(self, reserve: int = 0) -> None:
        self.reserve = reserve
        self.length = 0

    @classmethod
    def over(cls, keys: Tensor, values: Tensor, length: int) -> DenseStore:
        """A store in the buffers of another, `[B, Hkv, C, D]`, of which the first `length` positions are filled."""
        store = cls()
        store._held, store.length = (keys, values), length
        return store

    @property
    def width(self) -> int:
        return self.length

    @property
    def rows(self) -> int:
        return self._buffers()[0].shape[0]

    def entries(self) -> Entries:
        return Entries(*(buffer[:, :, : self.length] for buffer in self._buffers()))

    def append(self, keys: Tensor, values: Tensor, **_: Any) -> None:
        end = self.length + keys.shape[2]
        for buffer, new in zip(self._with_room(keys, values, end), (keys, values), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end

    def write(self, keys: Tensor, values: Tensor, starts: Tensor, end: int | None = None) -> None:
        """See `Store.write`. The store is as wide as its longest row; a shorter one ends in zeros, or what it held."""
        end = int(starts.max()) + keys.shape[2] if end is None else end
        buffers = self._with_room(keys, values, end)
        for buffer in buffers:
            # A kernel may multiply a hidden entry by zero, and unused room may hold NaN.
            buffer[:, :, self.length : end] = 0
        self.length = max(self.length, end)
        self.backend.write(self.entries(), keys, values, starts=starts)

    def crop(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"cannot crop to {length} tokens")
        self.length = min(self.length, length)
        if self.ends is not None:
            self.ends = self.ends.clamp(max=length)

    def take_rows(self, rows: Tensor) -> None:
        keys, values = (self._take(buffer, rows) for buffer in self._buffers())
        self._held = keys, values
        if self.ends is not None:
            self.ends = self.ends.index_select(0, rows)

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.length = 0
        self._held = self.ends = None

    def _with_room(self, keys: Tensor, values: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """The buffers, with room for `needed` tokens like these."""
        if self._held is not None and self._held[0].shape[2] >= needed:
            return self._held
        grown = 0 if self._held is None else int(self._held[0].shape[2] * GROWTH)
        capacity = max(needed + _SPARE, grown, min(self.reserve, 2 * needed + _RESERVE_BEYOND))
        new = tuple(x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (keys, values))
        for buffer, old in zip(new, self._held or (), strict=False):
            buffer[:, :, : self.length] = old[:, :, : self.length]
        self._held = new[0], new[1]
        return self._held

    def _take(self, buffer: Tensor, rows: Tensor) -> Tensor:
        new = buffer.new_empty(rows.shape[0], *buffer.shape[1:])
        for target, source in enumerate(rows.tolist()):  # only the used part is copied, once
            new[target, :, : self.length] = buffer[source, :, : self.length]
        return new


def is_identity(rows: Tensor, count: int) -> bool:
    """Whether taking `rows` of `count` rows changes nothing."""
    return rows.shape[0] == count and bool((rows == torch.arange(count, device=rows.device)).all())
