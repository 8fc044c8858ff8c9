"""`refreshkv compare`: modes and methods on the user's own model, prompts and machine, and which of them to use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from refreshkv.cli import common, loading, settings
from refreshkv.cli.common import BadInput

if TYPE_CHECKING:
    from refreshkv.cli.loading import Loaded
    from refreshkv.evals.candidates import Candidate
    from refreshkv.evals.compare import Comparison

DEFAULT = "exact,fast"


@click.command("compare", short_help="Modes and methods on your own prompts: what to use here.")
@click.option("--model", required=True, help=common.MODEL_HELP)
@click.option("--prompt", "text", help="The prompt itself.")
@click.option(
    "--prompt-file",
    "files",
    metavar="FILE",
    multiple=True,
    help="A UTF-8 text file; may be repeated. '-' is stdin, which is also the default.",
)
@click.option("--chat", is_flag=True, help="Wrap each prompt in the model's chat template.")
@click.option(
    "--methods",
    metavar="X,Y",
    help="'exact', 'fast' or methods of `refreshkv eval --list`, each with settings where wanted:"
    f" exact:confidence=0.5.  [default: {DEFAULT}]",
)
@click.option(
    "--preset",
    "presets",
    metavar="NAME",
    multiple=True,
    help="Named settings, or FILE.json, as another row; may be repeated.",
)
@click.option(
    "--max-new-tokens",
    "--new-tokens",
    type=common.count(),
    default=128,
    show_default=True,
    help="After each prompt, if the model has not stopped by itself.",
)
@click.option(
    "--repeats",
    type=common.count(most=10**4),
    default=3,
    show_default=True,
    help="Rounds of timing, in which all rows take turns.",
)
@click.option(
    "--bar",
    type=common.Finite(0, 1),
    default=0.95,
    show_default=True,
    help="Share of full attention's tokens that a lossy mode has to agree with to be recommended.",
)
@click.option("--tune", is_flag=True, help="Try settings of each mode (docs/cli.md lists them).")
@click.option(
    "--write-preset",
    "preset_file",
    metavar="FILE.json",
    type=common.PathName(file=True),
    help="Write the settings of the verdict, for --preset.",
)
@loading.dtype_option
@loading.device_option
@common.threads_option
@loading.trust_option
@common.progress_option
@common.json_option
def command(
    model: str,
    text: str | None,
    files: tuple[str, ...],
    chat: bool,
    methods: str | None,
    presets: tuple[str, ...],
    max_new_tokens: int,
    repeats: int,
    bar: float,
    tune: bool,
    preset_file: Path | None,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Compare modes and methods with full attention, on your own model and prompts, greedily.

    Full attention writes first; what the others make of the same prompts is compared with its text, and their speed
    with the faster of transformers' own cache and our full attention. The last line says what to use. Ctrl-C prints
    what has been measured so far.
    """
    # What can be checked without the model is checked first: a large one takes minutes to load.
    if preset_file is not None:
        check_writable(preset_file)
    prompts = read_prompts(text, files)
    candidates = parse(methods, presets, tune)
    loaded = loading.load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    import torch

    from refreshkv.cli import compare_view as view
    from refreshkv.evals.compare import Comparison
    from refreshkv.evals.verdict import judge

    with contextlib.ExitStack() as stack:
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        with common.bad_input():
            limits = {"new_tokens": max_new_tokens, "repeats": repeats, "chat": chat}
            comparison = Comparison(loaded.model, loaded.tokenizer, prompts, candidates, **limits)
        check_lengths(loaded, comparison)
        complete = run(comparison, progress)
        about = {
            "model": model,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "threads": torch.get_num_threads(),
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "complete": complete,
        }
    rows = comparison.rows()
    verdict = judge(rows, bar)
    saved = view.save(preset_file, rows, verdict, about) if preset_file and complete else None
    if as_json:
        common.emit_json(view.record(comparison, verdict, bar, saved, about))
    else:
        view.show(comparison, verdict, saved)
    if preset_file and not saved:
        click.echo("refreshkv: note: no preset was written: the verdict names none", err=True)
    if not complete:
        raise click.Abort


def read_prompts(text: str | None, files: tuple[str, ...]) -> dict[str, str]:
    """Name -> prompt; a file is called as it was given."""
    from refreshkv.cli.prompt import read_prompt

    if not files:
        return {"the prompt": read_prompt(text, None)}
    return {file: read_prompt(text, file) for file in files}


def parse(methods: str | None, presets: tuple[str, ...], tune: bool) -> list[Candidate]:
    """The rows that were asked for, each once, or the default ones."""
    from refreshkv.evals.candidates import Candidate, parse_candidate, variants

    if methods is None and not presets:
        methods = DEFAULT
    names = [] if methods is None else [one.strip() for one in methods.split(",") if one.strip()]
    if methods is not None and not names:
        raise BadInput("--methods names nothing; 'refreshkv eval --list' shows what there is")
    with common.bad_input():
        found = [parse_candidate(name) for name in names]
        found += [Candidate(name, {"preset": settings.preset_of(name)}) for name in presets]
        if tune:
            found = [variant for candidate in found for variant in variants(candidate)]
        for candidate in found:
            _ = candidate.config  # raises for what cannot be
    return found


def check_lengths(loaded: Loaded, comparison: Comparison) -> None:
    """Raise `BadInput` for a prompt that is too long for the model; among several it is named."""
    from refreshkv.cli.prompt import check_length

    for name, tokens in comparison.tokens.items():
        try:
            check_length(loaded, len(tokens), comparison.new_tokens)
        except BadInput as error:
            raise BadInput(
                f"{name}: {error}" if len(comparison.tokens) > 1 else str(error)
            ) from None


def check_writable(file: Path) -> None:
    """Raise `BadInput` where the preset could not be written, or not be read again; measuring takes a while."""
    if file.suffix != ".json":
        raise BadInput(
            f"--write-preset '{file}' does not end in .json, by which --preset knows a file; add it"
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise BadInput(f"--write-preset '{file}' cannot be written; check its folder")


def run(comparison: Comparison, progress: bool | None) -> bool:
    """Measure, with a bar; whether it came to its end. A Ctrl-C before anything was written goes through."""
    begun = 0
    with common.progress_bar(comparison.runs, "run", progress) as bar:

        def tick(name: str) -> None:
            nonlocal begun
            bar.update(1 if begun else 0)
            begun += 1
            bar.set_description(name)

        try:
            comparison.run(tick)
        except KeyboardInterrupt:
            if not comparison.written:
                raise
            return False
        bar.update(1)
    return True
