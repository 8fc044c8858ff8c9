"""The decoding loop of the exact mode, called by `generate` in place of its own greedy or sampling loop (ours).

A cycle: every row drafts over its partial caches, one pass over all rows verifies the drafts, and each row keeps as
many of them as are right and one token more. Rows run ahead of each other; what `generate` lets a caller see
(streamers, stopping criteria, scores) happens token by token in the order and with the arguments of its own loop, as
soon as every unfinished row is there. Letters: B batch, P tokens of the padded prompt, T of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput
from transformers.generation.utils import GENERATION_MODES_MAPPING

from refreshkv.hosts.transformers.cache import RefreshCache
from refreshkv.hosts.transformers.captured import under_way
from refreshkv.hosts.transformers.fallback import CACHES, full_reason, say_full
from refreshkv.hosts.transformers.processors import process
from refreshkv.hosts.transformers.shown import Shown
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.kernels.options import verify_queries
from refreshkv.policy.speculation import DraftLength, accept_greedy, accept_sampled
from refreshkv.stats import DraftCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Verified(NamedTuple):
    """`[B]` tokens that each row keeps, the drafts that stood, the tokens `[B, T]`; logits and scores `[B, T, V]`."""

    kept: Tensor
    accepted: Tensor
    tokens: Tensor
    logits: Tensor
    scores: Tensor


_CAPTURED_IDS = 4096  # tokens of room for the text, whose tensor must not move often


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Arguments and result as those of `GenerationMixin._sample`, or of another loop that a call asks for.

    Raises:
        ValueError: a loop that is code of the hub.
    """
    cache = model_kwargs.get(CACHE)
    limit = stopping_criteria.max_length
    plain = not isinstance(cache, CACHES)  # as was asked for
    reason = None
    if not plain:
        reason = full_reason(
            model,
            input_ids,
            logits_processor,
            generation_config,
            limit,
            model_kwargs,
            synced_gpus,
        )
    if plain or reason is not None:
        name = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
        if "/" in name:
            raise ValueError(f"mode='exact' cannot run code of the hub ({name}): use mode='full'")
        if reason is not None:
            say_full("exact", reason)
        return getattr(type(model), name)(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    new = None if limit is None else limit - input_ids.shape[1]
    run = _Run(model, cache, input_ids, logits_processor, stopping_criteria, generation_config, new)
    try:
        run.prefill(model_kwargs)
        shown = Shown(run, stopping_criteria, streamer)
        while not shown.advance():
            run.cycle(shown.going)
        return run.finish(shown.sequences(), streamer)
    except BaseException:
        run.abandon()
        raise


class _Run:
    """The rows of one call.

    What a pass reads and writes are tensors that stay where they are, so that a pass can be a CUDA graph with all that
    is decided after it. The host looks at them once a cycle (`seen`), or at each draft where none is captured.

    Attributes:
        ids: `[B, capacity]`, prompt, then new tokens, then drafts.
        start: positions of the prompt in the cache.
        made: `[B]` int64, new tokens of each row; the last of them has not been through the model.
        ended: `[B]` bool, rows whose last token is an end token.
        draft: how many tokens each row drafts.
        seen: `made`, as the host saw it last; `texts`: the new tokens of each row.
    """

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
        self.start = 0
        self.rows, self.prompt = input_ids.shape
        self.ids = input_ids
        self.made = torch.zeros(self.rows, dtype=torch.int64, device=input_ids.device)
        self.ended = torch.zeros_like(self.made, dtype=torch.bool)
        self.wanted = torch.ones_like(self.ended)  # rows that go on, as `go_on` says
        self.go_on = [True] * self.rows
        self.most = cache.refresh.draft
        if self.graphs is not None:
            self.most = verify_queries(_group(model), self.most + 1) - 1
        self.draft = DraftLength(self.most, cache.refresh.confidence, self.made)
        pad = config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad.flatten()[0])
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
        self.seen = [0] * self.rows
        self.texts: list[list[int]] = [[] for _ in range(self.rows)]
        self.cycles = 0
        keep = config.return_dict_in_generate
        # Of each row, one entry a new token.
        self.scores = self._lists() if keep and config.output_scores else None
        self.logits = self._lists() if keep and config.output_logits else None
        self.columns: list[Tensor] = []  # of the scores, for stopping criteria

    def prefill(self, model_kwargs: dict[str, Any]) -> None:
        """The prompt, and the token after it."""
        self.position = model_kwargs["position_ids"][..., -1:].clone()  # of its last token
        outputs = self.model._prefill(
            self.ids, self.config, model_kwargs, is_first_iteration=not self.config.is_assistant
        )
        mask = model_kwargs.get("attention_mask")
        visible = None if mask is None or bool(mask.all()) else mask.bool()
        self.start = int(self.cache.get_seq_length())
        compiles = self.static and self.graphs is None
        if compiles and self.model._valid_auto_compile_criteria(model_kwargs, self.config):
            self.call = self.model.get_compiled_call(self.config.compile_config)
        self.cycle_of = self.cache.begin_exact(visible)
        if self.graphs is not None:
            self.graphs.forget()  # those of another call read its tensors
        logits = outputs.logits[:, -1:].float()
        self._reserve(1)
        targets = self._process(logits, torch.zeros_like(self.made))
        share = targets[:, 0].softmax(-1)
        if self.config.do_sample:
            self.probs = share.new_zeros(self.rows, self.most, share.shape[-1])
        token = self._choose(targets[:, 0], share)
        kept = self._keep(token[:, None], torch.ones_like(self.made))
        self._look(kept, token[:, None], torch.zeros_like(kept))
        self._note(kept, logits, targets)

    def cycle(self, going: list[bool]) -> None:
        """Draft, verify, keep. Rows that are not `going`, have ended or have all their tokens sit out."""
        if going != self.go_on:
            self.go_on = list(going)
            self.wanted.copy_(torch.tensor(going))
        captured = self.graphs is not None and self.graphs.reason is None
        verified = self._replayed_cycle() if captured else self._plain_cycle()
        self.cycles += 1
        self._look(verified.kept, verified.tokens, verified.accepted)
        self._note(verified.kept, verified.logits, verified.scores)

    def _plain_cycle(self) -> _Verified:
        """The host looks at each draft, so none is made that does not count."""
        self._begin()
        self._reserve(int(self.allowed.max()) + 1)
        if bool(self.going.any()):
            self.cache.before_drafts()
        while bool(self.going.any()):
            self._draft()
        return self._verify(int(self.drafted.max()) + 1)

    def _replayed_cycle(self) -> _Verified:
        """Nobody looks: every row drafts as many tokens as the one that may draft most."""
        assert self.graphs is not None
        room = [self.most if self.new is None else self.new - made - 1 for made in self.seen]
        most = max(0, min(max(self.lengths), max(room)))
        self._reserve(self.most + 2)
        self.graphs.run(("begin", self.cycles > 0, most > 0), lambda: self._begin(most > 0))
        for _ in range(most):
            self.graphs.run("draft", self._draft)
        width = next(width for width in self._widths() if width > most)
        result: _Verified = self.graphs.run(("verify", width), lambda: self._verify(width))
        return result

    def _widths(self) -> Iterator[int]:
        """Tokens that a captured full pass may take: each twice the one before, so that few graphs serve all."""
        width = 4
        while width < self.most + 1:
            yield width
            width *= 2
        yield self.most + 1

    def stop(self, finished: list[bool], new: int) -> None:
        """Rows have `finished` with `new` tokens; what they have beyond is forgotten."""
        rows = torch.tensor(finished, device=self.made.device)
        self.made.copy_(torch.where(rows, self.made.clamp(max=new), self.made))
        self.seen = [
            min(new, made) if done else made for done, made in zip(finished, self.seen, strict=True)
        ]

    def abandon(self) -> None:
        """After an error: a cache that somebody holds on to keeps what every row has."""
        layers = [layer for layer in self.cache.served if layer.exact is not None]
        if layers:
            self.cache.settle()
        if self.cache.is_kept and layers:
            shortest = int(layers[0].exact.ends.min())
            for layer in layers:
                layer.end_exact(shortest)

    def finish(self, sequences: Tensor, streamer: Any) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` returns, and the cache as an ordinary loop leaves it where the caller keeps it."""
        if streamer is not None:
            streamer.end()
        self.cache.settle()
        as_dict = self.config.return_dict_in_generate
        if as_dict or self.cache.is_kept:
            self._even_out(sequences)
        if not as_dict:
            return sequences
        new = sequences.shape[1] - self.prompt
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if self.scores is None else tuple(_columns(self.scores, new)),
            logits=None if self.logits is None else tuple(_columns(self.logits, new)),
            **{CACHE: self.cache},
        )

    def scores_until(self, count: int) -> Any:
        """The `scores` that stopping criteria get: those of the first `count` new tokens, or `None`."""
        if self.scores is None:
            return None
        self.columns += _columns(self.scores, count, len(self.columns))
        return tuple(self.columns)

    def _begin(self, select: bool = False) -> None:
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

    def _draft(self) -> None:
        """One more token of each row, behind those of `ids` too.

        A row stops where it is not confident, and after an end of text; what it drafts after that does not count.
        """
        ahead = self.cycle_of.ahead
        where = self.prompt + self.made + ahead
        token = self.ids.gather(1, where[:, None] - 1)
        step = ahead.view(1).clone()
        self.cycle_of.counted.copy_(self.going)
        with self.cache.drafting("draft"):
            logits = self._forward(token, step)
        scores = self._process(logits, where - self.prompt)[:, 0]
        share = scores.softmax(-1)
        token = self._choose(scores, share)
        self.ids.scatter_(1, where[:, None], token[:, None])
        self.drafts.index_copy_(1, step, token[:, None])
        if self.probs is not None:
            self.probs.index_copy_(1, step, share[:, None])
        self.drafted.add_(self.going)
        going = self.going & self.draft.goes_on(self.drafted, self.allowed, share)
        for ends in self.ends:
            going = going & ~torch.isin(token, ends)
        self.going.copy_(going)

    def _verify(self, width: int) -> _Verified:
        """The full pass over the last token and the drafts, `[B, width]`, and what follows from it."""
        last = self.ids.gather(1, (self.prompt + self.made - 1)[:, None])
        drafts = self.drafts[:, : width - 1]
        self.cycle_of.counts.copy_(torch.where(self.active, self.drafted + 1, 0))
        with self.cache.drafting("verify"):
            logits = self._full_pass(torch.cat([last, drafts], 1))
        scores = self._process(logits, self.made)
        if self.probs is not None:
            chances = self.probs[:, : width - 1]
            accepted, after = accept_sampled(drafts, chances, scores.softmax(-1), self.drafted)
        else:
            accepted, after = accept_greedy(drafts, scores.argmax(-1), self.drafted)
        tokens = F.pad(drafts, (0, 1)).scatter(1, accepted[:, None], after[:, None])
        kept = self._keep(tokens, torch.where(self.active, accepted + 1, 0))
        self.cache.commit(kept)
        self.draft.learn(self.active, self.drafted, accepted)
        return _Verified(kept, accepted, tokens, logits, scores)

    def _full_pass(self, tokens: Tensor) -> Tensor:
        """Logits of `[B, T]`; a pass that is compiled always takes as many tokens as it ever may."""
        count = tokens.shape[1]
        if self.static and self.graphs is None:
            tokens = F.pad(tokens, (0, self.most + 1 - count))
        return self._forward(tokens)[:, :count]

    def _forward(self, tokens: Tensor, ahead: Tensor | int = 0) -> Tensor:
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

    def _process(self, logits: Tensor, made: Tensor) -> Tensor:
        """`[B, T, V]` through the logits processors; row i's first follows `made[i]` new tokens of `ids`."""
        return process(self.processors, logits, self.ids, self.prompt + made)

    def _choose(self, scores: Tensor, share: Tensor) -> Tensor:
        """The best of `scores` `[B, V]`, or a draw from `share`, their softmax; `[B]`."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(share, 1)[:, 0]

    def _keep(self, tokens: Tensor, gained: Tensor) -> Tensor:
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

    def _look(self, kept: Tensor, tokens: Tensor, accepted: Tensor) -> None:
        """What the host has to know of a cycle, and the statistics of it."""
        parts = [self.made, self.draft.length, kept, self.active, self.drafted, accepted]
        table = torch.cat([torch.stack([p.long() for p in parts], 1), tokens], 1).tolist()
        self.seen = [row[0] for row in table]
        self.lengths = [row[1] for row in table]
        for text, row in zip(self.texts, table, strict=True):
            text += row[6 : 6 + row[2]]
        if self.cycles:
            self.cache.stats.record_drafts(
                [
                    DraftCounts(drafted, stood, yielded, active, active * (drafted + 1))
                    for _, _, yielded, active, drafted, stood, *_ in table
                ]
            )

    def _note(self, kept: Tensor, logits: Tensor, scores: Tensor) -> None:
        """Logits and scores of what was kept, where somebody asked for them."""
        for noted, values in ((self.logits, logits), (self.scores, scores)):
            if noted is not None:
                for row, count in enumerate(kept.tolist()):
                    noted[row].extend(values[row, :count].clone().unbind(0))

    def _lists(self) -> list[list[Tensor]]:
        return [[] for _ in range(self.rows)]

    def _reserve(self, more: int) -> None:
        """Room for `more` tokens in the row that is furthest, in `ids` and in a cache that is captured."""
        captured, furthest = self.graphs is not None, max(self.seen)
        if captured:
            assert isinstance(self.cache, StaticRefreshCache)
            model = under_way.get()
            assert model is not None
            model.make_room(more, self.start + furthest)
        needed = self.prompt + furthest + more + 1
        if needed > self.ids.shape[1]:
            extra = needed - self.ids.shape[1] + (_CAPTURED_IDS if captured else 64)
            self.ids = F.pad(self.ids, (0, extra))
            if self.graphs is not None:
                self.graphs.forget()

    def _even_out(self, sequences: Tensor) -> None:
        """Every row as long as the others: the last token but one is in the cache, as after an ordinary loop.

        Rows that ended early take the padding after their end through the model, which ordinary loops do step by step.
        """
        last = sequences.shape[1] - 1
        self.call = self.model  # once, over any number of tokens: not worth a graph
        have = self.prompt + self.made - 1
        missing = (last - have).clamp(min=0)
        for layer in self.cache.served:
            layer.exact.take_back(self.start + self.made - 1)
        if int(missing.max()):
            positions = have[:, None] + torch.arange(int(missing.max()), device=have.device)
            self.cycle_of.counts.copy_(missing)
            with self.cache.drafting("verify"):
                self._forward(sequences.gather(1, positions.clamp(max=last)))
        for layer in self.cache.served:
            layer.end_exact(self.start + last - self.prompt)


def _group(model: PreTrainedModel) -> int:
    """Query heads of a KV head."""
    config = model.config.get_text_config(decoder=True)
    heads: int = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


def _columns(rows: list[list[Tensor]], count: int, first: int = 0) -> list[Tensor]:
    """One `[B, V]` for each token from `first` to `count`; a row that has ended repeats its last."""
    return [torch.stack([row[min(n, len(row) - 1)] for row in rows]) for n in range(first, count)]
