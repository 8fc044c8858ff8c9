"""`refreshkv demo`: the bundled model on long prompts, six methods side by side; or one of its prompts."""

from __future__ import annotations

import click
from click.core import ParameterSource

from refreshkv.cli import common, settings
from refreshkv.cli.common import BadInput


@click.command("demo", short_help="The bundled model on long prompts, six methods side by side.")
@click.option(
    "--length",
    type=common.count(most=2**20),
    default=2048,
    show_default=True,
    help="Tokens of a prompt, about.",
)
@settings.option("budget", default="0.125", show_default=True)
@click.option("--tasks", "names", metavar="A,B", help="Some of the tasks.  [default: all]")
@click.option("--seed", type=common.SEED, default=0, show_default=True, help="Of the first prompt.")
@click.option(
    "--examples",
    type=common.count(most=10**4),
    default=4,
    show_default=True,
    help="Prompts per task.",
)
@click.option(
    "--print-prompt",
    metavar="TASK",
    help="Print one prompt, to pipe into `generate`, and do nothing else.",
)
@common.progress_option
@common.json_option
@click.pass_context
def command(
    context: click.Context,
    length: int,
    budget: int | float,
    names: str | None,
    seed: int,
    examples: int,
    print_prompt: str | None,
    progress: bool | None,
    as_json: bool,
) -> None:
    """The bundled model on long prompts: full attention, StreamingLLM, SnapKV and RefreshKV side by side.

    Every line of an answer needs another look at the prompt. A cache that was cut down once, for good, fails where the
    answer is long; one that is refreshed often enough does not. Runs offline on two CPU cores in about a minute.
    """
    from refreshkv.demo import prompts

    if print_prompt is not None:
        reject_given(context, "as_json", "names", "budget", "examples")
        with common.bad_input():
            prompt = prompts.make_prompt(print_prompt, seed, length).prompt
        # As bytes: the last newline is part of it, and nothing may be added or translated.
        click.echo(prompt.encode("utf-8"), nl=False)
        return

    import refreshkv
    from refreshkv.cli import side_by_side, side_by_side_view

    chosen = parse_tasks(names)
    side_by_side.check_room(length)
    with common.bad_input():
        asked = [
            side_by_side.Asked(
                prompts.demo_task(task, length), number, prompts.make_prompt(task, number, length)
            )
            for task in chosen
            for number in range(seed, seed + examples)
        ]
        refreshkv.make_config(budget=budget)
    bar = common.progress_bar(len(asked) * len(side_by_side.METHODS), "answer", progress)
    with bar:
        report = side_by_side.run(asked, budget, bar)
    if as_json:
        about = {"length": length, "budget": budget, "seed": seed, "examples": examples}
        results = {"results": report.rows, "shown": report.shown}
        common.emit_json({"model": "demo", **about, **results})  # see docs/cli.md
    else:
        side_by_side_view.show(report, length)


def reject_given(context: click.Context, *parameters: str) -> None:
    """`--print-prompt` does one thing: an option that it would ignore is bad input."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in parameters and source is ParameterSource.COMMANDLINE:
            raise BadInput(
                f"--print-prompt prints a prompt and nothing else; leave out {parameter.opts[0]}"
            )


def parse_tasks(names: str | None) -> list[str]:
    """The tasks of `--tasks a,b`, each once."""
    from refreshkv.demo.prompts import TASKS

    if names is None:
        return list(TASKS)
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise BadInput(f"--tasks is empty; give some of {', '.join(TASKS)}, or leave it out")
    return chosen
