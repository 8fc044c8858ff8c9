"""`refreshkv reproduce`: the paper's tables on a model, beside the paper's numbers."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refreshkv.cli import common, loading
from refreshkv.cli.common import BadInput
from refreshkv.cli.eval import NEEDED, eval_errors, in_threads, names_in, run_errors

if TYPE_CHECKING:
    from refreshkv.evals.launch import Team
    from refreshkv.reproduce.jobs import Job, Request
    from refreshkv.reproduce.tables import Table

PLANS = ("machine", "bandwidth", "flops", "fixed_ms")  # options of --dry-run
PROBLEMS = ("budget", "max_new_tokens")  # options of --reasoning


@click.command("reproduce", short_help="The paper's tables on your model, beside the paper's.")
@click.argument("table", required=False)
@click.option("--model", help=common.MODEL_HELP)
@click.option(
    "--out", type=common.PathName(), help="Folder of the table; an existing one is gone on with."
)
@click.option(
    "--small", is_flag=True, help="Short prompts, few examples, made-up texts: shows that it runs."
)
@click.option("--dry-run", is_flag=True, help="Say what it would take, from the config alone.")
@click.option(
    "--reasoning", is_flag=True, help="Instead of a table: problems of mathematics, long outputs."
)
@click.option(
    "--trained",
    type=common.PathName(there=True),
    metavar="DIR",
    help="What 'refreshkv train' wrote, for the columns after training.",
)
@click.option("--only", metavar="A,B", help="Columns to run; --list names them.  [default: all]")
@click.option(
    "--data",
    "given",
    metavar="NAME=PATH",
    multiple=True,
    help="Texts of your own in the place of a data set; may be repeated. --list names them.",
)
@click.option(
    "--beside",
    type=click.Choice(["llama", "qwen"]),
    help="Whose numbers of the paper to show.  [default: the model's family]",
)
@click.option(
    "--limit", type=common.count(most=10**6), help="Examples a task.  [default: the paper's]"
)
@click.option("--seed", type=common.SEED, default=0, show_default="0")
@click.option(
    "--batch",
    type=common.count(most=2**16),
    help="Examples decoded at once; changes no result.  [default: 8 for the bundled model, else 1]",
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Wrap prompts in the model's chat template.  [default: with --reasoning, where there is one]",
)
@click.option("--budget", type=common.Budget(), help="K, with --reasoning.  [default: 1024]")
@click.option(
    "--max-new-tokens",
    type=common.count(most=2**20),
    help="Where an output is cut off, with --reasoning.  [default: 16384]",
)
@loading.dtype_option
@loading.device_option
@common.threads_option
@loading.trust_option
@click.option("--machine", help="Of --dry-run: a100, h100, h200 or b200.  [default: a100]")
@click.option(
    "--bandwidth",
    type=common.Finite(1e-3, 1e9),
    help="Of --dry-run: GB a second, instead of the data sheet's.",
)
@click.option(
    "--flops",
    type=common.Finite(1e-6, 1e9),
    help="Of --dry-run: TFLOP a second, instead of the data sheet's.",
)
@click.option(
    "--fixed-ms",
    type=common.Finite(0, 1e9),
    help="Of --dry-run: what a step costs beside its bytes.  [default: 20]",
)
@click.option("--list", "listing", is_flag=True, help="Print the tables and their data, and exit.")
@common.progress_option
@common.json_option
def command(
    table: str | None,
    model: str | None,
    out: Path | None,
    dry_run: bool,
    reasoning: bool,
    listing: bool,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    progress: bool | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure what a table of the paper measures, and write it beside the paper's numbers: table.md, .csv and .json.

    TABLE is a number or a name; --list has both. The same command goes on where it was stopped.
    """
    from refreshkv.cli import reproduce_view as view
    from refreshkv.reproduce import paper

    if listing:
        return view.show_list(as_json)
    chosen = pick(table, reasoning)
    if not model:
        raise click.UsageError("Missing option '--model'.")
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    for names, where, wanted in (
        (PLANS, "--dry-run", dry_run),
        (PROBLEMS, "--reasoning", reasoning),
    ):
        for name in names:
            if given[name] is not None and not wanted:
                flag = f"--{name.replace('_', '-')}"
                raise BadInput(f"{flag} without {where} has no effect; leave it out")
    config = config_of(model, dry_run, trust_remote_code)
    family = paper.family_of(config.model_type)
    with eval_errors():
        request = request_of(chosen, model, out or Path(), family, given)
    if request.trained is not None:
        config_of(request.trained, dry_run, trust_remote_code)
    if dry_run:
        return plan(request, config, dtype, given, as_json)

    from refreshkv.evals import launch
    from refreshkv.evals.summary import need
    from refreshkv.reproduce import comparison, jobs, notes, writing

    about = {
        **{"table": chosen.name, "model": model, "trained": request.trained},
        **{"small": request.small, "seed": request.seed, "beside": given["beside"] or family},
    }
    with eval_errors():
        made = jobs.make_jobs(request)
        for module in NEEDED:
            need(module)
        writing.check(request.out, about)
        if device == "auto" and launch.on_cpu():
            device = "cpu"
        team = launch.join(cpu=device == "cpu")
        if team.is_main:
            make_data(request, made)
        team.wait()
    with in_threads(threads):
        for trained in (False, True):
            own = [job for job in made if job.measure.trained == trained]
            if own:
                dtype = run(
                    request, own, dtype, device, trust_remote_code, given["chat"], team, progress
                )
    if team.is_main:
        beside = about["beside"] or paper.LLAMA
        with eval_errors():
            found = comparison.cells(request, beside)
            lines = notes.lines(request, config, beside, found)
            columns = {one.name: notes.of_column(request, one) for one in chosen.columns}
            writing.write(request.out, about, chosen, lines, columns, found)
        view.show(chosen, lines, columns, found, request.out)
        if as_json:
            common.emit_json({"out": str(out), **about, "notes": lines, "cells": found})
    team.leave()


def pick(table: str | None, reasoning: bool) -> Table:
    """The table that is asked for. Raises `BadInput` where it is none, or two."""
    from refreshkv.reproduce import tables

    if table is not None and reasoning:
        raise BadInput("--reasoning stands in the place of a table; leave one of them out")
    if reasoning:
        return tables.REASONING
    if table is None:
        raise click.UsageError("Missing argument 'TABLE'.")
    with common.bad_input():
        return tables.find(table)


def config_of(model: str, dry_run: bool, trust_remote_code: bool) -> Any:
    """The config of a model that is supported; for a plan also of a shape of `bench decode`.

    Raises:
        BadInput: no such model, or one that is not supported.
    """
    from refreshkv.bench.shapes import SHAPES
    from refreshkv.bench.shapes import config_of as config_of_shape
    from refreshkv.cli.locate import locate

    if dry_run and model in SHAPES and model != "demo":
        return config_of_shape(model)
    config, support = loading.load_config(
        locate(model, need_weights=not dry_run), trust_remote_code
    )
    if not support.ok and not (trust_remote_code and getattr(config, "auto_map", None)):
        raise BadInput(f"model {model!r} is not supported: {support.reason}")
    return config


def request_of(
    table: Table, model: str, out: Path, family: str | None, given: dict[str, Any]
) -> Request:
    """The request. Raises `ValueError` for data or columns that are none."""
    from refreshkv.reproduce.jobs import Request

    data = {}
    for one in given["given"]:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise BadInput(f"--data {one!r} is not NAME=PATH, for example arxiv=documents.jsonl")
        data[name] = path
    trained = given["trained"]
    if trained is not None:
        if not any(m.trained for column in table.columns for m in column.measures):
            raise BadInput(f"--trained has no effect in {table.title}; leave it out")
        from refreshkv.training.data import TEST
        from refreshkv.training.folder import MODEL
        from refreshkv.training.run import DATA

        test = trained / DATA / TEST  # what the training has kept apart
        if test.is_file():
            data.setdefault("arxiv", str(test))
        if not (trained / "config.json").is_file() and (trained / MODEL).is_dir():
            trained = trained / MODEL
    return Request(
        table=table,
        out=out,
        model=model,
        trained=None if trained is None else str(trained),
        family=family,
        data=data,
        only=names_in(given["only"], "--only") if given["only"] is not None else (),
        batch=given["batch"] or (8 if model == "demo" else 1),
        **{name: given[name] for name in ("small", "limit", "seed", *PROBLEMS)},
    )


def make_data(request: Request, made: Sequence[Job]) -> None:
    """The texts of small forms. Raises `BadInput` for a folder that cannot be written, `RunError` for a full disk."""
    from refreshkv.evals.store import cannot_write
    from refreshkv.reproduce.jobs import make_data
    from refreshkv.text import reason

    try:
        make_data(request, made)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise cannot_write(request.out, error) from error
        raise BadInput(
            f"'{request.out}' cannot be written ({reason(error)}); use another --out"
        ) from error


def plan(request: Request, config: Any, dtype: str, given: dict[str, Any], as_json: bool) -> None:
    """What it would take."""
    import torch

    from refreshkv.bench.plan import device_of
    from refreshkv.bench.shapes import outline
    from refreshkv.cli import reproduce_view as view
    from refreshkv.reproduce import estimate, jobs

    name = given["machine"] or "a100"
    with common.bad_input():
        bandwidth, flops = given["bandwidth"], given["flops"]
        machine = device_of(name, None if bandwidth is None else bandwidth * 1e9)
        if flops is not None:
            machine = dataclasses.replace(machine, flops=flops * 1e12)
        request = dataclasses.replace(request, data={**jobs.placeholders(request), **request.data})
        made = jobs.make_jobs(request)
    kind = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None)
    model = outline(config, kind or torch.bfloat16)
    fixed = estimate.FIXED_MS if given["fixed_ms"] is None else given["fixed_ms"]
    found = estimate.costs(model, made, request, machine, fixed)
    assumed = {"machine": name, **dataclasses.asdict(machine), "fixed_ms": fixed}
    view.show_plan(request, found, assumed, str(model.dtype).removeprefix("torch."))
    if as_json:
        common.emit_json(
            {"table": request.table.name, "model": request.model, **assumed, "costs": found}
        )


def run(
    request: Request,
    made: Sequence[Job],
    dtype: str,
    device: str,
    trust_remote_code: bool,
    chat: bool | None,
    team: Team,
    progress: bool | None,
) -> str:
    """The runs of one model; returns its dtype, which another is to have too."""
    from refreshkv.evals.runner import Run
    from refreshkv.reproduce.jobs import matched
    from refreshkv.reproduce.tables import REASONING

    name = made[0].grid.model
    loaded = loading.load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if chat is None and request.table is REASONING:
        chat = bool(getattr(loaded.tokenizer, "chat_template", None))

    def bar(total: int) -> Any:
        return common.progress_bar(total, "example", progress)

    def ready(job: Job) -> Run:
        try:
            with eval_errors():
                grid = dataclasses.replace(job.grid, chat=bool(chat))
                return Run(loaded.model, loaded.tokenizer, grid, job.folder, team=team)
        except BadInput as error:
            raise BadInput(f"column {job.column.name}: {error}") from error

    def decode(run: Run) -> None:
        with run, run_errors():
            run.decode(bar)
            run.finish()
            team.wait()

    with ExitStack() as stack:
        # What any of them lacks is said before the first token.
        runs = [stack.enter_context(ready(job)) for job in made]
        for job, one in zip(made, runs, strict=True):
            decode(one)
            with eval_errors():
                more = matched(request, job)
            if more is not None:
                decode(ready(more))
    return str(loaded.model.dtype).removeprefix("torch.")
