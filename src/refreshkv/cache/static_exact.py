"""The lossless mode over the static form of a layer's cache: its draft and its full pass can be compiled.

Both are the code of `exact.py`; each is one graph for all cycles. What lies between them looks at the device anyway and
stays outside: how many tokens stand, and the selection for the next drafts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.cache.static import StaticLayerCache
from refreshkv.exact import ExactLayer
from refreshkv.step import Attention, first_selection, reselect


class StaticExactLayer(ExactLayer):
    """As `ExactLayer`, in tensors that stay where they are; `select` comes before the drafts of a cycle.

    Args:
        cache: the layer after a prompt; a row needs room for its drafts beyond its last token.
        queries: `[B, Hq, T, D]`, the last of the prompt.
        visible: `[B, prompt]` bool, False for padding; `None` when there is none.
        prompt: its tokens.
    """

    cache: StaticLayerCache

    def __init__(
        self,
        cache: StaticLayerCache,
        queries: Tensor,
        attention: Attention,
        visible: Tensor | None,
        prompt: int,
    ) -> None:
        super().__init__(cache, visible)
        self.seen = None
        if visible is not None:
            self.seen = F.pad(visible, (0, cache.store.keys.shape[2] - prompt), value=True)
        first_selection(cache, queries, attention, visible, prompt)
        cache.settle()
        self.votes = torch.zeros(*cache.store.keys.shape[:3], device=self.ends.device)
        self.fresh = False  # votes that nothing was selected from yet

    def select(self) -> None:
        """The partial cache of the cycle that begins."""
        if self.fresh:
            assert self.votes is not None
            reselect(self.cache, self.votes, self._seen(), ends=self.ends)
            self.fresh = False

    def commit(self, kept: Tensor) -> None:
        """See `ExactLayer.commit`."""
        super().commit(kept)
        self.fresh = True

    def close(self, length: int) -> None:
        """See `ExactLayer.close`."""
        self.cache.store.length.fill_(length)
        self.cache.forget_selection()

    def state(self) -> list[Tensor]:
        """All that a pass reads and writes, beside the cache."""
        return [part for part in vars(self).values() if isinstance(part, Tensor)]

    def _voted(self, votes: Tensor, counts: Tensor) -> None:
        assert self.votes is not None
        self.votes.copy_(votes)
        self.verified.copy_(counts)

    def _select(self, attention: Attention) -> None:
        pass

    def _seen(self) -> Tensor | None:
        return self.seen
