"""A batch of prompts under a method: generated freely, or with the right answer fed token by token.

A row counts only the steps of its own. The first new token comes from the prompt's pass, so n new tokens are n - 1
decode steps. Rows are padded on the left; no method sees the padding.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from refreshkv.evals.encoding import answer_tokens, encode_all, text_of
from refreshkv.hosts.transformers.versions import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from refreshkv import RefreshCache, Session
    from refreshkv.evals.prefill import Prefills

    # `(tokens, mask)` `[B, T]` -> a cache that holds their first columns, or `None` for a new one.
    Start = Callable[[Tensor, Tensor], RefreshCache | None]
    Watch = Callable[[int, Tensor], None]

_SMALL = 50_000_000  # parameters
# Plain greedy, whatever the checkpoint recommends.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What one prompt gave.

    Attributes:
        text: of the new tokens, without special ones; fed, of the most probable ones.
        stats: `Stats.as_dict` of this row.
        output_tokens: new tokens, end of sequence counted; fed, those of the answer.
        seconds: of the batch / its rows; a shared prefill counts where it was made.
    """

    text: str
    stats: dict[str, Any]
    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Output(Decoded):
    """What was generated.

    Attributes:
        tokens: the new tokens, end of sequence left out.
        ended: the model stopped by itself; otherwise it was cut off.
    """

    tokens: list[int]
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Fed(Decoded):
    """What the model would have said at each place of an answer that was fed to it.

    Attributes:
        said: the token that was the most probable one in the place of each token of the answer.
        right: of each token of the answer, whether it was the most probable one.
        logprobs: of each token of the answer, its log-probability in nats.
    """

    said: list[int]
    right: list[bool]
    logprobs: list[float]


@dataclass(frozen=True)
class Continued:
    """What `continue_rows` gave.

    Attributes:
        tokens: the new tokens of each row, its end of sequence included.
        prefill_s: seconds until the first token, the first selection not included.
        decode_s: seconds of all tokens after the first.
    """

    tokens: list[list[int]]
    prefill_s: float
    decode_s: float


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    session: Session,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    chat: bool = False,
    names: Sequence[str] | None = None,
    prefills: Prefills | None = None,
) -> list[Output]:
    """Greedy continuations through `model.generate`; row i is cut at `max_new_tokens[i]` tokens.

    Args:
        session: an attachment of `model` with `stats=RowStats()`; its counts start over.
        chat: wrap each prompt in the tokenizer's chat template.
        names: what to call the prompts in errors; their numbers where not given.
        prefills: where the methods of a comparison share the prompts' pass.

    Raises:
        ValueError: a prompt that does not fit the model with its continuation, or no chat template.
    """
    rows = encode_all(model, tokenizer, prompts, max_new_tokens, chat, names)
    session.stats.reset()
    start = None if prefills is None else functools.partial(prefills.cache_for, session)
    made = continue_rows(model, rows, max_new_tokens, start=start, **GREEDY)
    ends = _end_tokens(model)
    outputs = []
    for i, new in enumerate(made.tokens):
        ended = bool(new) and new[-1] in ends
        tokens = new[:-1] if ended else new
        own = _own(session, made, rows, i, len(new))
        outputs.append(Output(tokens=tokens, ended=ended, text=text_of(tokenizer, tokens), **own))
    return outputs


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    session: Session,
    prompts: Sequence[str],
    answers: Sequence[str | list[int]],
    *,
    chat: bool = False,
    names: Sequence[str] | None = None,
    prefills: Prefills | None = None,
    watch: Watch | None = None,
) -> list[Fed]:
    """Prefill each prompt, then decode its answer token by token under the method, whatever the model would have said.

    An answer is a text, or tokens: what a model wrote need not be encoded as it was written. Other arguments as for
    `generate`, and

    Args:
        watch: is told the number of each step and the log-probabilities of all tokens in it, `[B, V]`.

    Raises:
        ValueError: a prompt that does not fit the model with its answer, an empty answer, no chat template, or the
            lossless mode, which verifies what the model itself would say.
    """
    if session.config.mode == "exact":
        raise ValueError("the lossless mode cannot be fed an answer; let it generate freely")
    golds = [a if isinstance(a, list) else answer_tokens(tokenizer, a) for a in answers]
    if [] in golds:
        name = f"prompt {golds.index([])}" if names is None else names[golds.index([])]
        raise ValueError(f"{name}: the answer has no tokens; there is nothing to feed")
    rows = encode_all(model, tokenizer, prompts, list(map(len, golds)), chat, names)
    tokens, mask = _left_padded(rows, _pad_token(model), model.device)
    # A row whose answer has ended is fed padding, which no longer counts.
    padded = torch.tensor([gold + [0] * (max(map(len, golds)) - len(gold)) for gold in golds])
    session.stats.reset()
    with _Clock(model) as clock:
        cache = None if prefills is None else prefills.cache_for(session, tokens, mask)
        logprobs, best = _feed_loop(
            model, session, tokens, mask, padded.to(model.device), cache, clock.prompts_done, watch
        )
    made = Continued(golds, clock.prefill_s, clock.decode_s)
    fed = []
    for i, gold in enumerate(golds):
        said = best[i][: len(gold)]
        right = [a == b for a, b in zip(said, gold, strict=True)]
        own = _own(session, made, rows, i, len(gold))
        fed.append(
            Fed(
                said=said,
                right=right,
                logprobs=logprobs[i][: len(gold)],
                text=text_of(tokenizer, said),
                **own,
            )
        )
    return fed


def continue_rows(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    caps: Sequence[int],
    *,
    start: Start | None = None,
    **settings: Any,
) -> Continued:
    """Run `model.generate` on prompts of tokens and time it; row i ends at `caps[i]` new tokens at the latest.

    Args:
        start: makes the cache; `None` leaves that to `model.generate`.
        settings: of `model.generate`, such as `GREEDY`, or a streamer.
    """
    pad = _pad_token(model)
    tokens, mask = _left_padded(rows, pad, model.device)
    width = tokens.shape[1]
    with _Clock(model) as clock:
        if start is not None:
            settings[CACHE] = start(tokens, mask)
        sequences = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max(caps),
            stopping_criteria=[_OwnCap(width, caps, model.device, clock.prompts_done)],
            pad_token_id=pad,
            **settings,
        )
        new = sequences[:, width:].tolist()  # waits for the device
    ends = _end_tokens(model)
    own = []
    for row, cap in zip(new, caps, strict=True):
        stop = next((at + 1 for at, token in enumerate(row[:cap]) if token in ends), cap)
        own.append(row[:stop])
    return Continued(own, clock.prefill_s, clock.decode_s)


def _own(
    session: Session, made: Continued, rows: Sequence[Sequence[int]], row: int, new: int
) -> dict[str, Any]:
    """What `Decoded` says of one row, besides its text."""
    return {
        "stats": session.stats.row(row, new - 1).as_dict(),
        "prompt_tokens": len(rows[row]),
        "output_tokens": new,
        "seconds": (made.prefill_s + made.decode_s) / len(rows),
    }


class _Clock:
    """Times a batch, and lets a small model on a CPU decode with one thread.

    Its steps gain nothing from a second, and wait for it on a busy machine (10 ms a token with one thread, 55 with two
    on two cores of which another program held one); its prompts do gain.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.small = model.device.type == "cpu" and model.num_parameters() < _SMALL
        self.on_gpu = model.device.type == "cuda"
        self.first: float | None = None

    def __enter__(self) -> _Clock:
        self.threads = torch.get_num_threads()
        self.begun = time.perf_counter()
        return self

    def prompts_done(self) -> None:
        """The prompts are through, and the first token is chosen; later calls change nothing."""
        if self.first is not None:
            return
        if self.on_gpu:
            torch.cuda.synchronize()
        self.first = time.perf_counter()
        if self.small:
            torch.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        end = time.perf_counter()
        torch.set_num_threads(self.threads)
        first = end if self.first is None else self.first
        self.prefill_s, self.decode_s = first - self.begun, end - first


class _OwnCap(StoppingCriteria):
    """Each row ends at its own number of tokens. Also tells when the prompts are through."""

    def __init__(
        self,
        width: int,
        caps: Sequence[int],
        device: torch.device,
        prompts_done: Callable[[], None],
    ) -> None:
        self.ends = torch.tensor([width + cap for cap in caps], device=device)
        self.prompts_done = prompts_done

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """`[B]` bool: done."""
        self.prompts_done()
        return self.ends <= input_ids.shape[1]


def _feed_loop(
    model: PreTrainedModel,
    session: Session,
    tokens: Tensor,
    mask: Tensor,
    gold: Tensor,
    cache: RefreshCache | None,
    prompts_done: Callable[[], None],
    watch: Watch | None,
) -> tuple[list[list[float]], list[list[int]]]:
    """Log-probabilities of `gold` `[B, n]` after the prompts, and the most probable tokens in its place.

    `cache` may hold the first columns of `tokens` already.
    """
    width, steps = tokens.shape[1], gold.shape[1]
    mask = torch.cat([mask, torch.ones_like(gold)], 1)
    positions = positions_of(mask)
    if cache is None:
        cache = session.new_cache(reserve=width + steps)
    options = {"use_cache": True, CACHE: cache, **last_logits_only(model)}

    def logits(new: Tensor, start: int) -> Tensor:
        end = start + new.shape[1]
        output = model(
            input_ids=new,
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            **options,
        )
        return output.logits[:, -1].float()

    held = cache.get_seq_length()
    with cache.prompt():
        now = logits(tokens[:, held:], held)
    prompts_done()
    logprobs, best = [], []
    for step in range(steps):
        if step:
            now = logits(gold[:, step - 1 : step], width + step - 1)
        every = now.log_softmax(-1)
        if watch is not None:
            watch(step, every)
        logprobs.append(every.gather(1, gold[:, step : step + 1]))
        best.append(now.argmax(-1, keepdim=True))
    return torch.cat(logprobs, 1).tolist(), torch.cat(best, 1).tolist()


def positions_of(mask: Tensor) -> Tensor:
    """The position of every token of left-padded rows, `[B, T]`; padding has 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    """What makes a forward pass keep the last logits only: those of a whole prompt may be larger than the model."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}


def _left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, `[B, longest]`."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens.to(device), mask.to(device)


def _end_tokens(model: PreTrainedModel) -> set[int]:
    """What `generate` takes for the end of a sequence."""
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _pad_token(model: PreTrainedModel) -> int:
    """Any token will do, for it is masked; `generate` wants one."""
    known = (model.generation_config.pad_token_id, *_end_tokens(model))
    return next((token for token in known if token is not None), 0)
