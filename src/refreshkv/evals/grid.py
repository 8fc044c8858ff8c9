"""What is asked for: tasks x methods x modes. Parses method specs; a cell is one combination with its examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from refreshkv.config import Budgeted
from refreshkv.evals.results import BASELINE
from refreshkv.methods import find
from refreshkv.tasks.task import Count, Example, Task
from refreshkv.text import setting_of

Mode = Literal["free", "forced"]
MODES: tuple[Mode, ...] = ("free", "forced")


@dataclass(frozen=True)
class MethodSpec:
    """A method as given, `name[:setting=value ...]`, its name, and the settings that replace the method's own."""

    text: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def with_budget(self, budget: int | float | None) -> dict[str, Any]:
        """The settings and, where they name none, `budget`; `None` leaves the method its own."""
        common = {} if budget is None else {"budget": budget}
        return {**common, **self.settings}

    def config(self, budget: int | float | None) -> Budgeted:
        """What the method runs with.

        Raises:
            ValueError: an unknown setting, or a value out of range.
        """
        return find(self.name).config(**self.with_budget(budget))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to run.

    Attributes:
        model: how the records call the model.
        mode: "free" generates; "forced" feeds the gold answer; "both". Perplexity is always fed.
        budget: K of every method whose spec does not say otherwise; `None` leaves each its own.
        limit: examples a task; `None` is each task's own number.
        batch: examples decoded at once.
        chat: wrap prompts in the model's chat template.

    Raises:
        ValueError: a number below 1, a negative seed, nothing to run, a method that cannot be fed where it would be.
    """

    model: str
    tasks: Sequence[Task]
    methods: Sequence[MethodSpec]
    mode: Literal["free", "forced", "both"] = "free"
    budget: int | float | None = None
    seed: int = 0
    limit: int | None = None
    batch: int = 1
    chat: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "methods"):
            if not getattr(self, name):
                raise ValueError(f"no {name}; name at least one")
        if self.mode not in (*MODES, "both"):
            raise ValueError(f"mode must be 'free', 'forced' or 'both'; got {self.mode!r}")
        for name, least in (("seed", 0), ("limit", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        self._check_feeding()

    def _check_feeding(self) -> None:
        exact = [m.text for m in self.methods if m.config(self.budget).mode == "exact"]
        fed = [task.name for task in self.tasks if "forced" in _modes(task, self.mode)]
        if exact and fed:
            remedy = "" if any(t.kind == "perplexity" for t in self.tasks) else "--mode free, or "
            raise ValueError(
                f"method {exact[0]!r} says only what the model itself would say, and task {fed[0]} feeds it an answer;"
                f" use {remedy}another method such as refreshkv-paper"
            )


@dataclass(frozen=True, eq=False)
class Cell:
    """One task under one method in one mode."""

    task: Task
    method: MethodSpec
    mode: Mode
    examples: Sequence[Example]

    def key(self, example: Example) -> str:
        """What a result is called; unique in a run directory."""
        return "|".join((self.task.name, self.method.text, self.mode, example.id))

    def title(self, example: Example) -> str:
        """What an example is called for people."""
        return f"{self.task.name}, example {example.id}"


def parse_methods(
    texts: Sequence[str], budget: int | float | None = None
) -> tuple[MethodSpec, ...]:
    """Specs in the order given, each once.

    Raises:
        ValueError: an unknown method or setting, named with its nearest neighbour, or a value out of range.
    """
    return tuple(parse_method(text, budget) for text in dict.fromkeys(texts))


def parse_method(text: str, budget: int | float | None = None) -> MethodSpec:
    """`refreshkv:stride=10:threshold=none`; "none" and "never" are `None`."""
    name, *parts = text.split(":")
    find(name)
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise ValueError(f"method {text!r}: write name:setting=value, not {part!r}")
        if key in settings:
            raise ValueError(f"method {text!r}: {key} is set twice; set it once")
        settings[key] = setting_of(value)
    spec = MethodSpec(text, name, settings)
    try:
        spec.config(budget)
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}" if parts else str(error)) from None
    return spec


def make_cells(grid: Grid, count: Count) -> list[Cell]:
    """Every combination, in the order of the results: task, method, mode. Each task makes its examples once.

    Raises:
        ValueError: from a task (its data, its settings), or a task without the gold answers that the mode needs.
    """
    cells = []
    for task in grid.tasks:
        try:
            examples = list(task.examples(count, grid.seed, grid.limit))
        except ValueError as error:
            if task.name in str(error):
                raise
            raise ValueError(f"{task.name}: {error}") from error
        if not examples:
            raise ValueError(f"task {task.name} has no examples; check its data")
        if len({example.id for example in examples}) < len(examples):
            raise ValueError(f"task {task.name} has two examples of one name; check its data")
        gold = [example for example in examples if example.answer is not None]
        by_mode = {m: examples if m == "free" else gold for m in _modes(task, grid.mode)}
        if not any(by_mode.values()):
            raise ValueError(f"task {task.name} has no gold answer to feed; use mode free")
        for method in grid.methods:
            cells += [Cell(task, method, mode, own) for mode, own in by_mode.items() if own]
    return cells


def batches(
    cells: Sequence[Cell], done: Mapping[str, Any], size: int
) -> list[list[tuple[Cell, list[Example]]]]:
    """What is left to do, at most `size` examples of one cell at a time.

    The cells of the same examples come together, so that they can share the prompts' pass: a list for each. Full
    attention, which others are compared with, comes first.
    """
    found: dict[tuple[str, Mode, int], list[tuple[Cell, list[Example]]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.method.text != BASELINE):
        for at in range(0, len(cell.examples), size):
            left = [e for e in cell.examples[at : at + size] if cell.key(e) not in done]
            if left:
                found.setdefault((cell.task.name, cell.mode, at), []).append((cell, left))
    return list(found.values())


def _modes(task: Task, asked: str) -> Iterator[Mode]:
    if task.kind == "perplexity":
        yield "forced"
    else:
        yield from (mode for mode in MODES if asked in (mode, "both"))
