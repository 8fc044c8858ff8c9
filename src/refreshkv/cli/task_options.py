"""`--tasks`, `--length` and `--task-option TASK.NAME=VALUE` become tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from refreshkv.cli.common import BadInput

if TYPE_CHECKING:
    from refreshkv.tasks.task import Task


def make_tasks(names: Sequence[str], length: int, options: Sequence[str]) -> tuple[Task, ...]:
    """The tasks of `names`, groups resolved, with `length` where they have it and `options` on top.

    An option for a group goes to each of its tasks that has the setting.

    Raises:
        ValueError: an unknown task or setting, a value of the wrong type or out of range, an option for a task that
            was not asked for.
    """
    from refreshkv import tasks

    asked = tasks.expand(list(names))
    settings: dict[str, dict[str, Any]] = {
        name: {"length": length} if "length" in tasks.options_of(name) else {} for name in asked
    }
    for option in options:
        target, key, value = _split(option)
        members = tasks.expand([target])
        known = [name for name in members if key in tasks.options_of(name)] or members
        for name in known:
            if name not in settings:
                raise BadInput(
                    f"--task-option {option}: {name} is not among --tasks; add it, or leave the option out"
                )
            settings[name][key] = _value(name, key, value)
    return tuple(tasks.make_task(name, **settings[name]) for name in asked)


def _split(option: str) -> tuple[str, str, str]:
    place, equals, value = option.partition("=")
    task, dot, name = place.partition(".")
    if not (task and dot and name and equals):
        raise BadInput(
            f"--task-option {option!r} is not TASK.NAME=VALUE, for example chain-of-key.keys=5"
        )
    return task, name, value


def _value(task: str, name: str, text: str) -> Any:
    """Text as the setting wants it: JSON where it is no text. An unknown setting is for `make_task` to refuse."""
    from refreshkv.tasks import task_class

    hint = get_type_hints(task_class(task)).get(name)
    kinds = get_args(hint) or (hint,)
    if NoneType in kinds and text in ("none", "null"):
        return None
    if str in kinds or hint is None:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and float in kinds
        and int not in kinds
    ):
        value = float(value)
    if any(type(value) is kind for kind in kinds):
        return value
    wanted = " or ".join("none" if kind is NoneType else kind.__name__ for kind in kinds)
    raise BadInput(f"--task-option {task}.{name}={text}: {text!r} is not {wanted}")
