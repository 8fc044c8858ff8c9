"""`refreshkv bench`: timings. The measuring is done by `refreshkv.bench`; this file names the options."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from refreshkv.bench.job import Job
from refreshkv.cli import bench_view as view
from refreshkv.cli import common

MOST = 2**27  # of whatever is counted: products of such numbers still fit the machine's
RESULTS = Path("benchmarks/results")  # of a checkout
Option = Callable[[Callable[..., Any]], Callable[..., Any]]


@click.group(
    "bench", short_help="Timings: decode, kernels, generate, scale; a plan for other machines."
)
def command() -> None:
    """Timings, each checked for correct results before it is taken."""


class Numbers(click.ParamType):
    """`8192,32768`: positive integers, at least one; `each=2` pairs: `1x32768,8x32768`."""

    def __init__(self, each: int = 1) -> None:
        self.each, self.name = each, "a,b" if each == 1 else "BxN,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The integers, or tuples of them."""
        if isinstance(value, tuple):
            return value
        try:
            found = [tuple(map(int, one.split("x"))) for one in value.split(",")]
        except ValueError:
            found = []
        fit = [len(one) == self.each and min(one) >= 1 and max(one) <= MOST for one in found]
        if not fit or not all(fit):
            what = f"integers from 1 to {MOST} such as 8192,32768"
            if self.each > 1:
                what = f"rows x context such as 1x32768,8x32768, each at most {MOST}"
            self.fail(f"{value!r} is no list of {what}", param, ctx)
        return tuple(found) if self.each > 1 else tuple(one for (one,) in found)


COUNT, FILE = common.count(1, MOST), common.PathName(file=True)
DTYPES, DEVICES = ["bfloat16", "float16", "float32"], ["auto", "cpu", "cuda"]
# What options with a value take, and what they say.
OPTIONS: dict[str, tuple[Any, str]] = {
    "shape": (str, "A model shape, or 'demo'; random weights."),
    "model": (str, "A shape of `bench decode`, a folder with a config.json, or a Hub id."),
    "context": (COUNT, "Tokens in the cache."),
    "batch": (COUNT, "Rows."),
    "sizes": (
        Numbers(2),
        "Several rows x context in one run, instead of --batch and --context: 1x32768,8x32768.",
    ),
    "budget": (common.Budget(), "As in `generate`."),
    "stride": (common.STRIDE, "Of the mix: fixed, or 'never'."),
    "draft": (COUNT, "Tokens that each lossless cycle drafts."),
    "acceptance": (
        float,
        "Mean share of them that stands, as measured on text; a full pass yields 1 + draft * acceptance tokens.",
    ),
    "steps": (COUNT, "Timed steps of each variant."),
    "cycles": (COUNT, "Timed cycles of the lossless mode."),
    "repeats": (COUNT, "Timed turns of each kernel."),
    "new": (COUNT, "Tokens to generate."),
    "turns": (COUNT, "Timed turns of each variant."),
    "contexts": (Numbers(), "Tokens in the cache, the base first."),
    "batches": (Numbers(), "Rows."),
    "budgets": (Numbers(), "Tokens in the partial cache."),
    "strides": (Numbers(), "Of the mix."),
    "device": (click.Choice(DEVICES), "Where to run."),
    "dtype": (click.Choice(DTYPES), "Of weights and cache."),
    "bandwidth": (common.Finite(1e-3, 1e9), "GB a second, instead of the data sheet's."),
    "fixed_ms": (
        common.Finite(0, 1e9),
        "What a pass costs beside its bytes, as `bench scale` fits it.",
    ),
    "check": (
        common.PathName(file=True, there=True),
        "Instead: what the model says of the rows of a CSV file of `bench decode`, and its error.",
    ),
    "results": (
        FILE,
        "The CSV file to append to.  [default: one in benchmarks/results, where that folder is]",
    ),
    "plot": (FILE, "Write a PNG: milliseconds over bytes. Needs the extra 'eval'."),
}


def together(*parts: Option) -> Option:
    """A decorator that adds options in this order."""
    return lambda call: functools.reduce(lambda made, add: add(made), reversed(parts), call)


def options(names: str, **defaults: Any) -> Option:
    """Some of `OPTIONS`; the default is the one given here, else that of the field of `Job`, where there is one."""
    made = []
    for name in names.split():
        kind, said = OPTIONS[name]
        default = defaults.get(name, getattr(Job, name, None))
        shown = default is not None
        flag = f"--{name.replace('_', '-')}"
        made.append(click.option(flag, type=kind, default=default, show_default=shown, help=said))
    return together(*made)


_shared = together(
    options("device dtype", device="auto"),
    common.threads_option,
    options("results"),
    click.option("--no-record", is_flag=True, help="Append to no file."),
    common.progress_option,
    common.json_option,
)
timing = together(_shared, options("plot"))


def skip_option(example: str) -> Option:
    """Names, split at commas."""
    return click.option(
        "--skip",
        default="",
        metavar="A,B",
        callback=lambda context, parameter, value: tuple(
            name.strip() for name in value.split(",") if name.strip()
        ),
        help=f"Variants to leave out; {example}.",
    )


@command.command("decode")
@options("shape context batch sizes budget stride draft acceptance steps cycles")
@click.option(
    "--static/--growing", default=None, help="The form of our cache.  [default: static on a GPU]"
)
@click.option("--compiled", is_flag=True, help="Compile our steps, on the static form.")
@skip_option("'default' is slow on long contexts")
@timing
def decode(stride: int | str, **given: Any) -> None:
    """Milliseconds per decoded token: RefreshKV in every mode, eviction, and transformers' caches.

    A mix is what a fixed stride costs: its share of full steps with re-selection, the rest partial.
    """
    timed("decode", **given, stride=fixed(stride))


@command.command("kernels")
@options("shape context batch sizes budget draft repeats", repeats=20)
@timing
def kernels(repeats: int, **given: Any) -> None:
    """Milliseconds of each kernel on one layer, with cold caches, against torch and whatever else is installed."""
    timed("kernels", **given, steps=repeats)


@command.command("generate")
@options("shape context batch sizes new turns", new=64, turns=2)
@skip_option("'static' is compiled, which takes a minute or more")
@_shared
def generate(**given: Any) -> None:
    """Tokens per second of `generate` itself, in every mode as a user gets it, beside transformers' own caches.

    --shape bundled is the bundled model, on prompts of its own.
    """
    timed("generate", **given, plot=None)


@command.command("scale")
@options(
    "shape contexts batches budgets strides steps",
    contexts="1024,2048,4096,8192",
    batches="1,2,4",
    budgets="256,512,1024",
    strides="10,2,5,20",
    steps=10,
)
@timing
def scale(**given: Any) -> None:
    """How the cost of a step grows: ms = a + b * bytes, fitted.

    The first value of each list is the base; one list at a time is varied.
    """
    timed("scale", **given)


@command.command("plan")
@options("model context batch budget stride draft acceptance", model="llama-3.1-8b", context=131072)
@click.option("--device", default="h200", show_default=True, help="h100, h200, a100 or b200.")
@options("bandwidth fixed_ms dtype check", fixed_ms=0.0)
@common.json_option
def plan(
    model: str,
    device: str,
    bandwidth: float | None,
    fixed_ms: float,
    dtype: str,
    check: Path | None,
    as_json: bool,
    stride: int | str,
    **load: Any,
) -> None:
    """Speed-up and memory on a machine that is not here, by the bytes that have to move."""
    from refreshkv.bench import plan as bench
    from refreshkv.bench.roofline import Load

    with common.bad_input():
        if check is not None:
            record = bench.check(check, sizes_of)
        else:
            machine = bench.device_of(device, None if bandwidth is None else bandwidth * 1e9)
            asked = Load(**load, stride=fixed(stride))
            about = {"model": model, "device": device, "dtype": dtype}
            record = {**about, **bench.plan(sizes_of(model, dtype), asked, machine, fixed_ms)}
    (view.plan_check if check else view.plan)(record)
    if as_json:
        common.emit_json(record)


def fixed(stride: int | str) -> int | None:
    """The stride, `None` for never."""
    return None if stride == common.STRIDE.word else int(stride)


def sizes_of(model: str, dtype: str) -> Any:
    """Bytes of a shape, or of a model of which only the config is read.

    Raises:
        BadInput: no such model, or one that is not supported.
    """
    import torch

    from refreshkv.bench.roofline import sizes_of
    from refreshkv.bench.shapes import SHAPES, config_of, outline
    from refreshkv.cli.loading import load_config, reading
    from refreshkv.cli.locate import locate

    kind = getattr(torch, dtype)
    if model in SHAPES:
        return sizes_of(outline(config_of(model), kind))
    source = locate(model, need_weights=False)
    config, support = load_config(source)
    if not support.ok:
        raise common.BadInput(f"model {model!r} is not supported: {support.reason}")
    with reading(source, "config"):
        return sizes_of(outline(config, kind))


def timed(
    kind: str,
    *,
    device: str,
    results: Path | None,
    no_record: bool,
    plot: Path | None,
    progress: bool | None,
    as_json: bool,
    sizes: tuple[tuple[int, int], ...] | None = None,
    **settings: Any,
) -> None:
    """Run the benchmark of that name, for each of `sizes`, and show it; what would be missing at the end is missed now.

    Raises:
        BadInput: a device that is not there, a plot that cannot be drawn, whatever the benchmark refuses.
    """
    from refreshkv.bench import plots
    from refreshkv.cli.loading import pick_device, quiet

    quiet()
    settings["device"] = str(pick_device(device))
    if plot is not None:
        with common.bad_input():
            plots.check(plot)
    if no_record:
        results = None
    elif results is None and RESULTS.is_dir():
        results = RESULTS / f"{kind}-{settings['device'].split(':')[0]}.csv"
    settings["results"] = results
    settings["progress"] = sys.stderr.isatty() if progress is None else progress
    home = {"generate": "endtoend"}.get(kind, kind)
    run, show = importlib.import_module(f"refreshkv.bench.{home}").run, getattr(view, kind)
    found: list[dict[str, Any]] = []
    for size in [{}] if sizes is None else [{"batch": b, "context": n} for b, n in sizes]:
        with common.bad_input():
            found.append(run(**{**settings, **size}))
        show(found[-1])
    if plot is not None:
        plots.draw(plot, found[-1])
    if as_json:
        common.emit_json(({} if sizes is None else {"runs": found}) | found[-1])
