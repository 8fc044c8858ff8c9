"""One prefill for all methods of a batch: each goes on from a cache that holds the prompts but for their last token.

The prompts of a comparison are the same for every method, prefill does not depend on the method, and on long prompts it
takes most of the time. A method that looks at all prompt queries while they pass (H2O) runs its own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

import refreshkv
from refreshkv import RefreshCache
from refreshkv.evals.decoding import last_logits_only, positions_of
from refreshkv.hosts.transformers.cache import RefreshLayer
from refreshkv.hosts.transformers.versions import CACHE

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
        own = any(layer.algorithm.sees_prompt for layer in cache.layers if _is_ours(layer))
        if tokens.shape[1] < 2 or own or session.config.window > _WINDOW:
            return None
        if self._prompts is None or not _same(self._prompts, (tokens, mask)):
            self._base = None  # before the next one is made: both may not fit
            self._base = self._prefill(tokens[:, :-1], mask[:, :-1])
            self._prompts = (tokens, mask)
        assert self._base is not None
        for place, layer in enumerate(self._base.layers):
            ours = cache.layers[place]
            if _is_ours(layer) != _is_ours(ours):
                return None  # a sliding layer, which is ours in the lossless mode only
            if _is_ours(ours):
                ours.inner.go_on_from(layer.inner, tokens.shape[1] - 1)
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


def _is_ours(layer: object) -> TypeGuard[RefreshLayer]:
    return isinstance(layer, RefreshLayer)


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
