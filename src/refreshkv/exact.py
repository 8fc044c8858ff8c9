"""The exact mode of one layer: cheap steps draft, one full pass over the drafted tokens verifies them (ours).

A cycle is one call of `select`, some of `draft`, one of `verify`, one of `commit`, in every layer. Drafted tokens are
written behind the end of their row, where the full pass writes what it computes again, exactly; they stand only once
they are committed. The pass reads the store once for all its queries. Rows keep different numbers of tokens, so each
has its own end. Drafts are partial steps, whose next selection the mean of the pass's scores makes, whichever of them
were right; or mixed ones, which select nothing.

Letters: B batch, Hq query heads, Hkv KV heads, T tokens, L positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import BLOCK
from refreshkv.kernels.options import AttendOptions, over_heads
from refreshkv.mixed import COPY_COUNTS, attend_to_copy, learn_prompt
from refreshkv.stats import COUNTS
from refreshkv.step import reselect, select_after_prompt


class Cycle:
    """What the layers of a model share while they draft and verify.

    Attributes:
        ends: `[B]` int64, where each row ends; what the stores hold after that is left over from refused drafts.
        ahead: int64 scalar, tokens drafted in this cycle.
        positions: `[B]` int64, where the token goes that is being drafted.
        next: `[B]` int64, the position after that.
        columns: `[2]` int64, `ahead` and the one after it.
        counted: `[B]` bool, rows that draft; what others read along with them is not counted.
        counts: `[B]` int64, tokens of each row in the full pass that are real; 0 for a row that sits out.
        sums: `[B, 5]` int64, what each KV head of each layer counts for the full passes, in the order of `COUNTS`; in
            caches of the fixed form, where it is counted once for all layers.
        end: where the draft ends in the longest row, in stores that grow.
    """

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends.clone()
        self.ahead = torch.zeros((), dtype=torch.int64, device=ends.device)
        self.positions = ends.clone()
        self.next = ends + 1
        self._two = torch.arange(2, device=ends.device)
        self.columns = self._two.clone()
        self.counted = torch.ones_like(ends, dtype=torch.bool)
        self.counts = torch.zeros_like(ends)
        self.sums = ends.new_zeros(len(ends), len(COUNTS))
        self.end: int | None = None

    def begin_draft(self, grows: bool) -> None:
        """A pass over the next token of each row. `grows`: stores have to make room, and the device is asked."""
        torch.add(self.ends, self.ahead, out=self.positions)
        torch.add(self.positions, 1, out=self.next)
        torch.add(self._two, self.ahead, out=self.columns)
        if grows:
            self.end = (int(self.ends.max()) if self.end is None else self.end) + 1

    def end_draft(self) -> None:
        """That pass is over."""
        self.ahead += 1

    def counted_pass(self, kept: Tensor, hidden: Tensor) -> Tensor:
        """`[B, 5]` int64, what a KV head counts for the full pass of which `kept` `[B]` tokens stay, as `sums`.

        `hidden` `[B]`: padding tokens.
        """
        verified, before = self.counts > 0, self.ends - hidden
        # Full attention would have read one entry more with each token.
        available = kept * before + kept * (kept + 1) // 2
        read = (before + self.counts).where(verified, 0)
        counts = {"full": verified.long(), "steps": kept, "read": read, "available": available}
        return torch.stack([counts.get(name, torch.zeros_like(kept)) for name in COUNTS], 1)

    def advance(self, kept: Tensor) -> None:
        """Each row has `kept` `[B]` tokens more, and what was drafted is over."""
        self.ends += kept
        self.ahead.zero_()
        self.end = None

    def tensors(self) -> list[Tensor]:
        """All that a pass reads and writes."""
        return [part for part in vars(self).values() if isinstance(part, Tensor)]


class ExactLayer:
    """A layer in the exact mode.

    Over a cache of the fixed form `draft` and `verify` look at nothing on the device, and neither do `select` after the
    first cycle and `commit`: each can be compiled, or captured in a graph for all cycles.

    Args:
        cache: the layer after a prompt that is the same number of tokens in every row.
        options: of the model.
        visible: `[B, L]` bool, False for padding; `None` when there is none. Later tokens are visible.
        cycle: that of the model's layers, which somebody else begins and advances.
    """

    def __init__(
        self,
        cache: LayerCache,
        options: AttendOptions,
        visible: Tensor | None,
        cycle: Cycle,
    ) -> None:
        self.cache = cache
        self.options = options.over(reduction=cache.config.group_reduction)
        self.visible = visible
        self.cycle = cycle
        cache.store.let_rows_differ(self.cycle.ends)
        cache.wait_again()
        # [B, Hkv, L], of the last full pass, from which the next cycle selects
        self.votes: Tensor | None = None
        self.voted = False
        # [B, Hq, s + 1] float32, of the fixed form: what the full pass may take for the log-sum-exp of each of its
        # queries, by that of the draft with the same token, the last one's once more. So it votes as it attends, and
        # reads the keys once. Where a guess is wrong the next drafts are selected a little differently, that is all.
        self.guesses: Tensor | None = None
        # [B, Hkv, 5], what the drafts of this cycle read; of the fixed form all that the layer counts
        heads = cache.rows, cache.kv_heads, len(COUNTS)
        self.tally = self.ends.new_zeros(heads) if cache.tally is None else cache.tally
        if cache.fixed:
            self.visible = self._seen()
            device = cache.store.device
            self.votes = torch.zeros(cache.rows, cache.kv_heads, cache.store.width, device=device)
            assert cache.queries is not None
            size = cache.rows, cache.queries.shape[1], cache.config.draft + 1
            self.guesses = torch.full(size, float("nan"), device=device)
            self.select()

    @property
    def ends(self) -> Tensor:
        """`[B]` int64, where each row ends."""
        return self.cycle.ends

    def select(self) -> None:
        """The partial cache of the cycle that begins."""
        if self.cache.waiting is not None:
            select_after_prompt(self.cache, self.options, self._seen())
        elif self.voted:
            assert self.votes is not None
            reselect(self.cache, self.votes, self._seen())

    def draft(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A cheap step over the token `[B, Hkv, D]`; `query` `[B, Hq, D]`; returns `[B, Hq, D]`."""
        self.cache.store.write(
            key[:, :, None], value[:, :, None], self.cycle.positions, self.cycle.end
        )
        return self._draft(query)

    def _draft(self, query: Tensor) -> Tensor:
        """A partial step, over the token that is in the store by now."""
        cache, ring, cycle = self.cache, self.cache.ring, self.cycle
        assert ring is not None
        counts: dict[str, Any] = {"tally": self.tally, "counted": cycle.counted}
        ring.push(cycle.positions, **counts)
        successor = cache.config.successor
        output, lse = ring.attend(
            query, self.options, successor=successor, end=cycle.ends, **counts
        )
        if self.guesses is not None:
            self.guesses.index_copy_(2, cycle.columns, lse[..., None].expand(-1, -1, 2))
        return output

    def verify(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The full pass over the token before the drafts and the drafts, of which the cycle's `counts` are real.

        `queries` `[B, Hq, T, D]`, keys and values `[B, Hkv, T, D]`; returns `[B, Hq, T, D]`.
        """
        cache = self.cache
        if cache.waiting is not None:
            # Nothing was drafted: the prompt selects nothing, but K is that of its length.
            assert cache.prompt is not None
            cache.resolve_budget(self._seen(), cache.prompt)
            cache.waiting = cache.anchors = None
        cache.store.write(keys, values, self.ends)
        several, expected = queries.shape[2], None
        if self.guesses is not None and several <= self.guesses.shape[2]:
            expected = self.guesses[:, :, :several]
        (output, _), scored = cache.store.verify(
            queries,
            self.options.over(over_heads(self._seen())),
            starts=self.ends,
            counts=self.cycle.counts,
            expected=expected,
        )
        if cache.fixed:
            assert self.votes is not None
            self.votes.copy_(scored.scores)
        else:
            self.votes = scored.scores
        self.voted = True
        return output

    def commit(self, kept: Tensor) -> None:
        """Count a cycle of a cache that grows: the first `kept` `[B]` tokens of the full pass stay."""
        cache, heads = self.cache, self.cache.kv_heads
        assert cache.hidden is not None
        counts = self.cycle.counted_pass(kept, cache.hidden) * heads + self.tally.sum(1)
        cache.stats.record(
            cache.index,
            kv_heads=heads,
            entry_bytes=cache.store.entry_bytes,
            **dict(zip(COUNTS, counts.unbind(1), strict=True)),
        )
        self.tally.zero_()

    def settle(self) -> None:
        """What the full passes of a cache of the fixed form counted for all layers, this one counts too."""
        self.tally += self.cycle.sums[:, None]

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

    def grow(self) -> None:
        """The store of the fixed form has more room than before."""
        assert self.votes is not None
        self.votes = F.pad(self.votes, (0, self.cache.length - self.votes.shape[2]))
        self.visible = self._seen()

    def tensors(self) -> list[Tensor]:
        """All that a pass reads and writes, beside the cache."""
        own = [part for part in vars(self).values() if isinstance(part, Tensor)]
        return self.cycle.tensors() + own

    def _seen(self) -> Tensor | None:
        """`visible` for all positions of the store."""
        if self.visible is None or self.visible.shape[1] == self.cache.length:
            return self.visible
        return F.pad(self.visible, (0, self.cache.length - self.visible.shape[1]), value=True)


class ExactMixedLayer(ExactLayer):
    """A layer whose drafts are mixed steps: by the codes of what is sure, and exactly where the weight is."""

    _followed = False  # the prompt has its codes

    def select(self) -> None:
        """The codes of the blocks that the last cycle has completed."""
        cache = self.cache
        learn_prompt(cache, self._seen())
        assert cache.copy is not None
        # A graph cannot ask how many blocks that are, but they are no more than a cycle may complete.
        most = 1 + cache.config.draft // BLOCK if cache.fixed and self._followed else None
        cache.copy.follow(cache.store, self.ends, self._seen(), most=most)
        self._followed = True

    def _draft(self, query: Tensor) -> Tensor:
        cache, cycle = self.cache, self.cycle
        read = self.tally.new_zeros(cache.rows, cache.kv_heads, 2)
        output = attend_to_copy(cache, query, self.options, self._seen(), read, cycle.next)
        self.tally[..., COPY_COUNTS].add_(read * cycle.counted[:, None, None])
        return output


class ExactWindowLayer(ExactLayer):
    """A sliding-window layer in the exact mode: it attends to its window in drafts too, and selects nothing.

    Its tokens are kept all, because the window of a row that refuses a draft moves back. Drafts go to the store and are
    overwritten by the full pass.
    """

    def __init__(
        self,
        cache: LayerCache,
        options: AttendOptions,
        visible: Tensor | None,
        window: int,
        cycle: Cycle,
    ) -> None:
        super().__init__(cache, options, visible, cycle)
        self.window = window

    def select(self) -> None:
        pass

    def _draft(self, query: Tensor) -> Tensor:
        return self._attend(query[:, :, None], self.cycle.positions)[:, :, 0]

    def verify(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.cache.store.write(keys, values, self.ends)
        return self._attend(queries, self.ends)

    def commit(self, kept: Tensor) -> None:
        pass

    def settle(self) -> None:
        pass

    def _attend(self, queries: Tensor, starts: Tensor) -> Tensor:
        options = self.options.over(over_heads(self._seen()))
        store = self.cache.store
        (output, _), _ = store.verify(queries, options, starts=starts, window=self.window)
        return output
