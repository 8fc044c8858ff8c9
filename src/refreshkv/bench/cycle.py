"""The lossless mode under the clock: drafts, a full pass and a commit, driven as `generate` drives them.

How many drafts stand is a matter of text, and random weights write none: the acceptance is measured elsewhere and
given, and each timed cycle commits as many tokens as it asks for in the mean. Letters: B batch, s drafts, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refreshkv.bench.job import Job
from refreshkv.bench.timing import Timed
from refreshkv.bench.variants import forward
from refreshkv.hosts.transformers import RefreshCache
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.policy.speculation import DraftLength, accept_greedy


def kept(cycle: int, job: Job) -> int:
    """Tokens that this cycle commits, the mean rounded down or up."""
    mean = job.tokens_per_pass
    return math.floor((cycle + 1) * mean) - math.floor(cycle * mean)


class Exact:
    """The lossless mode at the end of the context; whatever it does, `take_back` goes there again.

    Attributes:
        draft: a draft pass, `[B, 1]` tokens -> `[B, 1, V]` logits.
        verify: the full pass, `[B, s + 1]` tokens -> `[B, s + 1, V]` logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        below: str,
        cache: RefreshCache | StaticRefreshCache,
        job: Job,
    ) -> None:
        self.cache, self.job = cache, job
        self.token = torch.ones(job.batch, 1, dtype=torch.int64, device=job.device)
        self.counts = job.draft * self.token[:, 0]
        self.drafts = DraftLength(job.draft, cache.refresh.confidence, self.counts)
        cache.begin_exact(None).counts.copy_(self.counts + 1)
        self.draft = _Pass(self, model, below, "draft", 1)
        self.verify = _Pass(self, model, below, "verify", job.draft + 1)
        self.select = Timed(cache.before_drafts)
        self.captured = False

    def capture(self) -> bool:
        """Whether the passes and the selection are CUDA graphs from here on, as in `generate`."""
        self.verify(self.token.expand(-1, self.job.draft + 1))  # gives what is selected from
        passes = (self.draft.timed, self.verify.timed, self.select)
        fixed = isinstance(self.cache, StaticRefreshCache)
        self.captured = fixed and all(one.capture(self.job.device) for one in passes)
        self.take_back()
        return self.captured

    def timed(self) -> dict[str, Timed]:
        """A draft, a full pass, and cycles that commit the mean."""
        turns = itertools.count()
        calls = {
            "draft": lambda: self.draft(self.token, 1),
            "verify": lambda: self.verify(self.token.expand(-1, self.job.draft + 1)),
            "cycle": lambda: self.cycle(self.token, kept(next(turns), self.job)),
        }
        timed = {
            name: Timed(call, self.job.cycles, after=self.take_back) for name, call in calls.items()
        }
        timed["draft"].before = self.begin  # which is a part of the cycle
        return timed

    def begin(self) -> None:
        """The selection of a cycle, and its first draft."""
        self.select.call()
        self.draft(self.token)

    def cycle(self, token: Tensor, kept: int) -> None:
        """Drafts after `token` `[B, 1]`, and the full pass; whatever is right, `kept` tokens are committed."""
        tokens = [token]
        self.select.call()
        for ahead in range(self.job.draft):
            scores = self.draft(tokens[-1], ahead)[:, 0].float()
            tokens.append(scores.argmax(-1, keepdim=True))
            drafted = torch.full_like(self.counts, ahead + 1)
            going = self.drafts.goes_on(drafted, self.counts, scores.softmax(-1)).any()
            if not self.captured:  # looked at as `generate` does, but not obeyed
                bool(going)
        logits = self.verify(torch.cat(tokens, 1))
        drafts = torch.cat(tokens[1:], 1)
        accepted, _ = accept_greedy(drafts, logits.float().argmax(-1), self.counts)
        self._commit(kept)
        accepted.tolist()

    def take_back(self) -> None:
        """The end is that of the context again. The last votes stay: the next draft selects from them."""
        self._commit(0)  # of drafts without a full pass
        for layer in self.cache.served:
            layer.exact.take_back(torch.full_like(self.counts, self.job.context))
            if not layer.inner.fixed:
                layer.inner.store.crop(self.job.context)

    def _commit(self, kept: int) -> None:
        self.cache.commit(torch.full_like(self.counts, kept))


class _Pass:
    """One kind of forward pass over `count` tokens a row, in inputs that stay where a CUDA graph reads them."""

    def __init__(
        self,
        exact: Exact,
        model: PreTrainedModel,
        below: str,
        kind: Literal["draft", "verify"],
        count: int,
    ) -> None:
        self.context = exact.job.context
        self.tokens = exact.token.repeat(1, count)
        self.ahead = torch.arange(count, device=exact.job.device)
        self.positions = torch.zeros_like(self.tokens)

        def run() -> Tensor:
            with exact.cache.drafting(kind):
                return forward(model, below, exact.cache, self.tokens, self.positions)

        self.timed = Timed(run, after=exact.take_back)

    def __call__(self, tokens: Tensor, ahead: int = 0) -> Tensor:
        """`[B, count]` tokens, the first of them `ahead` positions after the context; logits `[B, count, V]`."""
        self.tokens.copy_(tokens)
        self.positions.copy_(self.ahead + (self.context + ahead))
        logits: Tensor = self.timed.call()
        return logits
