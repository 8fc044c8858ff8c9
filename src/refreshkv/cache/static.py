"""The static form of a layer's cache: every tensor is allocated before decoding and written in place.

`step.decode_step` over it decides nothing in Python and makes no tensor that outlives the step, so that it can be
compiled and captured in a CUDA graph which serves every later step: lengths, slot counters and the flags "full or
partial" are data. What happens between prompts, the first selection above all, may look at the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.ring import PartialCache
from refreshkv.cache.store import DenseStore
from refreshkv.config import RefreshConfig
from refreshkv.kernels.backend import Backend
from refreshkv.kernels.operators import OPERATORS
from refreshkv.policy.selection import FREE
from refreshkv.stats import Stats
from refreshkv.step import Attention, first_selection


class StaticStore(DenseStore):
    """K and V of all tokens in buffers of fixed size, which `keys` and `values` give out whole.

    Args:
        keys, values: `[B, Hkv, C, D]`, finite where there is no token yet.
        length: int64 scalar on their device, the tokens that count.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self.length = length  # type: ignore[assignment]

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, C, D]`, after RoPE."""
        return self._buffer(self._keys)

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, C, D]`."""
        return self._buffer(self._values)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.length.zero_()

    def write(self, keys: Tensor, values: Tensor, starts: Tensor) -> None:
        """See `DenseStore.write`. There must be room; what lies beyond a row is finite already."""
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        places = starts[:, None] + torch.arange(keys.shape[2], device=keys.device)
        self.keys[rows, :, places] = keys.transpose(1, 2)
        self.values[rows, :, places] = values.transpose(1, 2)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """See `DenseStore.append`. There must be room."""
        places = self.length + torch.arange(keys.shape[2], device=keys.device)
        self.keys.index_copy_(2, places, keys)
        self.values.index_copy_(2, places, values)
        self.length.add_(keys.shape[2])


class StaticPartialCache(PartialCache):
    """A ring of `slots` slots for every head, whatever the budget of its row."""

    def __init__(self, store: DenseStore, budget: Tensor, backend: Backend, slots: int) -> None:
        super().__init__(store, budget, backend)
        self._allocate(slots)
        self._full = True  # there is room for every push, and nothing to measure

    def entries(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `PartialCache.entries`; all slots, of which the first `used` count."""
        return self.keys, self.values, self.used

    def push_stored(self, position: Tensor) -> None:
        """As `push`, for the token at `position` (int64 scalar) of the store."""
        self.newest.copy_(self._next_slot())
        self._insert(position.expand(*self.newest.shape, 1))
        self.steps += 1
        self.fetched.zero_()

    def _reserve(self, slots: int) -> None:
        pass

    def _measure(self) -> None:
        pass


class StaticLayerCache(LayerCache):
    """A `LayerCache` of fixed size.

    Args:
        keys, values, length: as for `StaticStore`.
        config, index, stats: as for `LayerCache`.
    """

    asks_device = False

    def __init__(
        self,
        config: RefreshConfig,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        *,
        index: int = 0,
        stats: Stats | None = None,
    ) -> None:
        super().__init__(config, index=index, stats=stats)
        self.store = StaticStore(keys, values, length)
        self.slots = config.resolve_budget(keys.shape[2])
        self._ring = StaticPartialCache(
            self.store,
            torch.full((self.rows,), self.slots, device=keys.device),
            self.backend,
            self.slots,
        )
        self._kept: dict[str, Tensor] = {}
        self.stats.count_on(index, keys.device)

    @property
    def backend(self) -> Backend:
        """The kernels as operators."""
        return OPERATORS

    @property
    def lengths(self) -> Tensor:
        """`[1, 1]`."""
        return self.store.length.view(1, 1)

    @property
    def ends(self) -> Tensor:
        """`[B]`."""
        return self.store.length.expand(self.rows)

    def begin_decoding(self, attention: Attention, visible: Tensor | None, prompt: int) -> None:
        """After a prompt of `prompt` tokens: select, and put what decoding reads and writes where it stays.

        `visible` `[B, prompt]` bool; `None` when everything is.
        """
        if self.config.mode == "refresh":
            assert self.pending is not None
            first_selection(self, self.pending, attention, visible, prompt)
        else:
            self.resolve_budget(visible, prompt)
            self.pending = None
        self.settle()

    def settle(self) -> None:
        """What a first selection left moves to where decoding reads and writes it."""
        if self.anchors is not None:
            most = round(self.slots * self.config.anchor)
            self.anchors = F.pad(self.anchors, (0, most - self.anchors.shape[2]), value=FREE)
        for name in ("anchors", "reference", "budget", "hidden"):
            state = getattr(self, name)
            if state is None:
                continue
            if name not in self._kept:
                self._kept[name] = state.clone()
            setattr(self, name, self._kept[name].copy_(state))

    def state(self) -> list[Tensor]:
        """All that a decode step reads and writes, row by row; beside them only `length` and counts."""
        ring = [part for part in vars(self._ring).values() if isinstance(part, Tensor)]
        return [self.store.keys, self.store.values, *ring, *self._kept.values()]

    def push_newest(self) -> None:
        """See `LayerCache.push_newest`."""
        self._ring.push_stored(self.store.length - 1)

    def remember(self, reference: Tensor, heads: Tensor | None) -> None:
        """See `LayerCache.remember`."""
        if heads is None or self.reference is None:
            self.reference = reference
        else:
            self.reference.copy_(torch.where(heads[..., None], reference, self.reference))

    def crop(self, length: int) -> None:
        """Raises: what was selected could not be told from what is gone."""
        raise NotImplementedError("the static form of RefreshKV's cache cannot be cropped")

    def take_rows(self, rows: Tensor) -> None:
        """See `LayerCache.take_rows`; as many rows as before."""
        for state in self.state():
            state.copy_(state.index_select(0, rows))

    def _new_partial(self, budget: Tensor) -> PartialCache:
        self._ring.budget.copy_(budget)
        return self._ring
