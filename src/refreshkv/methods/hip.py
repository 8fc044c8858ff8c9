"""HiP's idea in our own words: top-K from coarse chunks to fine ones, each looked at through one of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Grouped, at_least
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method

# The tokens of a chunk; how many chunks' tokens go on, in sizes of the last selection; and after how many intervals a
# stage looks again.
_STAGES = ((256, 16, 4), (32, 4, 2), (8, 1, 1))
# Thirteenths of K that are the first tokens, and the newest at least; the stages choose the others.
_SINKS, _RECENT, _PARTS = 1, 4, 13


@dataclass(frozen=True, kw_only=True)
class HiPSettings(Grouped):
    """Settings of HiP.

    Attributes:
        interval: the last stage looks again after so many steps, the others after twice and four times as many (paper:
            8, 16 and 32).
    """

    interval: int = at_least(1, 8)


class HiP(KeptEntries):
    """The first tokens, the newest, and the best chunks of eight tokens between them.

    A stage looks at each chunk that is left through one token, which it finds by halves: of two halves the one whose
    middle token scores more, down to a token. The chunks whose tokens score most go on to the next, finer stage.

    Attributes:
        coarse, middle, fine: `[B, Hkv, L]` bool, the tokens that went on when the stage last looked, in the order of
            the row without padding; those that came since are among them, but for the last stage.
        age: steps since the first choice.
        looked: `[B]` int64, the keys that the stages looked at in this step, in the KV head that looked at most.
    """

    settings: HiPSettings
    coarse: Tensor | None = None
    middle: Tensor | None = None
    fine: Tensor | None = None
    looked: Tensor | None = None
    age = 0

    def choose(self, now: Look) -> Tensor:
        budget, heads = now.cache.budget, now.cache.kv_heads
        assert budget is not None
        sinks, recent = budget * _SINKS // _PARTS, (budget * _RECENT // _PARTS).clamp(min=1)
        columns = (
            (~now.seen).int().argsort(dim=-1, stable=True)
        )  # of each token; padding comes last
        place = torch.arange(now.length, device=columns.device)
        between = (place >= sinks[:, None]) & (place < (now.tokens - recent)[:, None])
        self.looked = torch.zeros_like(budget)
        left = between[:, None].expand(-1, heads, -1)
        scores: Tensor | None = None
        for name, (size, share, intervals) in zip(
            ("coarse", "middle", "fine"), _STAGES, strict=True
        ):
            before = getattr(self, name)
            if before is not None and self.age % (intervals * self.settings.interval):
                left = F.pad(before, (0, 1))
                if name != "fine":
                    left = left | (place == now.tokens[:, None] - 1)[:, None]
            else:
                if scores is None:
                    scores = now.scores(self.settings.group_reduction)
                    scores = scores.gather(-1, columns[:, None].expand_as(scores))
                wanted = (budget - sinks - recent) * share
                wanted = (wanted if name == "fine" else wanted + size - 1) // size
                left = self._best_chunks(scores, left & between[:, None], sinks, size, wanted)
            setattr(self, name, left)
        self.age += 1
        row = torch.zeros_like(left).scatter(-1, columns[:, None].expand_as(left), left)
        kept = row | (now.seen & (now.seen.cumsum(-1) <= sinks[:, None]))[:, None]
        # What room is left takes the newest of the others.
        others = now.seen[:, None] & ~kept
        room = budget[:, None] - kept.sum(-1)
        return kept | others & (others.flip(-1).cumsum(-1).flip(-1) <= room[..., None])

    def overhead(self, now: Look) -> Tensor | int:
        """A key is half of an entry."""
        assert self.looked is not None
        return (self.looked + 1) // 2

    def reset(self) -> None:
        super().reset()
        self.age = 0

    def _best_chunks(
        self, scores: Tensor, left: Tensor, sinks: Tensor, size: int, wanted: Tensor
    ) -> Tensor:
        """The tokens among `left` `[B, Hkv, L]` of the `wanted` `[B]` best chunks, which begin at `sinks`."""
        length = left.shape[-1]
        chunks = -(-length // size)
        scores = scores.masked_fill(~left, -math.inf)
        # As if the first chunk began at 0; what lies beyond the text scores less than all.
        place = torch.arange(chunks * size, device=left.device) + sinks[:, None]
        index = place.clamp(max=length - 1)[:, None].expand(-1, left.shape[1], -1)
        inside = (place < length)[:, None]
        values = (
            scores.gather(-1, index).masked_fill(~inside, -math.inf).unflatten(-1, (chunks, size))
        )
        chunk_left = (left.gather(-1, index) & inside).unflatten(-1, (chunks, size)).any(-1)
        start, width = torch.zeros_like(values[..., :1], dtype=torch.int64), size
        while width > 1:
            width //= 2
            one, other = (values.gather(-1, start + at + width // 2) for at in (0, width))
            start = start + width * (other > one)
        best = values.gather(-1, start)[..., 0]
        # A chunk that has tokens, but none where it was looked at, comes before those that have none.
        ranked = best.clamp(min=-1.0).masked_fill(~chunk_left, -math.inf)
        order = ranked.argsort(dim=-1, stable=True)
        among = torch.arange(chunks, device=left.device) >= chunks - wanted[:, None, None]
        goes_on = torch.zeros_like(chunk_left).scatter(-1, order, among.expand_as(order))
        assert self.looked is not None
        self.looked = self.looked + 2 * int(math.log2(size)) * chunk_left.sum(-1).amax(-1)
        chosen = (goes_on & chunk_left)[..., None].expand_as(values).flatten(-2)
        # Back to where the tokens are: position p is at p - sinks.
        back = (torch.arange(length, device=left.device) - sinks[:, None]).clamp(min=0)
        return left & chosen.gather(-1, back[:, None].expand_as(left))


METHOD = Method(
    name="hip",
    label="HiP, hierarchical top-K",
    source=(
        'the idea of Lee et al., "A Training-Free Sub-Quadratic Cost Transformer Model Serving Framework with'
        ' Hierarchically Pruned Attention", arXiv 2406.09827, and "InfiniteHiP", arXiv 2502.08910; written anew'
    ),
    note=(
        "Chunks of 256, then 32, then 8 tokens, each scored by one token that is found by halves; looked at again after"
        " 32, 16 and 8 steps, as in the paper. Ours: one set per KV head, every layer alike, and how K is shared out:"
        " 1/13 first tokens, at least 4/13 newest, the others chosen; between stages 16 and 4 times that go on."
        " Positions stay as they are, and prefill is dense. Counts half an entry for each key looked at."
    ),
    settings=HiPSettings,
    make=HiP,
)
