"""The exact mode of one layer: cheap steps draft, one full pass over the drafted tokens verifies them (ours).

A cycle is one call of `select`, some of `draft`, one of `verify`, one of `commit`. Drafted tokens are written behind
the end of their row, where the full pass writes what it computes again, exactly; they stand only once they are
committed. The pass reads the store once for all its queries. Rows keep different numbers of tokens, so each has its own
end. Drafts are partial steps, whose next selection the mean of the pass's scores makes, whichever of them were right;
or mixed ones, which select nothing.

Letters: B batch, Hq query heads, Hkv KV heads, T tokens, L positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.kernels.options import AttendOptions, over_heads
from refreshkv.mixed import attend_to_copy, learn_prompt
from refreshkv.step import reselect, select_after_prompt


class ExactLayer:
    """A layer whose rows end at `ends`; what its store holds after them is left over from refused drafts.

    Over a cache of the fixed form `draft` and `verify` can be compiled, each one graph for all cycles; `select` and
    `commit` look at the device.

    Args:
        cache: the layer after a prompt that is the same number of tokens in every row.
        options: of the model.
        visible: `[B, L]` bool, False for padding; `None` when there is none. Later tokens are visible.
    """

    def __init__(self, cache: LayerCache, options: AttendOptions, visible: Tensor | None) -> None:
        self.cache = cache
        self.options = options.over(reduction=cache.config.group_reduction)
        self.visible = visible
        cache.store.let_rows_differ()
        cache.wait_again()
        device = cache.store.device
        # [B, Hkv, L], of the last full pass; `fresh`: not yet selected from
        self.votes: Tensor | None = None
        self.fresh = False
        self.drafted = torch.zeros((), dtype=torch.int64, device=device)  # tokens, in this cycle
        self._end: int | None = None  # of the longest row, drafts included, where it is known
        # [steps, B], entries that each of these drafts read
        self.read = self.ends.new_zeros(cache.config.draft, cache.rows)
        self.codes = torch.zeros_like(self.read)  # the same, bytes of codes
        self.verified = torch.zeros_like(self.ends)  # queries of each row in the last full pass
        if cache.fixed:
            self.visible = self._seen()
            self.votes = torch.zeros(cache.rows, cache.kv_heads, cache.store.width, device=device)
            self.select()

    @property
    def ends(self) -> Tensor:
        """`[B]` int64, where each row ends."""
        ends = self.cache.store.ends
        assert ends is not None
        return ends

    def select(self) -> None:
        """The partial cache of the cycle that begins."""
        if self.cache.waiting is not None:
            select_after_prompt(self.cache, self.options, self._seen())
        elif self.fresh:
            assert self.votes is not None
            reselect(self.cache, self.votes, self._seen())
        self.fresh = False

    def draft(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A partial step over the token `[B, Hkv, D]`; `query` `[B, Hq, D]`; returns `[B, Hq, D]`."""
        cache, ring = self.cache, self.cache.ring
        assert ring is not None
        positions = self.ends + self.drafted
        cache.store.write(key[:, :, None], value[:, :, None], positions, self._end_of_draft())
        ring.push(positions)
        used = ring.used
        successor = cache.config.successor
        output = ring.attend(query, self.options, successor=successor, end=self.ends).output
        read = (used + ring.fetched).sum(-1)
        self.read.index_copy_(0, self.drafted.view(1), read[None])
        self.drafted += 1
        return output

    def verify(self, queries: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
        """The full pass over the token before the drafts and the drafts.

        Args:
            queries: `[B, Hq, T, D]`; keys, values: `[B, Hkv, T, D]`.
            counts: `[B]` int64, how many of a row's tokens are real; 0 for a row that sits out.

        Returns:
            `[B, Hq, T, D]`.
        """
        cache = self.cache
        if cache.waiting is not None:
            # Nothing was drafted: the prompt selects nothing, but K is that of its length.
            assert cache.prompt is not None
            cache.resolve_budget(self._seen(), cache.prompt)
            cache.waiting = cache.anchors = None
        cache.store.write(keys, values, self.ends)
        (output, _), scored = cache.store.verify(
            queries,
            self.options.over(over_heads(self._seen())),
            starts=self.ends,
            counts=counts,
        )
        if cache.fixed:
            assert self.votes is not None
            self.votes.copy_(scored.scores)
        else:
            self.votes = scored.scores
        self.verified.copy_(counts)
        return output

    def commit(self, kept: Tensor) -> None:
        """The first `kept` `[B]` tokens of the full pass stay, and as many that it gave are part of the text."""
        cache = self.cache
        assert cache.hidden is not None
        heads, before = cache.kv_heads, self.ends - cache.hidden
        # What the drafts of others made a row read is not its own.
        steps = torch.arange(len(self.read), device=kept.device)[:, None]
        of_others = steps + 1 >= self.verified
        read = (before + self.verified) * heads + self.read.masked_fill(of_others, 0).sum(0)
        # Full attention would have read one entry more with each token.
        available = (kept * before + kept * (kept + 1) // 2) * heads
        cache.stats.record(
            cache.index,
            kv_heads=heads,
            entry_bytes=cache.store.entry_bytes,
            full=(self.verified > 0) * heads,
            steps=kept * heads,
            read=torch.where(self.verified > 0, read, 0),
            rounded=self.codes.masked_fill(of_others, 0).sum(0),
            available=available,
        )
        self._advance(kept)
        self.read.zero_()
        self.codes.zero_()
        self.fresh = True

    def take_back(self, ends: Tensor) -> None:
        """Rows that are longer than `ends` `[B]` forget what they have beyond."""
        self.ends.copy_(torch.minimum(self.ends, ends))
        if self.cache.copy is not None:
            self.cache.copy.crop(ends)

    def close(self, length: int) -> None:
        """Every row has at least `length` tokens, and the layer goes on with those."""
        self.cache.store.level(length)
        self.cache.forget_selection()
        if self.cache.copy is not None:
            self.cache.copy.crop(length)

    def tensors(self) -> list[Tensor]:
        """All that a pass reads and writes, beside the cache."""
        return [self.ends, *(part for part in vars(self).values() if isinstance(part, Tensor))]

    def _advance(self, kept: Tensor) -> None:
        self.ends.add_(kept)
        self.drafted.zero_()
        self._end = None

    def _end_of_draft(self) -> int | None:
        """Where this draft ends in the longest row: asked of the device once a cycle, and by no graph."""
        if self.cache.fixed:
            return None
        if self._end is None:
            self._end = int(self.ends.max())
        self._end += 1
        return self._end

    def _seen(self) -> Tensor | None:
        """`visible` for all positions of the store."""
        if self.visible is None:
            return None
        return F.pad(self.visible, (0, self.cache.length - self.visible.shape[1]), value=True)


class ExactMixedLayer(ExactLayer):
    """A layer whose drafts are mixed steps: by the codes of what is sure, and exactly where the weight is."""

    def select(self) -> None:
        """The codes of the blocks that the last cycle has completed."""
        cache = self.cache
        learn_prompt(cache, self._seen())
        assert cache.copy is not None
        cache.copy.follow(cache.store, self.ends, self._seen())

    def draft(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache, positions = self.cache, self.ends + self.drafted
        cache.store.write(key[:, :, None], value[:, :, None], positions, self._end_of_draft())
        tally = positions.new_zeros(cache.rows, cache.kv_heads, 2)
        seen, ends = self._seen(), positions + 1
        output = attend_to_copy(cache, query, self.options, seen, tally, ends)
        for amounts, amount in zip((self.read, self.codes), tally.sum(1).unbind(-1), strict=True):
            amounts.index_copy_(0, self.drafted.view(1), amount[None])
        self.drafted += 1
        return output


class ExactWindowLayer(ExactLayer):
    """A sliding-window layer in the exact mode: it attends to its window in drafts too, and selects nothing.

    Its tokens are kept all, because the window of a row that refuses a draft moves back. Drafts go to the store and are
    overwritten by the full pass.
    """

    def __init__(
        self, cache: LayerCache, options: AttendOptions, visible: Tensor | None, window: int
    ) -> None:
        super().__init__(cache, options, visible)
        self.window = window

    def select(self) -> None:
        pass

    def draft(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        position = self.ends + self.drafted
        self.drafted += 1
        query, key, value = (x[:, :, None] for x in (query, key, value))
        return self._attend(query, key, value, position, self._end_of_draft())[:, :, 0]

    def verify(self, queries: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
        return self._attend(queries, keys, values, self.ends)

    def commit(self, kept: Tensor) -> None:
        self._advance(kept)

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: Tensor,
        end: int | None = None,
    ) -> Tensor:
        store = self.cache.store
        store.write(keys, values, starts, end)
        options = self.options.over(over_heads(self._seen()))
        (output, _), _ = store.verify(queries, options, starts=starts, window=self.window)
        return output
