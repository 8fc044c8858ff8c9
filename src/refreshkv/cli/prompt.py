"""The prompt of `generate`: one source, read as it is, nothing added or stripped, and checked against the model."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from refreshkv.cli import common
from refreshkv.cli.common import BadInput

if TYPE_CHECKING:
    from refreshkv.cli.loading import Loaded


def read_prompt(text: str | None, file: str | None) -> str:
    """The prompt from `--prompt`, `--prompt-file` ("-" is stdin) or, with neither, from stdin.

    Raises:
        BadInput: two sources or none, a file that is missing, a folder or not UTF-8, or nothing but white space.
    """
    if text is not None and file is not None:
        raise BadInput("--prompt and --prompt-file were both given; give one prompt")
    if text is not None:
        name = "--prompt"
        decode(os.fsencode(text), name)  # what the shell gave may be no text
    elif file is not None and file != "-":
        name = f"prompt file '{file}'"
        text = decode(read_file(file), name)
    elif sys.stdin is None or sys.stdin.isatty():
        raise BadInput(
            "no prompt; give --prompt TEXT or --prompt-file FILE, or pipe one into stdin"
        )
    else:
        name = "the prompt on stdin"
        text = decode(sys.stdin.buffer.read(), name)
    if not text.strip():
        raise BadInput(f"{name} is empty; write something for the model to continue")
    return text


def read_file(file: str) -> bytes:
    """The bytes of a file, or `BadInput`."""
    try:
        return common.path_of(file).read_bytes()
    except ValueError as error:
        why = f"{error}; check the path"
    except FileNotFoundError:
        why = "does not exist; check the path"
    except IsADirectoryError:
        why = "is a directory; give a text file"
    except OSError as error:
        why = f"cannot be read ({error.strerror}); check its permissions"
    raise BadInput(f"prompt file '{file}' {why}")


def decode(data: bytes, name: str) -> str:
    """UTF-8 or `BadInput` with the place of the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{name} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start});"
            " convert it, for example with 'iconv -t utf-8'"
        ) from None


def check_length(loaded: Loaded, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `BadInput` where the prompt, or the prompt with its answer, is longer than the model's context."""
    positions = loaded.positions
    if positions is None or prompt_tokens + new_tokens <= positions:
        return
    where = f"model {loaded.source.label!r} has {positions} positions"
    if prompt_tokens >= positions:
        raise BadInput(f"the prompt is {prompt_tokens} tokens long, but {where}; shorten it")
    raise BadInput(
        f"the prompt's {prompt_tokens} tokens and --max-new-tokens {new_tokens} make {prompt_tokens + new_tokens},"
        f" but {where}; shorten the prompt or pass --max-new-tokens {positions - prompt_tokens}"
    )
