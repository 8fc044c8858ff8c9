"""What the commands share: the error for bad input, option types, JSON and progress. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refreshkv.text import visible

if TYPE_CHECKING:
    from rich.console import Console


class BadInput(ValueError):
    """The user gave something that cannot work. The message names it and the remedy; exit code 2."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turn a `ValueError` of the library's own validation into `BadInput`.

    To be put around single calls that validate what the user gave, so that a `ValueError` from anywhere else
    stays what it is: a failure.
    """
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(str(error)) from error


def path_of(given: str) -> Path:
    """A path that the system can be asked for, `~` resolved; whether there is something is for others to say.

    Raises:
        ValueError: no path at all, and why; in words that may follow its name.
    """
    if not given:
        raise ValueError("is empty")
    path = Path(os.path.expanduser(given))  # pathlib's raises where there is no such user
    if given.startswith("~") and not os.path.lexists(path) and path == Path(given):
        raise ValueError("names the home of nobody")
    try:
        path.lstat()
    except ValueError:
        raise ValueError("holds a NUL byte") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ValueError(f"cannot be used ({error.strerror})") from None
    return path


class PathName(click.ParamType):
    """A path that may be; one of a file if `file`, one of something that is there if `there`."""

    name = "path"

    def __init__(self, *, file: bool = False, there: bool = False) -> None:
        self.file, self.there = file, there

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        try:
            path = path_of(str(value))
        except ValueError as error:
            self.fail(f"{str(value)!r} {error}", param, ctx)
        if self.file and path.is_dir():
            self.fail(f"{str(value)!r} is a folder", param, ctx)
        if self.there and not path.exists():
            self.fail(f"{str(value)!r} does not exist", param, ctx)
        return path


class Finite(click.FloatRange):
    """A number in a range. NaN is in none, though click lets it through."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


def count(least: int = 1, most: int = 2**31 - 1) -> click.IntRange:
    """How many of something. Beyond `most` nothing would come to its end, or fit a machine."""
    return click.IntRange(least, most)


class Budget(click.ParamType):
    """`1024` is tokens, `0.125` a share of the prompt: the decimal point tells ("1" one token, "1.0" all)."""

    name = "tokens|share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        """An int or a float; whether it is in range is for `RefreshConfig` to say."""
        if isinstance(value, int | float):
            return value
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
        remedy = "neither tokens (1024) nor a share of the prompt (0.125)"
        self.fail(f"{value!r} is {remedy}", param, ctx)


class OrWord(click.ParamType):
    """A number, or one word that stands for `None`."""

    def __init__(self, kind: type[int] | type[float], word: str) -> None:
        self.kind, self.word, self.name = kind, word, f"{kind.__name__}|{word}"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float | str:
        """The number, or the word itself: `None` must go on meaning "not given"."""
        if value == self.word:
            return value
        try:
            return self.kind(value)
        except ValueError:
            self.fail(f"{value!r} is neither {self.kind.__name__} nor {self.word!r}", param, ctx)


STRIDE = OrWord(int, "never")


SEED = click.IntRange(0, 2**63 - 1)
threads_option = click.option(
    "--threads",
    type=count(most=4 * (os.cpu_count() or 1)),  # each is a thread of the system
    help="CPU threads.  [default: torch's choice]",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="End with one line of JSON on stdout."
)
progress_option = click.option(
    "--progress/--no-progress",
    default=None,
    help="Progress bar on stderr.  [default: only on a terminal]",
)
MODEL_HELP = "A name of `refreshkv models` ('demo' is bundled), a folder, a GGUF file, or a Hugging Face Hub id."


def progress_bar(total: int, unit: str, show: bool | None) -> Any:
    """A tqdm bar on stderr; silent unless asked for (`True`) or, undecided (`None`), stderr is a terminal."""
    from tqdm import tqdm

    show = sys.stderr.isatty() if show is None else show
    return tqdm(
        total=total, unit=unit, disable=not show, file=sys.stderr, leave=False, dynamic_ncols=True
    )


def console() -> Console:
    """A rich console on stdout that reads no markup or numbers into text; wide where no terminal says how wide.

    Text is shown, never obeyed: control characters are escaped, also those in tables.
    """
    from rich.console import Console

    class Careful(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(visible(text, keep="\n\t"), **options)

    made = Careful(highlight=False, markup=False)
    return made if made.is_terminal else Careful(highlight=False, markup=False, width=118)


def emit_json(record: Mapping[str, Any]) -> None:
    """Print one line of strict JSON: ASCII only, NaN and infinities as null."""
    click.echo(json.dumps(_plain(record), allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
