"""The settings of a method as options: one for each field of `RefreshConfig`, of its type and described as there."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from refreshkv.cli import common
from refreshkv.cli.common import BadInput
from refreshkv.config import PRESETS, RefreshConfig, make_config

_NONE = {"stride": common.STRIDE.word}  # the word for `None`; "none" for the others


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--method`, `--preset` and one option a setting. None has a default here: the preset, or the method, holds it."""
    described = _descriptions()
    hints = get_type_hints(RefreshConfig)
    for field in reversed(dataclasses.fields(RefreshConfig)):
        kind = _kind(field.name, hints[field.name])
        name = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            declared = click.option(
                f"{name}/--no-{name[2:]}", default=None, help=described[field.name]
            )
        else:
            declared = click.option(name, type=kind, help=described[field.name])
        command = declared(command)
    presets = f"Named settings to start from: {', '.join(PRESETS)}."
    command = click.option("--preset", help=presets)(command)
    compared = "A method that RefreshKV is compared with; `refreshkv eval --list` names them."
    return click.option("--method", help=compared)(command)


def asked(method: str | None, preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `attach` for what the user gave: the options that are not `None`.

    Raises:
        BadInput: an unknown method or preset, a value out of range, or one without effect.
    """
    overrides = {
        name: None if value == _NONE.get(name, "none") else value
        for name, value in given.items()
        if value is not None
    }
    if overrides.get("mode") == "full":
        ignored = {"method": method, "preset": preset, **overrides, "mode": None}
        for name in (name for name, value in ignored.items() if value is not None):
            shown = name.replace("_", "-")
            raise BadInput(f"--{shown} has no effect in --mode full; leave it out")
    with common.bad_input():
        if method is None:
            make_config(preset, **overrides)
        else:
            from refreshkv.methods import find

            find(method).config(preset, **overrides)
    return {"method": method, "preset": preset, **overrides}


def _kind(name: str, hint: Any) -> Any:
    """The option type for the type of a field."""
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    kinds = get_args(hint) or (hint,)
    if NoneType in kinds:
        (number,) = set(kinds) - {NoneType}
        return common.OrWord(number, _NONE.get(name, "none"))
    return common.Budget() if set(kinds) == {int, float} else hint


def _descriptions() -> dict[str, str]:
    """What the docstring of `RefreshConfig` says of each field."""
    text = inspect.cleandoc(RefreshConfig.__doc__ or "").partition("Attributes:")[2]
    parts = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {
        name: " ".join(said.split())
        .replace("`None`", repr(_NONE.get(name, "none")))
        .replace("`", "")
        for name, said in parts
    }
