"""`refreshkv bench`: timings. The measuring is done by `refreshkv.bench`; this file names the options and prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from refreshkv.cli import common


@click.group("bench", short_help="Timings: decode, exact.")
def command() -> None:
    """Timings, each checked for correct results before it is taken."""


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every timing takes: the model's shape and dtype, the cache, the machine, where the record goes."""
    for option in reversed(
        (
            click.option(
                "--shape",
                default="llama-3.2-1b",
                show_default=True,
                help="A model shape, or 'demo'; random weights.",
            ),
            click.option(
                "--context",
                type=click.IntRange(min=1),
                default=8192,
                show_default=True,
                help="Tokens in the cache.",
            ),
            click.option(
                "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows."
            ),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
            ),
            click.option(
                "--dtype",
                type=click.Choice(["bfloat16", "float16", "float32"]),
                default="bfloat16",
                show_default=True,
            ),
            click.option(
                "--threads",
                type=click.IntRange(min=1),
                help="CPU threads.  [default: torch's choice]",
            ),
            click.option(
                "--results",
                type=click.Path(path_type=Path, dir_okay=False),
                help="A CSV file to append a row to.",
            ),
            common.progress_option,
            common.json_option,
        )
    ):
        command = option(command)
    return command


@command.command("decode")
@machine_options
@click.option(
    "--budget", type=common.Budget(), default="0.125", show_default=True, help="As in `generate`."
)
@click.option(
    "--stride",
    type=common.STRIDE,
    default="10",
    show_default=True,
    help="Of the mix: fixed, or 'never'.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Timed, of each variant.",
)
@click.option(
    "--skip",
    metavar="A,B",
    default="",
    help="Variants to leave out; 'default' is slow on long contexts.",
)
def decode(
    stride: int | str, device: str, skip: str, progress: bool | None, as_json: bool, **options: Any
) -> None:
    """Milliseconds per decode step, ours against transformers' caches.

    A mix is what a fixed stride costs: its share of full steps with re-selection, the rest partial.
    """
    from refreshkv.bench import decode as bench
    from refreshkv.cli.loading import pick_device, quiet

    quiet()
    with common.bad_input():
        record = bench.run(
            **options,
            stride=None if stride == common.STRIDE.word else stride,
            device=str(pick_device(device)),
            skip=_names(skip),
            progress=sys.stderr.isatty() if progress is None else progress,
        )
    if as_json:
        common.emit_json(record)
    else:
        settings = ("context", "batch", "budget", "stride", "dtype")
        show(record, {**bench.VARIANTS, **bench.DERIVED}, settings)


@command.command("exact")
@machine_options
@click.option(
    "--budget", type=common.Budget(), default="0.0625", show_default=True, help="As in `generate`."
)
@click.option(
    "--draft",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="Tokens that each cycle drafts.",
)
@click.option(
    "--tokens-per-pass",
    type=float,
    required=True,
    help="Mean tokens that a full pass yields, from 1 to the drafts and one; measured on text elsewhere.",
)
@click.option(
    "--cycles",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Timed, of each variant.",
)
@click.option("--skip", metavar="A,B", default="", help="Variants to leave out: 'static'.")
def exact(device: str, skip: str, progress: bool | None, as_json: bool, **options: Any) -> None:
    """Milliseconds per token of the lossless mode, against full attention.

    A cycle drafts, verifies in one full pass, and commits as many tokens as the mean that is given asks for.
    """
    from refreshkv.bench import exact as bench
    from refreshkv.cli.loading import pick_device, quiet

    quiet()
    with common.bad_input():
        record = bench.run(
            **options,
            device=str(pick_device(device)),
            skip=_names(skip),
            progress=sys.stderr.isatty() if progress is None else progress,
        )
    settings = ("context", "batch", "budget", "draft", "tokens_per_pass", "dtype")
    show(record, {**bench.VARIANTS, **bench.DERIVED}, settings)
    if as_json:
        common.emit_json(record)


def _names(given: str) -> tuple[str, ...]:
    """`a, b` -> `("a", "b")`."""
    return tuple(name.strip() for name in given.split(",") if name.strip())


def show(record: Mapping[str, Any], meaning: Mapping[str, str], settings: Sequence[str]) -> None:
    """A table of milliseconds under the `settings` of the record, then the ratios."""
    from rich import box
    from rich.table import Table

    where = ", ".join(f"{name.replace('_', ' ')} {record[name]}" for name in settings)
    table = Table(
        title=f"{record['shape']}, {where}\n{record['device']}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("variant")
    table.add_column("ms, median", justify="right")
    table.add_column("range", justify="right")
    table.add_column("what")
    for name, milliseconds in record["ms"].items():
        ends = record["ms_range"].get(name)
        spread = "" if ends is None else f"{ends[0]:.2f} - {ends[1]:.2f}"
        table.add_row(
            name,
            "-" if milliseconds is None else f"{milliseconds:.2f}",
            spread,
            meaning[name],
        )
    console = common.console()
    console.print(table)
    for name, ratio in record["ratios"].items():
        console.print(f"  {name:<20} {'-' if ratio is None else f'{ratio:.3f}'}")
