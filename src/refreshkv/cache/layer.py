"""The cache of one attention layer: full store, partial cache, and the state of the method, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.ring import RINGS, Ring
from refreshkv.cache.rounded import RoundedCopy
from refreshkv.cache.static import StaticStore
from refreshkv.cache.store import DenseStore, Store, is_identity
from refreshkv.config import RefreshConfig
from refreshkv.policy.selection import FREE, Selected, recent_share
from refreshkv.policy.triggers import Kind, trigger_for
from refreshkv.stats import COUNTS, Stats


class LayerCache:
    """Everything RefreshKV keeps for one layer. `step.py` drives it; this class only keeps it consistent.

    Rows are independent of each other. After a prompt a row waits with the last queries of it, from which the first
    decode step selects: chunked prefill and scoring passes pay nothing. A row whose selection is void, after a crop for
    example, does a full step next.

    Args:
        config: the settings.
        index: which layer this is, for the statistics and error messages.
        stats: where decode steps are counted.
        store: the full cache; `None`: one that grows.
        fixed: decoding makes no tensor that outlives a step, moves none, and looks at nothing on the device, so that a
            step can be compiled and captured in a CUDA graph which serves all that follow. The store is allocated then.

    Attributes:
        ring: the partial cache; `None` before the first selection.
        copy: the rounded copy, where the settings want one; `None` before the first step.
        queries: `[B, Hq, T, D]`, the last ones of each prompt, at most `config.window`.
        waiting: `[B]` bool, rows that have not selected from them yet; `None`: no row.
        prompt: `[B]` int64, where their prompts end.
        anchors: `[B, Hkv, A]` int32, the best of the selection after the prompt, `FREE` for none; every later one
            keeps them.
        reference: `[B, Hkv, R]`, what the trigger remembers of the last full step.
        budget: `[B]` int64, K of each row; a share is resolved once per prompt.
        recent: `[B]` int64, how many of the newest tokens a selection keeps.
        hidden: `[B]` int64, padding tokens of each row; `None`: to be counted, by the next step.
        due: of the fixed form, what the next steps are where the host knows it, as `Trigger.kind` says: "partial" and
            "full" ones decide nothing on the device; `None`: every step decides.
        tally: `[B, Hkv, 5]` int64, what the steps of the fixed form counted since somebody looked, as `stats.COUNTS`.
        watch: called after each step that selects, `(cache, query, options, visible, positions)`: those `[B, Hkv, n]`
            it attended to, `FREE` for none, as in a head that read everything; `None` where all heads did.
    """

    watch: Callable[..., None] | None = None
    due: Kind | None = None

    # What has a row for each of the batch, beside the store and the ring.
    ROWS = ("queries", "waiting", "prompt", "anchors", "reference", "budget", "recent", "hidden")

    def __init__(
        self,
        config: RefreshConfig,
        *,
        index: int = 0,
        stats: Stats | None = None,
        store: Store | None = None,
        fixed: bool = False,
    ) -> None:
        self.config = config
        self.index = index
        self.stats = Stats() if stats is None else stats
        self.trigger = trigger_for(config)
        self.store = DenseStore() if store is None else store
        self.fixed = fixed
        self.ring: Ring | None = None
        self.copy: RoundedCopy | None = None
        self.queries: Tensor | None = None
        self.waiting: Tensor | None = None
        self.prompt: Tensor | None = None
        self.anchors: Tensor | None = None
        self.reference: Tensor | None = None
        self.budget: Tensor | None = None
        self.recent: Tensor | None = None
        self.hidden: Tensor | None = None
        self.tally: Tensor | None = None
        self.slots: int | None = None  # of the ring; `None`: as many as the largest budget
        if fixed:
            self.slots = config.resolve_budget(self.store.width)
            self._allow(torch.full((self.rows,), self.slots, device=self.store.device))
            shape = (self.rows, self.kv_heads, len(COUNTS))
            self.tally = torch.zeros(shape, dtype=torch.int64, device=self.store.device)
            self.stats.follow(index, self.tally, self.kv_heads, self.store.entry_bytes, self)
            if config.rounds:
                self.copy = self._new_copy()

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.store.rows

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.store.kv_heads

    @property
    def length(self) -> int:
        """Tokens in the full store, padding included; of the fixed form, how many it has room for."""
        return self.store.width

    def append(self, keys: Tensor, values: Tensor, *, decodes: bool = False) -> None:
        """New tokens `[B, Hkv, n, D]` enter the full store; a partial step pushes the newest into the ring itself.

        `decodes`: they are the token of a decode step, which the fixed form counts with it.

        Raises:
            ValueError: keys and values that do not fit each other or what the cache holds.
        """
        try:
            self.store.check(keys, values)
        except ValueError as error:
            raise ValueError(f"layer {self.index}: {error}") from None
        if not decodes or self.tally is None:
            self.store.append(keys, values)
            return
        # Other modes read as they go.
        full = self.config.mode not in ("refresh", "mixed")
        self.store.append(keys, values, tally=self.tally, hidden=self.hidden, full=full)

    def count(self, **counts: Any) -> None:
        """Record a decode step, as `Stats.record`; of the fixed form, what `append` has not counted yet.

        Each count is a sum over KV heads, `[B]`, or a number for all rows. A tally has it at the first KV head.
        """
        if self.tally is None:
            self.stats.record(
                self.index,
                kv_heads=self.kv_heads,
                entry_bytes=self.store.entry_bytes,
                **counts,
            )
            return
        for place, name in enumerate(COUNTS):
            if name in counts and name not in ("steps", "available"):
                count = counts[name]
                into = self.tally[:, 0, place]
                (into if isinstance(count, Tensor) else into[:1]).add_(count)

    def await_selection(self, queries: Tensor, rows: Tensor | None = None) -> None:
        """A prompt, or a chunk of it, ended with `queries` `[B, Hq, T, D]`: the next decode step selects from them.

        `rows` `[B]` bool: those that had a prompt; `None`: all. The others go on as they are; T is that of those which
        wait already.
        """
        last = queries[:, :, -self.config.window :]
        every = torch.ones(self.rows, dtype=torch.bool, device=queries.device)
        if rows is None:
            if self.waiting is not None and self.queries is not None:
                last = torch.cat([self.queries, last], 2)[:, :, -self.config.window :]
            # A view would keep the queries of the whole prompt alive.
            self.queries, self.waiting = last.detach().clone(), every
            self.prompt = self.store.lengths.clone()
            return
        if self.queries is None or self.prompt is None:
            self.queries, self.prompt = torch.zeros_like(last), torch.zeros_like(self.store.lengths)
        self.queries = torch.where(rows[:, None, None, None], last, self.queries)
        self.prompt = torch.where(rows, self.store.lengths, self.prompt)
        self.waiting = rows if self.waiting is None else rows | self.waiting

    def go_on_from(self, other: LayerCache, length: int) -> None:
        """Share the store of a cache with the same prompt, cut to `length` tokens, and wait with its last queries.

        What `other` decodes from here on is lost, and so is what an earlier cache did that shares it too.
        """
        other.store.level(length)
        self.store = other.store
        wanted = self.config.window - 1  # and those of the token that follows
        if wanted and other.queries is not None:
            self.queries = other.queries[:, :, -wanted:].clone()
            self.prompt = self.store.lengths.clone()
            self.wait_again()

    def wait_again(self) -> None:
        """Every row selects from the last queries of its prompt (once more)."""
        if self.queries is not None and self.prompt is not None:
            self.waiting = torch.ones(self.rows, dtype=torch.bool, device=self.queries.device)

    def resolve_budget(
        self, visible: Tensor | None, tokens: Tensor, rows: Tensor | None = None
    ) -> None:
        """Turn the budget into tokens: a share is one of the visible among the first `tokens` `[B]`, as later ones are.

        `visible` `[B, width]` bool; `None` when everything is. `rows` `[B]` bool: the others keep theirs; `None`: all.
        """
        hidden = self.count_padding(visible)
        shares = [self.config.resolve_budget(count) for count in (tokens - hidden).tolist()]
        budget = torch.tensor(shares, dtype=torch.int64, device=self.store.device)
        if rows is not None and self.budget is not None:
            budget = torch.where(rows, budget, self.budget)
        self._allow(budget)

    def count_padding(self, visible: Tensor | None) -> Tensor:
        """Set and return `hidden`, from the visible tokens `[B, width]`; the rounded copy learns where rows begin."""
        if visible is None:
            hidden = torch.zeros(self.rows, dtype=torch.int64, device=self.store.device)
        else:
            inside = torch.arange(self.store.width, device=visible.device)
            hidden = (~visible & (inside < self.store.lengths[:, None])).sum(-1)
        self._keep("hidden", hidden)
        if self.config.rounds:
            self.copy = self.copy or self._new_copy()
            # Before the first visible token there is nothing but padding.
            no_padding = torch.zeros_like(hidden)
            first = no_padding if visible is None else visible.int().argmax(-1)
            self.copy.begin_at(self.store, first)
        return hidden

    def refresh(
        self,
        selection: Selected,
        heads: Tensor | None = None,
        summary: Tensor | None = None,
        *,
        counted: bool = False,
    ) -> None:
        """Rebuild the partial cache of `heads` (`[B, Hkv]` bool; `None` is all).

        Args:
            selection: what they hold from here on.
            heads: the others stay as they are.
            summary: `[B, Hkv, R]`, the new reference of these heads; `None`: they keep theirs.
            counted: it is a full step of these heads, which the fixed form counts here.
        """
        if self.ring is None:
            if self.budget is None:
                raise RuntimeError(f"layer {self.index}: resolve_budget before the first refresh")
            self.ring = RINGS[self.config.ring](self.store, self.budget, self.slots)
        more: dict[str, Tensor | None] = {}
        if summary is not None:
            if self.reference is None:
                self.reference = summary.new_zeros(summary.shape)
            if summary.shape[2]:
                more |= {"reference": self.reference, "summary": summary}
        if counted and self.tally is not None:
            more |= {"ends": self.store.ends, "hidden": self.hidden, "tally": self.tally}
        self.ring.refresh(selection, heads, **more)

    def anchor(self, anchors: Tensor, rows: Tensor) -> None:
        """`[B, Hkv, A]` stay in every selection of `rows` `[B]` bool until their next prompt."""
        if self.anchors is not None:
            width = max(anchors.shape[2], self.anchors.shape[2])
            old, anchors = (
                F.pad(x, (0, width - x.shape[2]), value=FREE) for x in (self.anchors, anchors)
            )
            anchors = torch.where(rows[:, None, None], anchors, old)
        self._keep("anchors", anchors)

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. The partial cache may hold some of them, so the next step is full."""
        if length >= self.length:
            return
        self.store.crop(length)
        self.forget_selection()
        if self.copy is not None:
            self.copy.crop(length)
        if self.anchors is not None:
            self.anchors = self.anchors.masked_fill(self.anchors >= length, FREE)
        self.hidden = None  # padding may be among what is gone

    def forget_selection(self) -> None:
        """The next decode step is full, unless a prompt comes first."""
        self.waiting = self.prompt = None
        if self.ring is not None:
            self.ring.void()

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the old row `rows[i]`: beams, several return sequences, finished rows. `[B']` int64.

        Raises:
            ValueError: no rows, or a row that is not there; nothing has changed then.
        """
        if not self.store.is_allocated or is_identity(rows, self.rows):
            return
        if rows.numel() == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < self.rows:
            raise ValueError(f"layer {self.index}: cannot take rows {rows.tolist()} of {self.rows}")
        self.store.take_rows(rows)
        for name in self.ROWS:
            state = getattr(self, name)
            if state is not None:
                self._keep(name, state.index_select(0, rows))
        if self.copy is not None:
            self.copy.take_rows(rows)
        if self.ring is not None:
            self.ring.take_rows(rows)
            assert self.budget is not None
            self.ring.allow(self.budget)

    def reset(self) -> None:
        """Back to empty; the statistics stay, and in the fixed form the memory."""
        self.store.reset()
        self.forget_selection()
        if self.copy is not None:
            self.copy.reset()
        if not self.fixed:
            self.ring = self.queries = None
            self.anchors = self.reference = self.budget = self.recent = self.hidden = None

    def grow(self, width: int) -> None:
        """Room for `width` tokens a row in a cache of the fixed form; what is kept stays, elsewhere in memory."""
        assert isinstance(self.store, StaticStore)
        self.store.grow(width)
        if self.copy is not None:
            self.copy.grow(self.store)
        # A later prompt may be longer than this cache was.
        self.slots = max(self.slots or 0, self.config.resolve_budget(width))
        if self.ring is not None:
            self.ring.hold(self.slots)

    def tensors(self) -> list[Tensor]:
        """All that a decode step reads and writes, beside the store."""
        state = [self.anchors, self.reference, self.budget, self.recent, self.hidden, self.tally]
        ring = [] if self.ring is None else self.ring.tensors()
        copy = [] if self.copy is None else self.copy.tensors()
        return ring + copy + [tensor for tensor in state if tensor is not None]

    def _allow(self, budget: Tensor) -> None:
        """K of each row, `[B]` int64, and what follows from it."""
        self._keep("budget", budget)
        recent = recent_share(budget, self.config.recent)
        self._keep("recent", recent if isinstance(recent, Tensor) else torch.zeros_like(budget))
        if self.ring is not None:
            assert self.budget is not None
            self.ring.allow(self.budget)

    def _new_copy(self) -> RoundedCopy:
        bits = self.config.key_bits, self.config.value_bits
        return RoundedCopy(*bits, self.store, fixed=self.fixed)

    def _keep(self, name: str, new: Tensor) -> None:
        """State of a fixed form stays where it is."""
        old = getattr(self, name)
        if self.fixed and old is not None and old.shape == new.shape:
            old.copy_(new)
        else:
            setattr(
                self, name, new.clone(memory_format=torch.contiguous_format) if self.fixed else new
            )
