"""The passes of the exact mode over all rows, and all that is decided after each of them (ours).

What a pass reads and writes are tensors that stay where they are, and nothing looks at them, so that a pass can be a
CUDA graph with the decisions that follow it. Letters: B batch, P tokens of the padded prompt, T of a pass, V
vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

from refreshkv.exact import Cycle
from refreshkv.hosts.transformers.cache import RefreshCache
from refreshkv.hosts.transformers.captured import under_way
from refreshkv.hosts.transformers.processors import process as apply
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.kernels.options import verify_queries
from refreshkv.policy.speculation import DraftLength, accept_greedy, accept_sampled, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Verified(NamedTuple):
    """`[B]` tokens that each row keeps, the drafts that stood, the tokens `[B, T]`; logits and scores `[B, T, V]`."""

    kept: Tensor
    accepted: Tensor
    tokens: Tensor
    logits: Tensor
    scores: Tensor


class Passes:
    """The rows of one call, as tensors.

    Attributes:
        ids: `[B, capacity]`, prompt, then new tokens, then drafts.
        made: `[B]` int64, new tokens of each row; the last of them has not been through the model.
        ended: `[B]` bool, rows whose last token is an end token.
        wanted: `[B]` bool, rows that go on.
        most: tokens that a row drafts at most; draft: how many each does.
        position: `[..., B, 1]`, of the last token of the prompt.
        cycle_of: what the layers share.
    """

    position: Tensor
    cycle_of: Cycle

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RefreshCache | StaticRefreshCache,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        new: int | None,
    ) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.call: Any = model  # what a pass after the prompt runs
        self.static = isinstance(cache, StaticRefreshCache)
        self.graphs = cache.graphs if isinstance(cache, StaticRefreshCache) else None
        self.processors = processors
        self.new = new  # most new tokens of a row
        self.rows, self.prompt = input_ids.shape
        self.ids = input_ids
        self.made = torch.zeros(self.rows, dtype=torch.int64, device=input_ids.device)
        self.ended = torch.zeros_like(self.made, dtype=torch.bool)
        self.wanted = torch.ones_like(self.ended)  # rows that go on
        self.most = cache.refresh.draft
        if self.graphs is not None:
            self.most = verify_queries(_group(model), self.most + 1) - 1
        self.draft = DraftLength(self.most, cache.refresh.confidence, self.made)
        self.ends = [
            c.eos_token_id.to(input_ids.device) for c in criteria if isinstance(c, EosTokenCriteria)
        ]
        # Of one cycle: rows that take part, how many tokens each may draft and has, whether it drafts on.
        self.active = torch.zeros_like(self.ended)
        self.allowed = torch.zeros_like(self.made)
        self.drafted = torch.zeros_like(self.made)
        self.going = torch.zeros_like(self.ended)
        self.drafts = self.made.new_zeros(self.rows, self.most)
        self.probs: Tensor | None = None  # [B, most, V], what they were drawn from

    def begin_cycle(self, select: bool = False) -> None:
        """A cycle begins."""
        room = None if self.new is None else self.new - self.made
        active = self.wanted & ~self.ended
        if room is not None:
            active = active & (room > 0)
        self.active.copy_(active)
        self.allowed.copy_(self.draft.within(active, room))
        self.going.copy_(self.allowed > 0)
        self.drafted.zero_()
        if select:
            self.cache.before_drafts()

    def draft_token(self) -> None:
        """One more token of each row, behind those of `ids` too.

        A row stops where it is not confident, and after an end of text; what it drafts after that does not count.
        """
        ahead = self.cycle_of.ahead
        where = self.prompt + self.made + ahead
        token = self.ids.gather(1, where[:, None] - 1)
        step = ahead.view(1).clone()
        self.cycle_of.counted.copy_(self.going)
        with self.cache.drafting("draft"):
            logits = self.forward(token, step)
        scores = self.process(logits, where - self.prompt)[:, 0]
        share = scores.softmax(-1)
        token = self.choose(scores, share)
        self.ids.scatter_(1, where[:, None], token[:, None])
        self.drafts.index_copy_(1, step, token[:, None])
        if self.probs is not None:
            self.probs.index_copy_(1, step, share[:, None])
        self.drafted.add_(self.going)
        going = self.going & self.draft.goes_on(self.drafted, self.allowed, share)
        for ends in self.ends:
            going = going & ~torch.isin(token, ends)
        self.going.copy_(going)

    def verify(self, width: int) -> Verified:
        """The full pass over the last token and the drafts, `[B, width]`, and what follows from it."""
        last = self.ids.gather(1, (self.prompt + self.made - 1)[:, None])
        drafts = self.drafts[:, : width - 1]
        self.cycle_of.counts.copy_(torch.where(self.active, self.drafted + 1, 0))
        with self.cache.drafting("verify"):
            logits = self._full_pass(torch.cat([last, drafts], 1))
        scores = self.process(logits, self.made)
        if self.probs is not None:
            chances = self.probs[:, : width - 1]
            accepted, after = accept_sampled(drafts, chances, scores.softmax(-1), self.drafted)
        else:
            accepted, after = accept_greedy(drafts, scores.argmax(-1), self.drafted)
        tokens = F.pad(drafts, (0, 1)).scatter(1, accepted[:, None], after[:, None])
        kept = self.keep(tokens, torch.where(self.active, accepted + 1, 0))
        self.cache.commit(kept)
        self.draft.learn(self.active, self.drafted, accepted)
        return Verified(kept, accepted, tokens, logits, scores)

    def _full_pass(self, tokens: Tensor) -> Tensor:
        """Logits of `[B, T]`; a pass that is compiled always takes as many tokens as it ever may."""
        count = tokens.shape[1]
        if self.static and self.graphs is None:
            tokens = F.pad(tokens, (0, self.most + 1 - count))
        return self.forward(tokens)[:, :count]

    def forward(self, tokens: Tensor, ahead: Tensor | int = 0) -> Tensor:
        """`[B, T]` tokens, `ahead` positions after the last sure one -> float32 logits `[B, T, V]`."""
        steps = torch.arange(tokens.shape[1], device=tokens.device) + ahead
        ahead_of_prompt = self.made[:, None] + steps
        if self.new is not None:  # a row that drafts less than others may have no such position
            ahead_of_prompt = ahead_of_prompt.clamp(max=self.new - 1)
        uncompiled = self.call is self.model
        captured = None if self.graphs is None else under_way.get()
        with (
            self.cache.without_masks() if uncompiled else nullcontext(),
            nullcontext() if captured is None else captured.compiled(),
        ):
            output = self.call(
                input_ids=tokens,
                position_ids=self.position + ahead_of_prompt,
                use_cache=True,
                return_dict=True,
                **{CACHE: self.cache},
            )
        # The next replay of a CUDA graph overwrites what this one gave.
        return output.logits.to(torch.float32, copy=self.static)

    def process(self, logits: Tensor, made: Tensor) -> Tensor:
        """`[B, T, V]` through the logits processors; row i's first follows `made[i]` new tokens of `ids`."""
        return apply(self.processors, logits, self.ids, self.prompt + made)

    def choose(self, scores: Tensor, share: Tensor) -> Tensor:
        """The best of `scores` `[B, V]`, or a draw from `share`, their softmax; `[B]`."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        return draw(share)

    def keep(self, tokens: Tensor, gained: Tensor) -> Tensor:
        """The first `gained` of `tokens` `[B, T]` become text, up to an end token; `[B]`: how many they are."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        for ends in self.ends:
            is_end = torch.isin(tokens, ends) & (positions < gained[:, None])
            first = torch.where(is_end, positions, tokens.shape[1]).amin(1) + 1
            gained = torch.minimum(gained, first)
            self.ended.logical_or_(is_end.any(1))
        where = (self.prompt + self.made)[:, None] + positions
        kept = positions < gained[:, None]
        self.ids.scatter_(1, where, torch.where(kept, tokens, self.ids.gather(1, where)))
        self.made.add_(gained)
        return gained


def _group(model: PreTrainedModel) -> int:
    """Query heads of a KV head."""
    config = model.config.get_text_config(decoder=True)
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)
