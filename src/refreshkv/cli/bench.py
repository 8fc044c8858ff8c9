"""`refreshkv bench`: timings. The measuring is done by `refreshkv.bench`; this file names the options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from refreshkv.cli import bench_view as view
from refreshkv.cli import common

MOST = 2**27  # of whatever is counted: products of such numbers still fit the machine's
RESULTS = Path("benchmarks/results")  # of a checkout


@click.group("bench", short_help="Timings: decode, kernels, scale; a plan for other machines.")
def command() -> None:
    """Timings, each checked for correct results before it is taken."""


class Numbers(click.ParamType):
    """`8192,32768`: positive integers, at least one."""

    name = "a,b"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The integers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1 or max(numbers) > MOST:
            self.fail(
                f"{value!r} is no list of integers from 1 to {MOST} such as 8192,32768", param, ctx
            )
        return numbers


class Sizes(click.ParamType):
    """`1x32768,8x32768`: rows x context."""

    name = "BxN,.."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[tuple[int, int]]:
        """Pairs `(batch, context)`."""
        try:
            pairs = [tuple(int(part) for part in one.split("x")) for one in value.split(",")]
        except ValueError:
            pairs = []
        if not pairs or any(len(pair) != 2 or min(pair) < 1 or max(pair) > MOST for pair in pairs):
            self.fail(
                f"{value!r} is no list of rows x context such as 1x32768,8x32768, each at most {MOST}",
                param,
                ctx,
            )
        return [(batch, context) for batch, context in pairs]


def options_of(*options: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds options in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def at_least(least: int, default: int, help: str) -> dict[str, Any]:
    """Settings of an option that is an integer."""
    return {
        "type": common.count(least, MOST),
        "default": default,
        "show_default": True,
        "help": help,
    }


shape_option = click.option(
    "--shape",
    default="llama-3.2-1b",
    show_default=True,
    help="A model shape, or 'demo'; random weights.",
)
sizes_options = options_of(
    click.option("--context", **at_least(1, 8192, "Tokens in the cache.")),
    click.option("--batch", **at_least(1, 1, "Rows.")),
    click.option(
        "--sizes",
        type=Sizes(),
        help="Several rows x context in one run, instead of --batch and --context: 1x32768,8x32768.",
    ),
)
machine_options = options_of(
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
    ),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        default="bfloat16",
        show_default=True,
    ),
    common.threads_option,
    click.option(
        "--results",
        type=common.PathName(file=True),
        help="The CSV file to append to.  [default: one in benchmarks/results, where that folder is]",
    ),
    click.option("--no-record", is_flag=True, help="Append to no file."),
    click.option(
        "--plot",
        type=common.PathName(file=True),
        help="Write a PNG: milliseconds over bytes. Needs the extra 'eval'.",
    ),
    common.progress_option,
    common.json_option,
)
budget_option = click.option(
    "--budget", type=common.Budget(), default="0.125", show_default=True, help="As in `generate`."
)
stride_option = click.option(
    "--stride",
    type=common.STRIDE,
    default="10",
    show_default=True,
    help="Of the mix: fixed, or 'never'.",
)
draft_option = click.option("--draft", **at_least(1, 8, "Tokens that each lossless cycle drafts."))
acceptance_option = click.option(
    "--acceptance",
    type=float,
    default=0.85,
    show_default=True,
    help="Mean share of them that stands, as measured on text; a full pass yields 1 + draft * acceptance tokens.",
)


@command.command("decode")
@shape_option
@sizes_options
@budget_option
@stride_option
@draft_option
@acceptance_option
@click.option("--steps", **at_least(1, 20, "Timed steps of each variant."))
@click.option("--cycles", **at_least(1, 4, "Timed cycles of the lossless mode."))
@click.option(
    "--static/--growing", default=None, help="The form of our cache.  [default: static on a GPU]"
)
@click.option("--compiled", is_flag=True, help="Compile our steps, on the static form.")
@click.option(
    "--skip",
    metavar="A,B",
    default="",
    help="Variants to leave out; 'default' is slow on long contexts.",
)
@machine_options
def decode(
    context: int,
    batch: int,
    sizes: list[tuple[int, int]] | None,
    stride: int | str,
    skip: str,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Milliseconds per decoded token: RefreshKV in every mode, eviction, and transformers' caches.

    A mix is what a fixed stride costs: its share of full steps with re-selection, the rest partial.
    """
    from refreshkv.bench import decode as bench

    given = prepare("decode", plot, **options)
    names = tuple(name.strip() for name in skip.split(",") if name.strip())
    found: list[Mapping[str, Any]] = []

    def show(record: Mapping[str, Any]) -> None:
        found.append(record)
        view.decode(record)

    with common.bad_input():
        bench.run_sizes(
            sizes or [(batch, context)], show, **given, stride=fixed(stride), skip=names
        )
    last = found[-1]
    if plot is not None:
        points = {name: (size, last["ms"][name]) for name, size in last["bytes"].items()}
        draw(plot, last, points)
    if as_json:
        common.emit_json(last if sizes is None else {"runs": found, **last})


@command.command("kernels")
@shape_option
@sizes_options
@budget_option
@draft_option
@click.option("--repeats", **at_least(1, 20, "Timed turns of each kernel."))
@machine_options
def kernels(
    context: int,
    batch: int,
    sizes: list[tuple[int, int]] | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Milliseconds of each kernel on one layer, with cold caches, against torch and whatever else is installed."""
    from refreshkv.bench import kernels as bench

    given = prepare("kernels", plot, **options)
    found = []
    for rows, tokens in sizes or [(batch, context)]:
        with common.bad_input():
            found.append(bench.run(**given, batch=rows, context=tokens))
        view.kernels(found[-1])
    last = found[-1]
    if plot is not None:
        draw(plot, last, {one["kernel"]: (one["bytes"], one["ms"]) for one in last["kernels"]})
    if as_json:
        common.emit_json(last if sizes is None else {"runs": found, **last})


@command.command("scale")
@shape_option
@click.option("--contexts", type=Numbers(), default="1024,2048,4096,8192", show_default=True)
@click.option("--batches", type=Numbers(), default="1,2,4", show_default=True)
@click.option("--budgets", type=Numbers(), default="256,512,1024", show_default=True)
@click.option("--strides", type=Numbers(), default="10,2,5,20", show_default=True)
@click.option("--steps", **at_least(1, 10, "Timed steps of each variant."))
@machine_options
def scale(plot: Path | None, as_json: bool, **options: Any) -> None:
    """How the cost of a step grows: ms = a + b * bytes, fitted.

    The first value of each list is the base; one list at a time is varied.
    """
    from refreshkv.bench import scale as bench

    given = prepare("scale", plot, **options)
    with common.bad_input():
        record = bench.run(**given)
    view.scale(record)
    if plot is not None:
        from refreshkv.bench import plots

        plots.scale(plot, record)
    if as_json:
        common.emit_json(record)


@command.command("plan")
@click.option(
    "--model",
    default="llama-3.1-8b",
    show_default=True,
    help="A shape of `bench decode`, a folder with a config.json, or a Hub id.",
)
@click.option("--context", **at_least(1, 131072, "Tokens in the cache."))
@click.option("--batch", **at_least(1, 1, "Rows."))
@budget_option
@stride_option
@draft_option
@acceptance_option
@click.option("--device", default="h200", show_default=True, help="h100, h200, a100 or b200.")
@click.option(
    "--bandwidth", type=common.Finite(1e-3, 1e9), help="GB a second, instead of the data sheet's."
)
@click.option(
    "--fixed-ms",
    type=common.Finite(0, 1e9),
    default=0.0,
    show_default=True,
    help="What a pass costs beside its bytes, as `bench scale` fits it.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
)
@click.option(
    "--check",
    type=common.PathName(file=True, there=True),
    help="Instead: what the model says of the rows of a CSV file of `bench decode`, and its error.",
)
@common.json_option
def plan(model: str, dtype: str, check: Path | None, as_json: bool, **options: Any) -> None:
    """Speed-up and memory on a machine that is not here, by the bytes that have to move."""
    from refreshkv.cli import bench_plan

    record = bench_plan.checked(check) if check else bench_plan.planned(model, dtype, **options)
    (view.plan_check if check else view.plan)(record)
    if as_json:
        common.emit_json(record)


def fixed(stride: int | str) -> int | None:
    """The stride, `None` for never."""
    return None if stride == common.STRIDE.word else int(stride)


def prepare(
    kind: str,
    plot: Path | None,
    *,
    device: str,
    results: Path | None,
    no_record: bool,
    progress: bool | None,
    **options: Any,
) -> dict[str, Any]:
    """The options as the benchmarks take them. What would be missing at the end is missed now.

    Raises:
        BadInput: a device that is not there, a plot that cannot be drawn.
    """
    from refreshkv.cli.loading import pick_device, quiet

    quiet()
    place = str(pick_device(device))
    if plot is not None:
        from refreshkv.bench import plots

        try:
            plots.check()
        except ModuleNotFoundError as error:
            raise common.BadInput(str(error)) from error
        if not plot.parent.is_dir():
            raise common.BadInput(f"--plot {plot}: there is no folder {plot.parent}; make it first")
    if no_record:
        results = None
    elif results is None and RESULTS.is_dir():
        results = RESULTS / f"{kind}-{place.split(':')[0]}.csv"
    shown = sys.stderr.isatty() if progress is None else progress
    return {**options, "device": place, "results": results, "progress": shown}


def draw(plot: Path, record: Mapping[str, Any], points: Mapping[str, tuple[float, Any]]) -> None:
    """The roofline of a run, of what was timed in it."""
    from refreshkv.bench import plots

    title = f"{record['shape']}, {record['batch']} x {record['context']}, K {record['budget']}, {record['dtype']}"
    timed = {name: point for name, point in points.items() if point[1] is not None}
    plots.roofline(plot, title, timed, record["bandwidth"])
