"""The tasks by name. To add one: a file here, and a line in `_HOME`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from refreshkv.config import unknown
from refreshkv.evals.task import Task

_RULER = (
    "niah-single-1",
    "niah-single-2",
    "niah-single-3",
    "niah-multikey-1",
    "niah-multikey-2",
    "niah-multikey-3",
    "niah-multivalue",
    "niah-multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa-1",
    "qa-2",
)
_BREADTH = (
    *("chain-2", "chain-3", "chain-4"),
    *("table-2", "table-3", "table-4", "table-6", "table-skip"),
    *("key-value-1", "key-value-5", "key-value-20"),
    *("reversed", "interleaved", "free-text", "needle", "needle-new"),
)
_HOME: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "chain-of-key": ("chain_of_key", "ChainOfKey"),
        "html-to-tsv": ("html_to_tsv", "HtmlToTsv"),
        "key-value": ("key_value", "KeyValue"),
        "perplexity": ("perplexity", "Perplexity"),
        "summarization": ("summarization", "Summarization"),
        **{f"ruler-{kind}": ("ruler", f"ruler-{kind}") for kind in _RULER},
        **{f"breadth-{family}": ("breadth", f"breadth-{family}") for family in _BREADTH},
    }
)
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ruler": tuple(f"ruler-{kind}" for kind in _RULER),
        "breadth": tuple(f"breadth-{family}" for family in _BREADTH),
    }
)
TASKS = tuple(_HOME)


def expand(names: list[str]) -> list[str]:
    """Groups become their tasks; each task once, in the order given.

    Raises:
        ValueError: an unknown task, named with its nearest neighbour.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in _HOME and name not in GROUPS:
            raise ValueError(unknown("task", name, [*TASKS, *GROUPS]))
        found.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return list(found)


def task_class(name: str) -> type[Task]:
    """The class of a task. Raises `ValueError` for an unknown name."""
    if name not in _HOME:
        raise ValueError(unknown("task", name, TASKS))
    module, attribute = _HOME[name]
    loaded = importlib.import_module(f"refreshkv.evals.tasks.{module}")
    return loaded.TASKS[attribute] if module in GROUPS else getattr(loaded, attribute)


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
