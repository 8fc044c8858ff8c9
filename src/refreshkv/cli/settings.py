"""Settings as options, of the type and with the description that they have in the themes of `RefreshConfig`."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from refreshkv.cli import common
from refreshkv.cli.common import BadInput
from refreshkv.config import PRESETS, RefreshConfig, Settings, described, make_config, names_of

Command = Callable[..., Any]
preset_option = click.option(
    "--preset",
    help=f"Settings to start from: {', '.join(PRESETS)}, or FILE.json by `refreshkv compare`.",
)
_NONE = {"stride": common.STRIDE.word}  # the word for `None`; "none" for the others


def option(
    name: str, theme: type[Settings] = RefreshConfig, **attributes: Any
) -> Callable[[Command], Command]:
    """The option of one setting; `attributes` are click's, on top of the type and the description."""
    hint, flag, word = get_type_hints(theme)[name], f"--{name.replace('_', '-')}", _none(name)
    kinds = set(get_args(hint) or (hint,))
    kind: Any = hint
    if hint is bool:
        flag, kind = f"{flag}/--no-{flag[2:]}", None
    elif get_origin(hint) is Literal:
        kind = click.Choice(get_args(hint))
    elif NoneType in kinds:
        (number,) = kinds - {NoneType}
        kind = common.OrWord(number, word)
    elif kinds == {int, float}:
        kind = common.Budget()
    text = described(theme)[name].replace("`None`", repr(word)).replace("`", "")
    text = text[:1].upper() + text[1:]
    return click.option(flag, **{"type": kind, "default": None, "help": text, **attributes})


def options(command: Command) -> Command:
    """`--method`, `--preset` and one option a setting. None has a default here: the preset, or the method, holds it."""
    for name in reversed(names_of(RefreshConfig)):
        command = option(name)(command)
    command = preset_option(command)
    compared = "A method that RefreshKV is compared with; `refreshkv eval --list` names them."
    return click.option("--method", help=compared)(command)


def asked(method: str | None, preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `attach` for what the user gave: the options that are not `None`.

    Raises:
        BadInput: an unknown method or preset, a value out of range, or one without effect.
    """
    overrides = said(given)
    if overrides.get("mode") == "full" and "budget" in overrides:  # here nothing is compared
        raise BadInput("--budget has no effect in --mode full; leave it out")
    with common.bad_input():
        settings = preset_of(preset)
        if method is None:
            make_config(settings, **overrides)
        else:
            from refreshkv.methods import find

            find(method).config(settings, **overrides)
    return {"method": method, "preset": settings, **overrides}


def said(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as settings."""
    found = {name: value for name, value in given.items() if value is not None}
    return {name: None if value == _none(name) else value for name, value in found.items()}


def preset_of(given: str | None) -> str | dict[str, Any] | None:
    """What `--preset` means: a name, or the settings in a file, which ends in .json.

    Raises:
        ValueError: as `load_preset`.
    """
    if given is None or not given.endswith(".json"):
        return given
    from refreshkv.presets import load_preset

    return load_preset(os.path.expanduser(given))


def _none(name: str) -> str:
    return _NONE.get(name, "none")
