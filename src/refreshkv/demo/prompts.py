"""Prompts for the bundled model: three evaluation tasks at any length (ours)."""

from __future__ import annotations

from functools import lru_cache

from refreshkv.config import unknown
from refreshkv.tasks import make_task
from refreshkv.tasks.task import Count, Example, Task

TASKS = ("chain-of-key", "html-to-tsv", "key-value")


def demo_task(name: str, length: int) -> Task:
    """The task with prompts of at most `length` tokens.

    Raises:
        ValueError: a task that the bundled model has not learned, named with its nearest neighbour.
    """
    if name not in TASKS:
        raise ValueError(unknown("demo task", name, TASKS))
    return make_task(name, length=length)


def make_prompt(task: str, seed: int, length: int = 1024) -> Example:
    """The first prompt that `task` makes of `seed`, at most `length` tokens of the bundled tokenizer.

    Raises:
        ValueError: an unknown task, a negative seed, or a length that is too short for the task.
    """
    made = demo_task(task, length)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return next(made.examples(_counter(), seed, 1))


@lru_cache
def _counter() -> Count:
    from refreshkv.demo.tokenizer import build_backend

    backend = build_backend()
    return lambda text: len(backend.encode(text, add_special_tokens=False).ids)
