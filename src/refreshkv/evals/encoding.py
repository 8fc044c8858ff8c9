"""Text to tokens and back, and whether tokens fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = False) -> list[int]:
    """The tokens of a prompt, the tokenizer's special ones included.

    Raises:
        ValueError: `chat` without a chat template, or a prompt without tokens.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model has no chat template; leave out --chat")
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    # A template writes its special tokens itself. `verbose` would warn of what `encode_all` refuses.
    tokens = tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not tokens:
        raise ValueError("the prompt has no tokens; write something for the model to continue")
    return tokens


def encode_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    room: Sequence[int],
    chat: bool = False,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """The prompts as tokens, with `room[i]` positions of the model left for what follows prompt i, called `names[i]`.

    Raises:
        ValueError: a prompt that does not fit the model with what follows, or as `encode`.
    """
    rows, positions = [], positions_in(model)
    for i, (prompt, new) in enumerate(zip(prompts, room, strict=True)):
        row = encode(tokenizer, prompt, chat)
        if positions is not None and len(row) + new > positions:
            name = f"prompt {i}" if names is None else names[i]
            raise ValueError(
                f"{name}: {len(row)} tokens of prompt and {new} of output make {len(row) + new}, but the model has"
                f" {positions} positions; lower the length of the task"
            )
        rows.append(row)
    return rows


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The tokens of an answer, as they follow the prompt's."""
    return tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]


def positions_in(model: PreTrainedModel) -> int | None:
    """The longest sequence that a model was made for, where its config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Tokens as text, without special ones."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


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
