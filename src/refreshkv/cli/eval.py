"""`refreshkv eval`: tasks under methods, one line of results an example, a summary and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from refreshkv.cli import common, loading
from refreshkv.cli.common import BadInput

NEEDED = ("scipy", "matplotlib", "jinja2")  # for the summary and the report, hours later


@click.command("eval", short_help="Tasks under methods: results, summary, report.")
@click.option("--model", help=common.MODEL_HELP)
@click.option("--tasks", metavar="A,B", help="Tasks or groups of tasks; --list names them.")
@click.option(
    "--methods",
    metavar="X,Y",
    help="Methods, each with settings where wanted: refreshkv:stride=10:threshold=none.",
)
@click.option(
    "--out", type=common.PathName(), help="Run directory; an existing one is gone on with."
)
@click.option(
    "--budget",
    type=common.Budget(),
    help="Of every method: 1024 tokens, or 0.125 of the prompt.  [default: the method's own: 0.0625 for refreshkv,"
    " 0.125 for the others]",
)
@click.option(
    "--limit", type=common.count(most=10**6), help="Examples a task.  [default: the task's]"
)
@click.option("--seed", type=common.SEED, default=0, show_default="0")
@click.option(
    "--length",
    type=common.count(most=2**20),
    default=2048,
    show_default=True,
    help="Prompt tokens, in every task that has this setting.",
)
@click.option(
    "--task-option",
    "options",
    metavar="TASK.NAME=VALUE",
    multiple=True,
    help="Another setting of a task; may be repeated. --describe lists them.",
)
@click.option(
    "--batch",
    type=common.count(most=2**16),
    help="Examples decoded at once; changes no result.  [default: 8 for the bundled model, else 1]",
)
@click.option(
    "--mode",
    type=click.Choice(["free", "forced", "both"]),
    default="free",
    show_default=True,
    help="'forced' feeds the right answer, where there is one, and asks what the model would have said.",
)
@click.option("--chat", is_flag=True, help="Wrap prompts in the model's chat template.")
@loading.dtype_option
@loading.device_option
@common.threads_option
@loading.trust_option
@click.option("--describe", metavar="TASK", help="Print a task's recipe and settings, and exit.")
@click.option("--list", "listing", is_flag=True, help="Print all tasks and methods, and exit.")
@common.progress_option
@common.json_option
def command(
    model: str | None,
    tasks: str | None,
    methods: str | None,
    out: Path | None,
    length: int,
    options: tuple[str, ...],
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    describe: str | None,
    listing: bool,
    progress: bool | None,
    as_json: bool,
    **grid: Any,
) -> None:
    """Run tasks under methods, and write results.jsonl, summary.csv and report.html into a run directory.

    The same command goes on where it was stopped. Tasks, methods and examples can be added to a directory later. Under
    `accelerate launch` several processes share the work.
    """
    from refreshkv.cli import eval_view as view

    if listing:
        return view.show_list(as_json)
    if describe is not None:
        with common.bad_input():
            return view.show_task(describe, as_json)
    for name, value in (("model", model), ("tasks", tasks), ("methods", methods), ("out", out)):
        if not value:
            raise click.UsageError(f"Missing option '--{name}'.")

    # What can be checked without the model is checked first: a large one takes minutes to load.
    from refreshkv.cli.task_options import make_tasks
    from refreshkv.evals import launch
    from refreshkv.evals.grid import Grid, parse_methods
    from refreshkv.evals.summary import need

    grid["batch"] = grid["batch"] or (8 if model == "demo" else 1)
    with eval_errors():
        asked = Grid(
            model=model,
            tasks=make_tasks(names_in(tasks, "--tasks"), length, options),
            methods=parse_methods(names_in(methods, "--methods"), grid["budget"]),
            **grid,
        )
        for module in NEEDED:
            need(module)
        if device == "auto" and launch.on_cpu():
            device = "cpu"
        team = launch.join(cpu=device == "cpu")
    loaded = loading.load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    from refreshkv.evals.runner import Run

    def bar(total: int) -> Any:
        return common.progress_bar(total, "example", progress)

    with in_threads(threads):
        with eval_errors():
            ready = Run(loaded.model, loaded.tokenizer, asked, out, team=team)
        with ready, run_errors():
            ready.decode(bar)
            summaries = ready.finish()
    if team.is_main:
        view.show(summaries, out)
        if as_json:
            common.emit_json({"out": str(out), "results": summaries})
    team.leave()


def names_in(given: str, option: str) -> list[str]:
    """What an option lists between commas. Raises `BadInput` for nothing."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise BadInput(f"{option} names nothing; 'refreshkv eval --list' shows what there is")
    return names


@contextlib.contextmanager
def eval_errors() -> Iterator[None]:
    """Before anything is decoded: bad input, and packages that are missing."""
    with common.bad_input(), run_errors():
        try:
            yield
        except ModuleNotFoundError as error:
            if "pip install" not in str(error):
                raise
            raise BadInput(str(error)) from error


@contextlib.contextmanager
def run_errors() -> Iterator[None]:
    """A full disk and the like: one line, exit code 1."""
    from refreshkv.evals.store import RunError

    try:
        yield
    except RunError as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def in_threads(threads: int | None) -> Iterator[None]:
    """So many threads of the CPU for a while; `None`: as many as there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
