"""`--tasks`, `--length` and `--task-option TASK.NAME=VALUE` become tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from refreshkv import tasks
from refreshkv.cli.common import BadInput
from refreshkv.tasks.task import Task
from refreshkv.text import setting_of


def make_tasks(names: Sequence[str], length: int, options: Sequence[str]) -> tuple[Task, ...]:
    """The tasks of `names`, groups resolved, with `length` where they have it and `options` on top.

    An option for a group goes to each of its tasks that has the setting.

    Raises:
        ValueError: an unknown task or setting, a value of the wrong type or out of range, an option for a task that
            was not asked for.
    """
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
    """Text stays text where the setting is one; what is unknown or out of range is for the task to refuse."""
    hint = get_type_hints(tasks.task_class(task)).get(name)
    value = setting_of(text)
    return text if value is not None and str in (get_args(hint) or (hint,)) else value
