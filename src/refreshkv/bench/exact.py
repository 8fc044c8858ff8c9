"""The lossless mode under the clock: drafts, a full pass and a commit, driven as `generate` drives them.

How many drafts stand is a matter of text, and random weights write none: the acceptance is measured elsewhere and
given, and each timed cycle commits as many tokens as it asks for in the mean. Letters: B batch, s drafts, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.bench.roofline import tokens_per_pass
from refreshkv.bench.variants import Job, forward, take_back
from refreshkv.integrations.transformers import RefreshCache
from refreshkv.speculation import accept_greedy


def kept(cycle: int, job: Job) -> int:
    """Tokens that this cycle commits, the mean rounded down or up."""
    mean = tokens_per_pass(job.draft, job.acceptance)
    return math.floor((cycle + 1) * mean) - math.floor(cycle * mean)


class Exact:
    """The lossless mode at the end of the context; whatever it does, `take_back` goes there again."""

    def __init__(self, model: PreTrainedModel, below: str, cache: RefreshCache, job: Job) -> None:
        self.model, self.below, self.cache, self.job = model, below, cache, job
        self.counts = torch.full((job.batch,), job.draft, device=job.device)
        for layer in cache.exact_layers:
            layer.begin_exact(None)

    def draft(self, token: Tensor, ahead: int) -> Tensor:
        """One draft pass over `[B, 1]`, `ahead` places after the context; logits `[B, V]`."""
        with self.cache.drafting("draft"):
            return self._forward(token, ahead)[:, 0]

    def verify(self, tokens: Tensor) -> Tensor:
        """The full pass over `[B, s + 1]`; logits `[B, s + 1, V]`."""
        with self.cache.drafting("verify", self.counts + 1):
            return self._forward(tokens, 0)

    def cycle(self, token: Tensor, kept: int) -> None:
        """Drafts after `token` `[B, 1]`, and the full pass; whatever is right, `kept` tokens are committed."""
        tokens, confidence = [token], self.cache.refresh.confidence
        for ahead in range(self.job.draft):
            scores = self.draft(tokens[-1], ahead).float()
            tokens.append(scores.argmax(-1, keepdim=True))
            # What `generate` looks at before it drafts on.
            bool((scores.softmax(-1).amax(-1) >= confidence).any())
        logits = self.verify(torch.cat(tokens, 1))
        accept_greedy(torch.cat(tokens[1:], 1), logits.float().argmax(-1), self.counts)
        self._commit(kept)

    def take_back(self) -> None:
        """The end is that of the context again. The last votes stay: the next draft selects from them."""
        self._commit(0)  # of drafts without a full pass
        for layer in self.cache.exact_layers:
            layer.exact.take_back(torch.full_like(self.counts, self.job.context))
        take_back(self.cache, self.job.context)

    def _commit(self, kept: int) -> None:
        for layer in self.cache.exact_layers:
            layer.exact.commit(torch.full_like(self.counts, kept))

    def _forward(self, tokens: Tensor, ahead: int) -> Tensor:
        first = self.job.context + ahead
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        positions = positions.expand(len(tokens), -1)
        return forward(self.model, self.below, self.cache, tokens, positions)
