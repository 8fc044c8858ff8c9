"""The command line. This file holds the group and what every command does with an error; a command is one file.

Exit codes: 0 done, 2 bad input (one line on stderr that names the input and the remedy), 1 anything else.
`REFRESHKV_DEBUG=1` adds the traceback to a failure.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import traceback
import warnings
from typing import Any

import click

from refreshkv import __version__
from refreshkv.cli.common import BadInput
from refreshkv.text import one_line, reason, visible
from refreshkv.weights import ModelFilesError

COMMANDS = (
    *("demo", "generate", "compare", "eval", "reproduce", "train", "bench", "serve", "models"),
    "info",
)


class LazyGroup(click.Group):
    """Loads a command's module when it is asked for, and turns every exception into a line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a newcomer's path, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of `refreshkv.cli.<name>`; by convention it is called `command` there."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"refreshkv.cli.{cmd_name}").command

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command line and exit with its code (return instead if not `standalone_mode`)."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            result = super().main(*args, standalone_mode=False, **extra)
            sys.stdout.flush()  # here a reader that has gone can be reported; at exit it no longer can
        except BaseException as error:
            sys.exit(report(error))
        sys.exit(result if isinstance(result, int) else 0)  # an int comes from --help and --version


def report(error: BaseException) -> int:
    """Say on stderr, in one line, what went wrong; return the exit code."""
    match error:
        case SystemExit() | GeneratorExit():
            raise error
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            return 2
        case click.UsageError():
            hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
            return say(error.format_message() + hint, 2)
        case click.ClickException():
            return say(error.format_message(), error.exit_code)
        case BadInput() | ModelFilesError():
            return say(str(error), 2)
        case click.Abort() | KeyboardInterrupt():
            return say("interrupted", 1)
        case BrokenPipeError() | OSError(errno=errno.ENOSPC):
            # Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader (`| head`) has gone, and knows it
                return 1
            return say(f"cannot write ({reason(error)}); make room, or give another place", 1)
    if os.environ.get("REFRESHKV_DEBUG", "0") not in ("", "0"):
        trace = "".join(traceback.format_exception(error))
        click.echo(visible(trace, keep="\n"), err=True, nl=False)
    return say(f"{type(error).__name__}: {error} (REFRESHKV_DEBUG=1 shows the traceback)", 1)


def say(message: str, code: int) -> int:
    """Print one line, whatever the message looks like, and hand back `code`."""
    with contextlib.suppress(OSError):  # stderr may be as full as stdout; the code says it too
        click.echo(f"refreshkv: error: {one_line(message)}", err=True)
    return code


def note(message: object) -> str:
    """A warning of a library, in one line."""
    return f"refreshkv: note: {one_line(str(message))}\n"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """RefreshKV: decode over a small partial KV cache, and refresh it from the full one."""


def main() -> None:
    """Entry point of the console script."""
    # Files that are opened later must not take the numbers of streams that are closed (`2>&-`), which are None here.
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    if sys.stderr is None:
        sys.stderr = os.fdopen(handle, "w")
    else:
        os.close(handle)
    if sys.stdout is None:
        sys.exit(say("stdout is closed; give the output a place, /dev/null if none is wanted", 2))
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character of the model's text gets a '?', not a crash.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: note(message)
    cli.main(prog_name="refreshkv")
