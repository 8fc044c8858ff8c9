"""The lossless mode under the clock: drafts, a full pass and a commit, driven as `generate` drives them.

How many drafts stand is a matter of text, and random weights write none: the acceptance is measured elsewhere and
given, and each timed cycle commits as many tokens as it asks for in the mean. Letters: B batch, s drafts, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.bench.job import Job
from refreshkv.bench.timing import captured
from refreshkv.bench.variants import forward, take_back
from refreshkv.hosts.transformers import RefreshCache
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.policy.speculation import DraftLength, accept_greedy


def kept(cycle: int, job: Job) -> int:
    """Tokens that this cycle commits, the mean rounded down or up."""
    mean = job.tokens_per_pass
    return math.floor((cycle + 1) * mean) - math.floor(cycle * mean)


class Exact:
    """The lossless mode at the end of the context; whatever it does, `take_back` goes there again.

    Over a static cache on a GPU, `capture` makes a CUDA graph of a draft and one of a full pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        below: str,
        cache: RefreshCache | StaticRefreshCache,
        job: Job,
    ) -> None:
        self.model, self.below, self.cache, self.job = model, below, cache, job
        self.counts = torch.full((job.batch,), job.draft, device=job.device)
        self.drafts = DraftLength(job.draft, cache.refresh.confidence, self.counts)
        self.draft_pass = _Pass(self, "draft", 1)
        self.full_pass = _Pass(self, "verify", job.draft + 1)
        for layer in cache.served:
            layer.begin_exact(None)

    def capture(self) -> bool:
        """Whether both passes are CUDA graphs from here on."""
        if not isinstance(self.cache, StaticRefreshCache):
            return False
        found = self.draft_pass.capture() and self.full_pass.capture()
        self.take_back()
        return found

    def calls(self) -> dict[str, Callable[[], object]]:
        """What is timed, each to be taken back: a draft (after `begin`), a full pass, cycles that commit the mean."""
        token = torch.ones_like(self.counts)[:, None]
        tokens, turns = token.expand(-1, self.job.draft + 1), itertools.count()
        return {
            "draft": lambda: self.draft(token, 1),
            "verify": lambda: self.verify(tokens),
            "cycle": lambda: self.cycle(token, kept(next(turns), self.job)),
        }

    def begin(self) -> None:
        """The selection of a cycle, and its first draft."""
        self.cache.before_drafts()
        self.draft(torch.ones_like(self.counts)[:, None], 0)

    def draft(self, token: Tensor, ahead: int) -> Tensor:
        """One draft pass over `[B, 1]`, `ahead` places after the context; logits `[B, V]`."""
        return self.draft_pass(token, ahead)[:, 0]

    def verify(self, tokens: Tensor) -> Tensor:
        """The full pass over `[B, s + 1]`; logits `[B, s + 1, V]`."""
        return self.full_pass(tokens, 0)

    def cycle(self, token: Tensor, kept: int) -> None:
        """Drafts after `token` `[B, 1]`, and the full pass; whatever is right, `kept` tokens are committed."""
        tokens = [token]
        self.cache.before_drafts()
        for ahead in range(self.job.draft):
            scores = self.draft(tokens[-1], ahead).float()
            tokens.append(scores.argmax(-1, keepdim=True))
            drafted = torch.full_like(self.counts, ahead + 1)
            # Asked and read as `generate` does, but not obeyed.
            bool(self.drafts.goes_on(drafted, self.counts, scores.softmax(-1)).any())
        logits = self.verify(torch.cat(tokens, 1))
        accept_greedy(torch.cat(tokens[1:], 1), logits.float().argmax(-1), self.counts)
        self._commit(kept)

    def take_back(self) -> None:
        """The end is that of the context again. The last votes stay: the next draft selects from them."""
        self._commit(0)  # of drafts without a full pass
        for layer in self.cache.served:
            layer.exact.take_back(torch.full_like(self.counts, self.job.context))
        take_back(self.cache, self.job.context)

    def _commit(self, kept: int) -> None:
        for layer in self.cache.served:
            layer.exact.commit(torch.full_like(self.counts, kept))


class _Pass:
    """One kind of forward pass over `count` tokens a row: as it comes, or replayed over inputs that stay in place."""

    def __init__(self, exact: Exact, kind: Literal["draft", "verify"], count: int) -> None:
        self.exact, self.kind, self.count = exact, kind, count
        shape, device = (exact.job.batch, count), exact.job.device
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.logits: Tensor | None = None
        self.replay: Callable[[], object] | None = None

    def __call__(self, tokens: Tensor, ahead: int) -> Tensor:
        """`[B, count]` tokens, the first `ahead` places after the context; logits `[B, count, V]`."""
        first = self.exact.job.context + ahead
        self.tokens.copy_(tokens)
        self.positions.copy_(torch.arange(first, first + self.count, device=tokens.device))
        (self.replay or self._run)()
        assert self.logits is not None
        return self.logits

    def capture(self) -> bool:
        """Whether it is a CUDA graph from here on."""
        self.replay = captured(self._run, self.exact.job.device)
        return self.replay is not None

    def _run(self) -> None:
        exact = self.exact
        counts = exact.counts + 1 if self.kind == "verify" else None
        with exact.cache.drafting(self.kind, counts):
            self.logits = forward(
                exact.model, exact.below, exact.cache, self.tokens, self.positions
            )
