"""A batch of prompts under a method: generated freely, or with the right answer fed token by token.

A row counts only the steps of its own. The first new token comes from the prompt's pass, so n new tokens are n - 1
decode steps. Rows are padded on the left; no method sees the padding.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from refreshkv.hosts.transformers.versions import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from refreshkv import RefreshCache, Session
    from refreshkv.evals.prefill import Prefills


_SMALL = 50_000_000  # parameters


@dataclass(frozen=True)
class Output:
    """What one prompt gave.

    Attributes:
        tokens: the new tokens, end of sequence left out.
        text: the same, decoded; without special tokens.
        ended: the model stopped by itself; otherwise it was cut off.
        stats: `Stats.as_dict` of this row.
        output_tokens: new tokens, end of sequence counted.
        seconds: of the batch / its rows; a shared prefill counts where it was made.
    """

    tokens: list[int]
    text: str
    ended: bool
    stats: dict[str, Any]
    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True)
class Fed:
    """What the model would have said at each place of an answer that was fed to it.

    Attributes:
        right: of each token of the answer, whether it was the most probable one.
        logprobs: of each token of the answer, its log-probability in nats.
        text: the most probable tokens, decoded.
        output_tokens: tokens of the answer. The rest is as in `Output`.
    """

    right: list[bool]
    logprobs: list[float]
    text: str
    stats: dict[str, Any]
    prompt_tokens: int
    output_tokens: int
    seconds: float


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
    rows = [encode(tokenizer, prompt, chat) for prompt in prompts]
    for i, (row, room) in enumerate(zip(rows, max_new_tokens, strict=True)):
        check_room(model, f"prompt {i}" if names is None else names[i], len(row), room)
    pad = _pad_token(model, tokenizer)
    tokens, mask = _left_padded(rows, pad, model.device)
    width, started = tokens.shape[1], time.perf_counter()
    session.stats.reset()
    with _threads(model) as prompts_done:
        cache = None if prefills is None else prefills.cache_for(session, tokens, mask)
        sequences = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            **{CACHE: cache},
            max_new_tokens=max(max_new_tokens),
            stopping_criteria=[_OwnCap(width, max_new_tokens, model.device, prompts_done)],
            pad_token_id=pad,
            # Plain greedy, whatever the checkpoint recommends.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
        )
    new = sequences[:, width:].tolist()  # waits for the device
    seconds = (time.perf_counter() - started) / len(rows)
    ends = _end_tokens(model)
    outputs = []
    for i, (row, room) in enumerate(zip(rows, max_new_tokens, strict=True)):
        own = new[i][:room]
        stop = next((at for at, token in enumerate(own) if token in ends), None)
        kept = own if stop is None else own[:stop]
        count = len(kept) + (stop is not None)
        outputs.append(
            Output(
                tokens=kept,
                text=_text(tokenizer, kept),
                ended=stop is not None,
                stats=session.stats.row(i, count - 1).as_dict(),
                prompt_tokens=len(row),
                output_tokens=count,
                seconds=seconds,
            )
        )
    return outputs


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    session: Session,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    chat: bool = False,
    names: Sequence[str] | None = None,
    prefills: Prefills | None = None,
) -> list[Fed]:
    """Prefill each prompt, then decode its answer token by token under the method, whatever the model would have said.

    Arguments as for `generate`.

    Raises:
        ValueError: a prompt that does not fit the model with its answer, an empty answer, no chat template, or the
            lossless mode, which verifies what the model itself would say.
    """
    if session.config.mode == "exact":
        raise ValueError("the lossless mode cannot be fed an answer; let it generate freely")
    rows = [encode(tokenizer, prompt, chat) for prompt in prompts]
    golds = [answer_tokens(tokenizer, answer) for answer in answers]
    for i, (row, gold) in enumerate(zip(rows, golds, strict=True)):
        name = f"prompt {i}" if names is None else names[i]
        if not gold:
            raise ValueError(f"{name}: the answer has no tokens; there is nothing to feed")
        check_room(model, name, len(row), len(gold))
    pad = _pad_token(model, tokenizer)
    tokens, mask = _left_padded(rows, pad, model.device)
    # A row whose answer has ended is fed padding, which no longer counts.
    steps = max(map(len, golds))
    gold_tokens = torch.tensor([gold + [pad] * (steps - len(gold)) for gold in golds])
    gold_tokens = gold_tokens.to(model.device)
    started = time.perf_counter()
    session.stats.reset()
    with _threads(model) as prompts_done:
        cache = None if prefills is None else prefills.cache_for(session, tokens, mask)
        logprobs, best = _feed_loop(model, session, tokens, mask, gold_tokens, cache, prompts_done)
    seconds = (time.perf_counter() - started) / len(rows)
    fed = []
    for i, (row, gold) in enumerate(zip(rows, golds, strict=True)):
        said = best[i][: len(gold)]
        fed.append(
            Fed(
                right=[a == b for a, b in zip(said, gold, strict=True)],
                logprobs=logprobs[i][: len(gold)],
                text=_text(tokenizer, said),
                stats=session.stats.row(i, len(gold) - 1).as_dict(),
                prompt_tokens=len(row),
                output_tokens=len(gold),
                seconds=seconds,
            )
        )
    return fed


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = False) -> list[int]:
    """The tokens of a prompt, the tokenizer's special ones included.

    Raises:
        ValueError: `chat` without a chat template, or a prompt without tokens.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; leave out chat")
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    # A template writes its special tokens itself. `verbose` would warn of what `check_room` refuses.
    tokens = tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not tokens:
        raise ValueError("a prompt has no tokens; there is nothing to continue")
    return tokens


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The tokens of an answer, as they follow the prompt's."""
    return tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]


def check_room(model: PreTrainedModel, name: str, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `ValueError` where a prompt and what follows it are longer than the model's positions."""
    positions = positions_in(model)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise ValueError(
            f"{name}: {prompt_tokens} tokens of prompt and {new_tokens} of output make"
            f" {prompt_tokens + new_tokens}, but the model has {positions} positions; lower the length of the task"
        )


def positions_in(model: PreTrainedModel) -> int | None:
    """The longest sequence that a model was made for, where its config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def lines_right(
    tokenizer: PreTrainedTokenizerBase, answer: str, right: Sequence[bool]
) -> list[bool]:
    """Of each line of an answer, whether every token in it is right. A token may reach into several lines."""
    lines: list[bool] = []
    begun = 0  # the line in which the next token begins
    for token, good in zip(answer_tokens(tokenizer, answer), right, strict=True):
        pieces = tokenizer.decode([token], clean_up_tokenization_spaces=False).split("\n")
        # A line break belongs to the line that it ends.
        touched = len(pieces) if pieces[-1] or len(pieces) == 1 else len(pieces) - 1
        for line in range(begun, begun + touched):
            if line == len(lines):
                lines.append(True)
            lines[line] = lines[line] and good
        begun += len(pieces) - 1
    return lines


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


@contextlib.contextmanager
def _threads(model: PreTrainedModel) -> Iterator[Callable[[], None]]:
    """Yields what to call when the prompts are through: a small model on a CPU decodes with one thread.

    Its steps gain nothing from a second, and wait for it on a busy machine; its prompts do gain.
    """
    before = torch.get_num_threads()
    small = model.device.type == "cpu" and model.num_parameters() < _SMALL

    def prompts_done() -> None:
        if small:
            torch.set_num_threads(1)

    try:
        yield prompts_done
    finally:
        torch.set_num_threads(before)


def _feed_loop(
    model: PreTrainedModel,
    session: Session,
    tokens: Tensor,
    mask: Tensor,
    gold: Tensor,
    cache: RefreshCache | None,
    prompts_done: Callable[[], None],
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
        logprobs.append(now.log_softmax(-1).gather(1, gold[:, step : step + 1]))
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


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do, for it is masked; `generate` wants one."""
    known = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *_end_tokens(model))
    return next((token for token in known if token is not None), 0)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
