"""One prefill for all methods of a batch: each goes on from a cache that holds the prompts but for their last token.

The prompts of a comparison are the same for every method, prefill does not depend on the method, and on long prompts it
takes most of the time. A method that looks at all prompt queries while they pass (H2O) runs its own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import refreshkv
from refreshkv import RefreshCache
from refreshkv.evals.decoding import last_logits_only, positions_of
from refreshkv.hosts.transformers.cache import RefreshLayer
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.methods.kept import Eviction
from refreshkv.step import Algorithm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refreshkv import Session

_WINDOW = 32  # prompt queries kept for a first selection; a method with a larger window runs its own prefill


class Prefills:
    """The cache of the batch that was prefilled last. Each cache handed out ends the one before it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._prompts: tuple[Tensor, Tensor] | None = None
        self._base: RefreshCache | None = None

    def cache_for(self, session: Session, tokens: Tensor, mask: Tensor) -> RefreshCache | None:
        """A cache for `session` with all columns of `tokens` `[B, T]` but the last; `None` where none can be shared.

        `mask` `[B, T]` is 0 for padding.
        """
        cache = session.new_cache()
        if tokens.shape[1] < 2 or not all(map(_can_share, cache.layers)):
            return None
        if session.config.window > _WINDOW:
            return None
        if self._prompts is None or not _same(self._prompts, (tokens, mask)):
            self._base = None  # before the next one is made: both may not fit
            self._base = self._prefill(tokens[:, :-1], mask[:, :-1])
            self._prompts = (tokens, mask)
        assert self._base is not None
        for place, layer in enumerate(self._base.layers):
            ours = cache.layers[place]
            if isinstance(layer, RefreshLayer) != isinstance(ours, RefreshLayer):
                return None  # a sliding layer, which is ours in the lossless mode only
            if isinstance(ours, RefreshLayer):
                _go_on(layer, ours, tokens.shape[1] - 1)
            else:
                cache.layers[place] = copy.deepcopy(layer)
        cache.is_kept = False
        return cache

    @torch.no_grad()
    def _prefill(self, tokens: Tensor, mask: Tensor) -> RefreshCache:
        with refreshkv.attach(self.model, mode="refresh", window=_WINDOW) as session:
            cache = session.new_cache(reserve=tokens.shape[1])
            with cache.prompt():
                self.model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=positions_of(mask),
                    **{CACHE: cache},
                    use_cache=True,
                    **last_logits_only(self.model),
                )
        return cache


def _can_share(layer: object) -> bool:
    """Whether what drives the layer learns of a prompt only through the cache."""
    if not isinstance(layer, RefreshLayer):
        return True
    return type(layer.algorithm).observe in (Algorithm.observe, Eviction.observe)


def _go_on(base: RefreshLayer, layer: RefreshLayer, length: int) -> None:
    """`layer` takes the store of `base`, cut to its prompt again, and as many of its last queries as it wants."""
    base.inner.store.crop(length)
    layer.inner.store = base.inner.store
    wanted, queries = layer.inner.config.window - 1, base.inner.pending
    assert queries is not None
    layer.inner.pending = queries[:, :, -wanted:].clone() if wanted else None


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
