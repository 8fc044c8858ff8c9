"""The cache of one attention layer: full store, partial cache, and the state of the method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from refreshkv.cache.ring import PartialCache
from refreshkv.cache.store import DenseStore, is_identity
from refreshkv.config import RefreshConfig
from refreshkv.kernels import Backend, backend_for
from refreshkv.policy.selection import FREE, Selection
from refreshkv.policy.triggers import trigger_for
from refreshkv.stats import Stats


class LayerCache:
    """Everything RefreshKV keeps for one layer. `step.py` drives it; this class only keeps it consistent.

    Two things can stand in for a missing partial cache. After a prompt, `pending` holds its last queries, from which
    the first decode step selects: chunked prefill and scoring passes pay nothing. After a crop there is neither, and
    the next decode step is full.

    Args:
        config: the settings.
        index: which layer this is, for the statistics and error messages.
        stats: where decode steps are counted.
        reserve: tokens to allocate at once where the final length is known.

    Attributes:
        store: the full cache.
        partial: the partial cache, or `None` when there is no valid one.
        pending: `[B, Hq, T, D]`, the last prompt queries, at most `config.window`, not yet selected from.
        anchors: `[B, Hkv, A]` int64, the best of the selection after the prompt, `FREE` for none; every later one
            keeps them.
        reference: `[B, Hkv, R]`, what the trigger remembers of the last full step.
        budget: `[B]` int64, K of each row; a share is resolved once per prompt.
        hidden: `[B]` int64, padding tokens of each row.
        asks_device: whether a step may look at its flags and skip what no head wants; else the kernels do.
        slots: slots of the partial cache; `None`: as many as the largest budget.
        watch: called after each step that selects, `(cache, query, attention, visible, positions)`: those `[B, Hkv, n]`
            it attended to, `FREE` for none, as in a head that read everything; `None` where all heads did.
    """

    watch: Callable[..., None] | None = None

    asks_device = True
    slots: int | None = None

    def __init__(
        self, config: RefreshConfig, *, index: int = 0, stats: Stats | None = None, reserve: int = 0
    ) -> None:
        self.config = config
        self.index = index
        self.stats = Stats() if stats is None else stats
        self.trigger = trigger_for(config)
        self.store = DenseStore(reserve)
        self.partial: PartialCache | None = None
        self.pending: Tensor | None = None
        self.anchors: Tensor | None = None
        self.reference: Tensor | None = None
        self.budget: Tensor | None = None
        self.hidden: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in the full store, padding included."""
        return self.store.length

    @property
    def lengths(self) -> Tensor | None:
        """`[B or 1, Hkv or 1]`, how much of the store counts; `None`: all that it gives out."""
        return None

    @property
    def ends(self) -> Tensor | None:
        """`[B]`, the same for a selection."""
        return None

    @property
    def rows(self) -> int:
        """Batch size."""
        return self.store.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.store.keys.shape[1]

    @property
    def backend(self) -> Backend:
        """The kernels for the device that the store lives on."""
        return backend_for(self.store.keys.device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """New tokens `[B, Hkv, n, D]` enter the full store; a partial step pushes the newest into the ring itself.

        Raises:
            ValueError: keys and values that do not fit each other or what the cache holds.
        """
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"layer {self.index}: keys {tuple(keys.shape)} and values {tuple(values.shape)} must agree in rows,"
                " KV heads and tokens"
            )
        if self.store.is_allocated:
            for kind, new, held in (
                ("keys", keys, self.store.keys),
                ("values", values, self.store.values),
            ):
                for name, given, expected in (
                    ("rows", new.shape[0], held.shape[0]),
                    ("KV heads", new.shape[1], held.shape[1]),
                    ("head dim", new.shape[3], held.shape[3]),
                    ("dtype", new.dtype, held.dtype),
                    ("device", new.device, held.device),
                ):
                    if given != expected:
                        raise ValueError(
                            f"layer {self.index}: the cache holds {name} {expected}, the new {kind} have {given};"
                            " use a new cache"
                        )
        self.store.append(keys, values)

    def await_selection(self, queries: Tensor) -> None:
        """A prompt, or a chunk of it, ended with `queries` `[B, Hq, T, D]`: the next decode step selects from them."""
        last = queries[:, :, -self.config.window :]
        if self.pending is not None:
            last = torch.cat([self.pending, last], 2)[:, :, -self.config.window :]
        # A view would keep the queries of the whole prompt alive.
        self.pending = last.detach().clone()
        self.partial = None

    def refresh(self, selection: Selection, heads: Tensor | None = None) -> None:
        """Rebuild the partial cache of `heads` (`[B, Hkv]` bool; `None` is all)."""
        if self.partial is None:
            if heads is not None and not bool(heads.all()):
                raise RuntimeError(f"layer {self.index}: the first refresh must serve every head")
            if self.budget is None:
                raise RuntimeError(f"layer {self.index}: resolve_budget before the first refresh")
            self.partial = self._new_partial(self.budget)
            heads = None
        self.partial.refresh(selection, heads)

    def remember(self, reference: Tensor, heads: Tensor | None) -> None:
        """The reference of `heads` (`[B, Hkv]` bool; `None` is all) becomes `[B, Hkv, R]`."""
        if heads is not None and self.reference is not None:
            reference = torch.where(heads[..., None], reference, self.reference)
        self.reference = reference

    def push_newest(self) -> None:
        """The token appended last enters the partial cache."""
        assert self.partial is not None
        self.partial.push(self.store.keys[:, :, -1], self.store.values[:, :, -1], self.length - 1)

    def resolve_budget(self, visible: Tensor | None, tokens: int) -> None:
        """Turn the budget into tokens for a prompt of `tokens` tokens of which `visible` `[B, tokens]` count.

        A partial cache of the old budget is dropped.
        """
        hidden = self.count_padding(visible).tolist()
        shares = [self.config.resolve_budget(tokens - padding) for padding in hidden]
        self.budget = torch.tensor(shares, dtype=torch.int64, device=self.store.keys.device)
        self.partial = None

    def count_padding(self, visible: Tensor | None) -> Tensor:
        """Set and return `hidden`, from the visible tokens `[B, L]`."""
        if visible is None:
            self.hidden = torch.zeros(self.rows, dtype=torch.int64, device=self.store.keys.device)
        else:
            self.hidden = (~visible).sum(-1)
        return self.hidden

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. The partial cache may hold some of them, so the next step is full."""
        if length >= self.length:
            return
        self.store.crop(length)
        self.forget_selection()
        if self.anchors is not None:
            self.anchors = self.anchors.masked_fill(self.anchors >= length, FREE)
        self.hidden = None  # padding may be among what is gone

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
        if self.partial is not None:
            self.partial.take_rows(rows)
        for name in ("pending", "anchors", "reference", "budget", "hidden"):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, state.index_select(0, rows))

    def reset(self) -> None:
        """Back to empty; the statistics stay."""
        self.store.reset()
        self.forget_selection()
        self.anchors = self.budget = self.hidden = None

    def _new_partial(self, budget: Tensor) -> PartialCache:
        return PartialCache(self.store, budget, self.backend)

    def forget_selection(self) -> None:
        """The next decode step is full, unless a prompt comes first."""
        self.partial = self.pending = self.reference = None
