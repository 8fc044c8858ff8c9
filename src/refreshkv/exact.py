"""The lossless mode of one layer: partial steps draft, one full pass over the drafted tokens verifies them (ours).

A cycle is some calls of `draft`, one of `verify`, one of `commit`. Drafted tokens enter the partial cache only; the
full pass computes their keys and values again, exactly, and writes those to the full store. It reads the store once for
all its queries, and the mean of their scores makes the next selection, whichever of the drafts were right. Rows keep
different numbers of tokens, so each has its own end.

Letters: B batch, Hq query heads, Hkv KV heads, T tokens, L places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.step import Attention, attend_partial, first_selection, over_heads, reselect


class ExactLayer:
    """A layer whose rows end at `ends`; what its store holds after them is left over from refused drafts.

    Args:
        cache: the layer after a prompt that is the same number of places in every row.
        visible: `[B, L]` bool, False for padding; `None` when there is none. Later tokens are visible.

    Attributes:
        ends: `[B]` int64, places of each row in the full store.
    """

    def __init__(self, cache: LayerCache, visible: Tensor | None) -> None:
        self.cache = cache
        self.visible = visible
        device = cache.store.keys.device
        self.ends = torch.zeros(cache.rows, dtype=torch.int64, device=device) + cache.length
        # [B, Hkv, L], of the last full pass, not yet selected from
        self.votes: Tensor | None = None
        self.drafted = torch.zeros((), dtype=torch.int64, device=device)  # tokens, in this cycle
        # [steps, B], entries that each of these drafts read
        self.read = self.ends.new_zeros(cache.config.draft, cache.rows)
        self.verified = torch.zeros_like(self.ends)  # queries of each row in the last full pass

    def draft(self, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        """A partial step; the token goes no further than the partial cache.

        `query` `[B, Hq, D]`, `key` and `value` `[B, Hkv, D]`; returns `[B, Hq, D]`.
        """
        self._select(attention)
        partial = self.cache.partial
        assert partial is not None
        partial.push(key, value, (self.ends + self.drafted)[:, None])
        used = partial.used
        output = attend_partial(self.cache, query, attention, self.ends[:, None, None]).output
        read = (used + partial.fetched).sum(-1)
        self.read.index_copy_(0, self.drafted.view(1), read[None])
        self.drafted += 1
        return output

    def verify(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        counts: Tensor,
        attention: Attention,
    ) -> Tensor:
        """The full pass over the token before the drafts and the drafts.

        Args:
            queries: `[B, Hq, T, D]`; keys, values: `[B, Hkv, T, D]`.
            counts: `[B]` int64, how many of a row's tokens are real; 0 for a row that sits out.

        Returns:
            `[B, Hq, T, D]`.
        """
        cache = self.cache
        if cache.pending is not None:
            # Nothing was drafted: the prompt selects nothing, but K is that of its length.
            cache.resolve_budget(self.visible, int(self.ends.max()))
            cache.pending = cache.anchors = None
        cache.store.write(keys, values, self.ends)
        (output, _), scored = cache.backend.verify(
            queries,
            cache.store.keys,
            cache.store.values,
            starts=self.ends,
            counts=counts,
            **attention.options(over_heads(self._seen())),
            reduction=cache.config.group_reduction,
        )
        self._voted(scored.scores, counts)
        return output

    def commit(self, kept: Tensor) -> None:
        """The first `kept` `[B]` tokens of the full pass stay, and as many that it gave are part of the text."""
        cache = self.cache
        assert cache.hidden is not None
        heads, before = cache.kv_heads, self.ends - cache.hidden
        # What the drafts of others made a row read is not its own.
        steps = torch.arange(len(self.read), device=kept.device)[:, None]
        read = (before + self.verified) * heads
        read = read + self.read.masked_fill(steps + 1 >= self.verified, 0).sum(0)
        # Full attention would have read one entry more with each token.
        available = (kept * before + kept * (kept + 1) // 2) * heads
        cache.stats.record(
            cache.index,
            kv_heads=heads,
            entry_bytes=cache.store.entry_bytes,
            full=(self.verified > 0) * heads,
            steps=kept * heads,
            read=torch.where(self.verified > 0, read, 0),
            available=available,
        )
        self.ends += kept
        self.drafted.zero_()
        self.read.zero_()

    def take_back(self, ends: Tensor) -> None:
        """Rows that are longer than `ends` `[B]` forget what they have beyond."""
        self.ends.copy_(torch.minimum(self.ends, ends))

    def close(self, length: int) -> None:
        """Every row has at least `length` places, and the layer goes on with those."""
        self.cache.crop(length)
        self.cache.forget_selection()

    def _voted(self, votes: Tensor, counts: Tensor) -> None:
        """What the full pass leaves for the next selection and for the statistics."""
        self.votes, self.verified = votes, counts

    def _select(self, attention: Attention) -> None:
        """The partial cache of this cycle, where it does not exist yet."""
        cache = self.cache
        if cache.pending is not None:
            first_selection(cache, cache.pending, attention, self.visible, cache.length)
        elif self.votes is not None:
            reselect(cache, self.votes, self._seen(), ends=self.ends)
        self.votes = None

    def _seen(self) -> Tensor | None:
        """`visible` for all places of the store."""
        if self.visible is None:
            return None
        return F.pad(self.visible, (0, self.cache.length - self.visible.shape[1]), value=True)


class ExactWindowLayer(ExactLayer):
    """A sliding-window layer in the lossless mode: it attends to its window in drafts too, and selects nothing.

    Its tokens are kept all, because the window of a row that refuses a draft moves back. Drafts go to the store and are
    overwritten by the full pass.
    """

    def __init__(self, cache: LayerCache, visible: Tensor | None, window: int) -> None:
        super().__init__(cache, visible)
        self.window = window

    def draft(self, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        place = self.ends + self.drafted
        self.drafted += 1
        return self._attend(
            query[:, :, None], key[:, :, None], value[:, :, None], place, attention
        )[:, :, 0]

    def verify(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        counts: Tensor,
        attention: Attention,
    ) -> Tensor:
        return self._attend(queries, keys, values, self.ends, attention)

    def commit(self, kept: Tensor) -> None:
        self.ends += kept
        self.drafted.zero_()

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, attention: Attention
    ) -> Tensor:
        cache = self.cache
        cache.store.write(keys, values, starts)
        seen = self._seen()
        # Nothing before the first row's window is looked at.
        first = max(0, int(starts.min()) - self.window + 1)
        (output, _), _ = cache.backend.verify(
            queries,
            cache.store.keys[:, :, first:],
            cache.store.values[:, :, first:],
            starts=starts - first,
            window=self.window,
            **attention.options(None if seen is None else over_heads(seen[:, first:])),
        )
        return output
