"""The decoding loop of the exact mode, called by `generate` in place of its own greedy or sampling loop (ours).

A cycle: every row drafts over its partial caches, one pass over all rows verifies the drafts, and each row keeps as
many of them as are right and one token more. Rows run ahead of each other; what `generate` lets a caller see
(streamers, stopping criteria, scores) happens token by token in the order and with the arguments of its own loop, as
soon as every unfinished row is there. Letters: B batch, P tokens of the padded prompt, T of a pass, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput
from transformers.generation.utils import GENERATION_MODES_MAPPING

from refreshkv.hosts.transformers.cache import RefreshCache
from refreshkv.hosts.transformers.fallback import CACHES, full_reason, say_full
from refreshkv.hosts.transformers.processors import process
from refreshkv.hosts.transformers.served import without_autocast
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.policy.speculation import DraftLength, accept_greedy, accept_sampled
from refreshkv.stats import DraftCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return run.finish(_loop(run, stopping_criteria, streamer), streamer)
    except BaseException:
        run.abandon()
        raise


def _loop(run: _Run, stopping_criteria: StoppingCriteriaList, streamer: Any) -> Tensor:
    """Cycles until the stopping criteria are met in every row; `[B, P + n]`, finished rows padded."""
    prompt, pad = run.prompt, run.pad
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(run.rows, dtype=torch.bool, device=run.ids.device)
    shown = run.ids[:, :prompt]
    while True:
        # Without an end token `generate` goes on with every row until all have finished.
        going = unfinished if has_end else torch.ones_like(unfinished)
        # What every such row has by now, token by token, as `generate` would.
        while bool((run.made > shown.shape[1] - prompt)[going].all()):
            token = run.ids[:, shown.shape[1]]
            if has_end:
                token = torch.where(unfinished, token, pad)
            shown = torch.cat([shown, token[:, None]], 1)
            unfinished = unfinished & ~stopping_criteria(shown, run.scores_until(shown))
            if streamer is not None:
                streamer.put(token.cpu())
            if has_end:
                going = unfinished
                run.stop(~unfinished, shown.shape[1] - prompt)
            if not bool(unfinished.any()):
                return shown
        run.cycle(going)


class _Run:
    """The rows of one call.

    Attributes:
        ids: `[B, capacity]`, prompt, then new tokens, then drafts.
        start: positions of the prompt in the cache.
        made: `[B]` int64, new tokens of each row; the last of them has not been through the model.
        ended: `[B]` bool, rows whose last token is an end token.
        draft: how many tokens each row drafts.
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
        self.processors = processors
        self.new = new  # most new tokens of a row
        self.start = 0
        self.rows, self.prompt = input_ids.shape
        self.ids = input_ids
        self.made = torch.zeros(self.rows, dtype=torch.int64, device=input_ids.device)
        self.draft = DraftLength(cache.refresh.draft, cache.refresh.confidence, self.made)
        self.ended = torch.zeros_like(self.made, dtype=torch.bool)
        pad = config._pad_token_tensor
        self.pad = 0 if pad is None else pad.to(input_ids.device)
        self.ends = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
        keep = config.return_dict_in_generate
        # Of each row, one entry a new token.
        self.scores = self._lists() if keep and config.output_scores else None
        self.logits = self._lists() if keep and config.output_logits else None
        self.columns: list[Tensor] = []  # of the scores, for stopping criteria

    def prefill(self, model_kwargs: dict[str, Any]) -> None:
        """The prompt, and the token after it."""
        self.position = model_kwargs["position_ids"][..., -1:]  # of the last token of the prompt
        outputs = self.model._prefill(
            self.ids, self.config, model_kwargs, is_first_iteration=not self.config.is_assistant
        )
        mask = model_kwargs.get("attention_mask")
        visible = None if mask is None or bool(mask.all()) else mask.bool()
        self.start = int(self.cache.get_seq_length())
        if self.static and self.model._valid_auto_compile_criteria(model_kwargs, self.config):
            self.call = self.model.get_compiled_call(self.config.compile_config)
        for layer in self.cache.served:
            layer.begin_exact(visible)
        logits = outputs.logits[:, -1:].float()
        self._reserve(1)
        targets = self._process(logits, torch.zeros_like(self.made))
        token = self._choose(targets[:, 0], targets[:, 0].softmax(-1))
        self._keep(token[:, None], torch.ones_like(self.made), logits, targets)

    def cycle(self, going: Tensor) -> None:
        """Draft, verify, keep. Rows that are not `going` `[B]`, have ended or have all their tokens sit out."""
        active = going & ~self.ended
        room = None if self.new is None else self.new - self.made
        if room is not None:
            active = active & (room > 0)
        counts = self.draft.within(active, room)
        self._reserve(int(counts.max()) + 1)
        drafts, draft_probs, counts = self._drafts(counts)
        last = self._last()[:, None]
        real = torch.where(active, counts + 1, 0)
        with self.cache.drafting("verify", real):
            logits = self._verify(torch.cat([last, drafts], 1))
        scores = self._process(logits, self.made)
        if self.config.do_sample:
            accepted, after = accept_sampled(drafts, draft_probs, scores.softmax(-1), counts)
        else:
            accepted, after = accept_greedy(drafts, scores.argmax(-1), counts)
        tokens = torch.nn.functional.pad(drafts, (0, 1)).scatter(
            1, accepted[:, None], after[:, None]
        )
        kept = self._keep(tokens, torch.where(active, accepted + 1, 0), logits, scores)
        with without_autocast(kept.device):
            for layer in self.cache.served:
                layer.exact.commit(kept)
        self._count(counts, accepted, kept, active)
        self.draft.learn(active, counts, accepted)

    def stop(self, rows: Tensor, new: int) -> None:
        """`rows` `[B]` bool have finished with `new` tokens; what they have beyond is forgotten."""
        self.made = torch.where(rows, self.made.clamp(max=new), self.made)

    def abandon(self) -> None:
        """After an error: a cache that somebody holds on to keeps what every row has."""
        layers = [layer for layer in self.cache.served if layer.exact is not None]
        if self.cache.is_kept:
            shortest = min([int(layer.exact.ends.min()) for layer in layers], default=0)
            for layer in layers:
                layer.end_exact(shortest)

    def finish(self, sequences: Tensor, streamer: Any) -> GenerateDecoderOnlyOutput | Tensor:
        """What `generate` returns, and the cache as an ordinary loop leaves it where the caller keeps it."""
        if streamer is not None:
            streamer.end()
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

    def scores_until(self, shown: Tensor) -> Any:
        """The `scores` that stopping criteria get: those of the tokens shown, or `None`."""
        if self.scores is None:
            return None
        count = shown.shape[1] - self.prompt
        self.columns += _columns(self.scores, count, len(self.columns))
        return tuple(self.columns)

    def _drafts(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At most `counts` `[B]` tokens a row, written behind those of `ids` too.

        A row stops where it is not confident, and after an end of text.

        Returns:
            `[B, s]` tokens, `[B, s, V]` what they were drawn from (empty where nothing is drawn), `[B]` how many count.
        """
        tokens, probs, token = [], [], self._last()
        going, drafted = counts > 0, torch.zeros_like(counts)
        if bool(going.any()):
            self.cache.before_drafts()
        while bool(going.any()):
            step = len(tokens)
            with self.cache.drafting("draft"):
                logits = self._forward(token[:, None], step)
            scores = self._process(logits, self.made + step)[:, 0]
            share = scores.softmax(-1)
            token = self._choose(scores, share)
            self.ids.scatter_(1, (self.prompt + self.made + step)[:, None], token[:, None])
            drafted = drafted + going
            going = going & self.draft.goes_on(drafted, counts, share)
            for ends in self.ends:
                going = going & ~torch.isin(token, ends.to(token.device))
            tokens.append(token)
            if self.config.do_sample:
                probs.append(share)
        none = self.ids[:, :0]
        stacked = torch.stack(tokens, 1) if tokens else none
        most = int(drafted.max())
        proposed = torch.stack(probs, 1) if probs else none.new_zeros(self.rows, 0, 1).float()
        return stacked[:, :most], proposed[:, :most], drafted

    def _verify(self, tokens: Tensor) -> Tensor:
        """The full pass over `[B, T]`; one that is compiled always takes as many tokens as it ever may."""
        count = tokens.shape[1]
        if self.static:
            tokens = torch.nn.functional.pad(tokens, (0, self.draft.most + 1 - count))
        return self._forward(tokens)[:, :count]

    def _forward(self, tokens: Tensor, ahead: int = 0) -> Tensor:
        """`[B, T]` tokens, `ahead` positions after the last sure one -> float32 logits `[B, T, V]`."""
        steps = torch.arange(ahead, ahead + tokens.shape[1], device=tokens.device)
        ahead_of_prompt = self.made[:, None] + steps
        if self.new is not None:  # a row that drafts less than others may have no such position
            ahead_of_prompt = ahead_of_prompt.clamp(max=self.new - 1)
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

    def _keep(self, tokens: Tensor, gained: Tensor, logits: Tensor, scores: Tensor) -> Tensor:
        """The first `gained` of `tokens` `[B, T]` become text, up to an end token; `[B]`: how many they are."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        for ends in self.ends:
            is_end = torch.isin(tokens, ends.to(tokens.device)) & (positions < gained[:, None])
            first = torch.where(is_end, positions, tokens.shape[1]).amin(1) + 1
            gained = torch.minimum(gained, first)
            self.ended = self.ended | is_end.any(1)
        where = (self.prompt + self.made)[:, None] + positions
        kept = positions < gained[:, None]
        self.ids.scatter_(1, where, torch.where(kept, tokens, self.ids.gather(1, where)))
        for kept_values, values in ((self.logits, logits), (self.scores, scores)):
            if kept_values is not None:
                for row, count in enumerate(gained.tolist()):
                    kept_values[row].extend(values[row, :count].unbind(0))
        self.made = self.made + gained
        return gained

    def _lists(self) -> list[list[Tensor]]:
        return [[] for _ in range(self.rows)]

    def _last(self) -> Tensor:
        """`[B]`: the newest token of each row."""
        return self.ids.gather(1, (self.prompt + self.made - 1)[:, None])[:, 0]

    def _reserve(self, more: int) -> None:
        """Room for `more` tokens in the row that is furthest."""
        needed = self.prompt + int(self.made.max()) + more + 1
        if needed > self.ids.shape[1]:
            extra = needed - self.ids.shape[1] + 64
            self.ids = torch.nn.functional.pad(self.ids, (0, extra))

    def _count(self, counts: Tensor, accepted: Tensor, kept: Tensor, active: Tensor) -> None:
        """One cycle for the statistics."""
        table = torch.stack([counts, accepted, kept, active.long()], 1).tolist()
        self.cache.stats.record_drafts(
            [
                DraftCounts(drafted, stood, yielded, took_part, took_part * (drafted + 1))
                for drafted, stood, yielded, took_part in table
            ]
        )

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
            with self.cache.drafting("verify", missing):
                self._forward(sequences.gather(1, positions.clamp(max=last)))
        for layer in self.cache.served:
            layer.end_exact(self.start + last - self.prompt)


def _columns(rows: list[list[Tensor]], count: int, first: int = 0) -> list[Tensor]:
    """One `[B, V]` for each token from `first` to `count`; a row that has ended repeats its last."""
    return [torch.stack([row[min(n, len(row) - 1)] for row in rows]) for n in range(first, count)]
