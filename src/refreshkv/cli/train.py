"""`refreshkv train`: continued pre-training with a partial cache at the end of each sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refreshkv.cli import common, loading, settings
from refreshkv.cli.common import BadInput
from refreshkv.cli.eval import NEEDED, eval_errors, in_threads, names_in, run_errors
from refreshkv.training.recipe import Recipe

if TYPE_CHECKING:
    from refreshkv.evals.summary import Summary

HOW = ("optimizer", "checkpointing", "log_every", "save_every")  # a run's, and not its recipe's


def recipe_options(command: settings.Command) -> settings.Command:
    """One option a setting of the recipe, with its default; those that need more than a name are the command's."""
    for one in reversed(dataclasses.fields(Recipe)):
        if one.name not in ("model", "data", "config"):
            add = settings.option(one.name, Recipe, default=one.default, show_default=True)
            command = add(command)
    return command


@click.command("train", short_help="Continued pre-training with a partial cache.")
@click.option("--model", required=True, help=common.MODEL_HELP)
@click.option(
    "--data",
    required=True,
    help='A folder of text files, a text file, JSONL with "text", or of the hub: arxiv, books, pg19,'
    " hub:owner/name[/split].",
)
@click.option(
    "--out",
    type=common.PathName(),
    required=True,
    help="Folder of the run; the same command goes on where it was stopped.",
)
@click.option(
    "--budget",
    type=common.Budget(),
    help="K, of each KV head.  [default: 2048; in --mode mixed 0.05]",
)
@click.option(
    "--mode",
    type=click.Choice(["refresh", "mixed"]),
    default="refresh",
    show_default=True,
    help="What the tail is trained for.",
)
@click.option(
    "--stride",
    type=common.STRIDE,
    help="Refresh inside the tail, every so many tokens.  [default: never]",
)
@recipe_options
@click.option(
    "--optimizer",
    help="A name of transformers' TrainingArguments.  [default: adamw_8bit with a GPU and bitsandbytes, else"
    " adamw_torch]",
)
@click.option(
    "--checkpointing", is_flag=True, help="Compute activations twice instead of keeping them."
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the arithmetic; weights are float32.  auto: bfloat16 on a GPU.",
)
@click.option(
    "--log-every",
    type=common.count(),
    default=10,
    show_default=True,
    help="Steps between lines of metrics.",
)
@click.option(
    "--save-every",
    type=common.count(),
    default=100,
    show_default=True,
    help="Steps between checkpoints, with a validation each.",
)
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    show_default=True,
    help="Perplexity of the tail before and after.",
)
@click.option("--methods", metavar="X,Y", help="Of the evaluation.  [default: the paper's]")
@click.option(
    "--limit",
    type=common.count(),
    default=20,
    show_default=True,
    help="Documents of the evaluation.",
)
@loading.device_option
@common.threads_option
@loading.trust_option
@common.progress_option
@common.json_option
def command(
    model: str,
    out: Path,
    budget: int | float | None,
    mode: str,
    stride: int | str | None,
    precision: str,
    evaluate: bool,
    methods: str | None,
    limit: int,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    progress: bool | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a model so that it loses less to a partial cache, by the paper's recipe.

    The last tokens of each sequence attend to what the token before them selects. Writes checkpoints, metrics.jsonl and
    the trained model. Under `accelerate launch` several processes share the work.
    """
    # What can be checked without the model is checked first.
    from refreshkv.config import RefreshConfig
    from refreshkv.evals import launch
    from refreshkv.evals.summary import need
    from refreshkv.training import evaluation

    if budget is None:
        budget = 2048 if mode == "refresh" else 0.05
    config: dict[str, Any] = {"mode": mode, "budget": budget}
    if mode == "refresh":
        config["stride"] = None if stride in (None, "never") else stride
        if config["stride"] is not None:
            config["threshold"] = None
    elif stride is not None:
        raise BadInput("--stride has no effect in --mode mixed; leave it out")
    how = {name: given.pop(name) for name in HOW}
    with eval_errors():
        recipe = Recipe(model=model, config=RefreshConfig(**config), **settings.said(given))
        named = names_in(methods, "--methods") if methods else evaluation.METHODS
        asked = evaluation.grid(recipe, out, named, limit) if evaluate else None
        for module in ("accelerate", *(NEEDED if evaluate else ())):
            need(module)
        if device == "auto" and launch.on_cpu():
            device = "cpu"
        team = launch.join(cpu=device == "cpu")
    loaded = loading.load(
        model, dtype="float32", device=device, trust_remote_code=trust_remote_code
    )
    if precision == "auto":
        precision = "bfloat16" if loaded.model.device.type == "cuda" else "float32"

    from refreshkv.training.run import Run

    def bar(total: int) -> Any:
        return common.progress_bar(total, "example", progress)

    before: list[Summary] = []
    after: list[Summary] = []
    with in_threads(threads):
        with eval_errors():
            run = Run(
                loaded.model,
                loaded.tokenizer,
                recipe,
                out,
                team=team,
                bfloat16=precision == "bfloat16",
                **how,
            )
            if asked is not None:
                before = evaluation.evaluate(
                    loaded.model, loaded.tokenizer, asked, out / "before", team, bar
                )
        with contextlib.closing(common.progress_bar(0, "step", progress)) as steps, run_errors():
            folder = run.train(functools.partial(_show, steps))
        if asked is not None:
            trained = loading.load(str(folder), dtype="float32", device=device)
            with eval_errors():
                after = evaluation.evaluate(
                    trained.model, trained.tokenizer, asked, out / "after", team, bar
                )
    if team.is_main:
        if asked is not None:
            show(before, after)
        click.echo(f"Model: {folder}")
        if as_json:
            common.emit_json(
                {"out": str(out), "model": str(folder), "before": before, "after": after}
            )
    team.leave()


def _show(bar: Any, done: int, total: int) -> None:
    """The bar learns how many steps there are when the first is done."""
    bar.total = total
    bar.update(done - bar.n)


def show(before: Sequence[Summary], after: Sequence[Summary]) -> None:
    """A row a method: perplexities, and what of them is lost to full attention, in nats a token."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "before", "after", "loss beside full", "after"):
        table.add_column(heading, overflow="fold")
    for old, new in zip(before, after, strict=True):
        lost = ("-" if row.ratio is None else f"{math.log(row.ratio):+.4f}" for row in (old, new))
        table.add_row(old.method, f"{old.score:.4f}", f"{new.score:.4f}", *lost)
    common.console().print(table)
