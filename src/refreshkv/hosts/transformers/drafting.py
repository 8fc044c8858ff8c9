"""The decoding loop of the exact mode, called by `generate` in place of its own greedy or sampling loop (ours).

A cycle: every row drafts over its partial caches, one pass over all rows verifies the drafts, and each row keeps as
many of them as are right and one token more. Rows run ahead of each other; what `generate` lets a caller see
(streamers, stopping criteria, scores) happens token by token in the order and with the arguments of its own loop, as
soon as every unfinished row is there. Letters: B batch, P tokens of the padded prompt, T of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.utils import GENERATION_MODES_MAPPING

from refreshkv.hosts.transformers.captured import under_way
from refreshkv.hosts.transformers.fallback import CACHES, full_reason, say_full
from refreshkv.hosts.transformers.masks import padding
from refreshkv.hosts.transformers.passes import Passes, Verified
from refreshkv.hosts.transformers.shown import Shown
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.stats import DraftCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


class _Run(Passes):
    """The rows of one call.

    The host looks at them once a cycle (`seen`), or at each draft where none is captured.

    Attributes:
        start: positions of the prompt in the cache.
        seen: `made`, as the host saw it last; `texts`: the new tokens of each row.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        config = self.config
        pad = config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad.flatten()[0])
        self.go_on = [True] * self.rows
        self.start = 0
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
        self.start = int(self.cache.get_seq_length())
        compiles = self.static and self.graphs is None
        if compiles and self.model._valid_auto_compile_criteria(model_kwargs, self.config):
            self.call = self.model.get_compiled_call(self.config.compile_config)
        self.cycle_of = self.cache.begin_exact(padding(model_kwargs.get("attention_mask")))
        if self.graphs is not None:
            self.graphs.forget()  # those of another call read its tensors
        logits = outputs.logits[:, -1:].float()
        self._reserve(1)
        targets = self.process(logits, torch.zeros_like(self.made))
        share = targets[:, 0].softmax(-1)
        if self.config.do_sample:
            self.probs = share.new_zeros(self.rows, self.most, share.shape[-1])
        token = self.choose(targets[:, 0], share)
        kept = self.keep(token[:, None], torch.ones_like(self.made))
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

    def _plain_cycle(self) -> Verified:
        """The host looks at each draft, so none is made that does not count."""
        self.begin_cycle()
        self._reserve(int(self.allowed.max()) + 1)
        if bool(self.going.any()):
            self.cache.before_drafts()
        while bool(self.going.any()):
            self.draft_token()
        return self.verify(int(self.drafted.max()) + 1)

    def _replayed_cycle(self) -> Verified:
        """Nobody looks: every row drafts as many tokens as the one that may draft most."""
        assert self.graphs is not None
        most, rows = 0, zip(self.go_on, self.over, self.seen, self.lengths, strict=True)
        for goes, over, made, length in rows:
            room = length if self.new is None else self.new - made - 1
            most = max(most, min(length, room) if goes and not over else 0)
        self._reserve(self.most + 2)
        self.graphs.run(("begin", self.cycles > 0, most > 0), lambda: self.begin_cycle(most > 0))
        for _ in range(most):
            self.graphs.run("draft", self.draft_token)
        width = next(width for width in self._widths() if width > most)
        result: Verified = self.graphs.run(("verify", width), lambda: self.verify(width))
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

    def _look(self, kept: Tensor, tokens: Tensor, accepted: Tensor) -> None:
        """What the host has to know of a cycle, and the statistics of it."""
        parts = [
            self.made,
            self.draft.length,
            self.ended,
            kept,
            self.active,
            self.drafted,
            accepted,
        ]
        table = torch.cat([torch.stack([p.long() for p in parts], 1), tokens], 1).tolist()
        self.seen = [row[0] for row in table]
        self.lengths = [row[1] for row in table]
        self.over = [bool(row[2]) for row in table]
        for text, row in zip(self.texts, table, strict=True):
            text += row[len(parts) : len(parts) + row[3]]
        if self.cycles:
            self.cache.stats.record_drafts(
                [
                    DraftCounts(drafted, stood, yielded, active, active * (drafted + 1))
                    for _, _, _, yielded, active, drafted, stood, *_ in table
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
                self.forward(sequences.gather(1, positions.clamp(max=last)))
        for layer in self.cache.served:
            layer.end_exact(self.start + last - self.prompt)


def _columns(rows: list[list[Tensor]], count: int, first: int = 0) -> list[Tensor]:
    """One `[B, V]` for each token from `first` to `count`; a row that has ended repeats its last."""
    return [torch.stack([row[min(n, len(row) - 1)] for row in rows]) for n in range(first, count)]
