"""Tasks: prompts made from a seed or read from the user's data, and the score of an output.

`task` says what a task is; each file holds one, or a group. To add one: a file here, and a name in `_SINGLE`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from refreshkv.config import unknown
from refreshkv.tasks import breadth, ruler
from refreshkv.tasks.chain_of_key import ChainOfKey
from refreshkv.tasks.continuation import Continuation
from refreshkv.tasks.html_to_tsv import HtmlToTsv
from refreshkv.tasks.key_value import KeyValue
from refreshkv.tasks.perplexity import Perplexity
from refreshkv.tasks.reasoning import Reasoning
from refreshkv.tasks.summarization import Summarization
from refreshkv.tasks.task import Task

_SINGLE: tuple[type[Task], ...] = (
    *(ChainOfKey, HtmlToTsv, KeyValue, Perplexity, Continuation, Summarization, Reasoning),
)
TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {**{task.name: task for task in _SINGLE}, **ruler.TASKS, **breadth.TASKS}
)
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"ruler": tuple(ruler.TASKS), "breadth": tuple(breadth.TASKS)}
)


def expand(names: list[str]) -> list[str]:
    """Groups become their tasks; each task once, in the order given.

    Raises:
        ValueError: an unknown task, named with its nearest neighbour.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            raise ValueError(unknown("task", name, [*TASKS, *GROUPS]))
        found.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return list(found)


def task_class(name: str) -> type[Task]:
    """The class of a task. Raises `ValueError` for an unknown name."""
    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    return TASKS[name]


def options_of(name: str) -> dict[str, Any]:
    """The settings of a task and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(task_class(name))}


def make_task(name: str, **options: Any) -> Task:
    """A task with some settings replaced.

    Raises:
        ValueError: an unknown task or setting, named with its nearest neighbour, or a value out of range.
    """
    known = options_of(name)
    for key in options:
        if key not in known:
            raise ValueError(unknown(f"setting of {name}", key, known))
    return task_class(name)(**options)
