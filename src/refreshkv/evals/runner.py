"""A whole grid: check it, decode what is missing, one record an example, then the summary and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import refreshkv
from refreshkv.evals import encoding
from refreshkv.evals.grid import MODES, Cell, Grid, batches, make_cells, parse_method
from refreshkv.evals.launch import Team
from refreshkv.evals.prefill import Prefills
from refreshkv.evals.records import dtype_of, hash_of, records_of, settings_of, versions
from refreshkv.evals.report import write_report
from refreshkv.evals.results import BASELINE
from refreshkv.evals.store import Record, RunDirectory, cannot_write
from refreshkv.evals.summary import Summary, summarize, write_csv
from refreshkv.evals.yardstick import Yardstick
from refreshkv.stats import RowStats
from refreshkv.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from refreshkv import Session
    from refreshkv.evals.grid import MethodSpec
    from refreshkv.tasks.task import Example

# Given the number of examples, something like a tqdm bar: update(n), set_description(text), close().
Progress = Callable[[int], Any]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    out: Path,
    *,
    team: Team | None = None,
    progress: Progress | None = None,
) -> list[Summary]:
    """Run what is missing of `grid` in the directory `out`, and write summary.csv and report.html.

    Returns the summaries of everything in the directory; an empty list in a process that is not the main one.

    Raises:
        ValueError: see `Run`.
        RunError: a disk that is full, or a score that is not finite; what was written is kept.
    """
    with Run(model, tokenizer, grid, out, team=team) as ready:
        ready.decode(progress)
        return ready.finish()


class Run:
    """A checked grid: `decode`, then `finish`. A context manager; until it ends no other run has the directory.

    Making one makes the examples, and checks everything that can be checked before the first token is decoded.

    Raises:
        ValueError: settings or data that cannot work, a prompt that does not fit the model, or a directory that was
            made with other settings or data.
        RunError: the disk is full.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        grid: Grid,
        out: Path,
        *,
        team: Team | None = None,
    ) -> None:
        self.model, self.tokenizer, self.grid = model, tokenizer, grid
        self.team = team = Team() if team is None else team
        _check_lengths(model, grid)
        self.cells = make_cells(grid, lambda text: len(encoding.answer_tokens(tokenizer, text)))
        _check_prompts(model, tokenizer, grid, self.cells)
        for method in grid.methods:
            _attach(model, grid, method).detach()
        asked = ("seed", "budget", "chat", "mode", "limit", "batch")
        config = {
            "model": grid.model,
            "dtype": dtype_of(model),
            "device": model.device.type,
            **{name: getattr(grid, name) for name in asked},
            "processes": team.size,
            "tasks": {task.name: settings_of(task) for task in grid.tasks},
            "methods": [method.text for method in grid.methods],
            "versions": versions(),
        }
        self.directory = RunDirectory(out)
        try:
            if team.is_main:
                self.directory.open(config)
            team.wait()
            self.done = done = self.directory.done()
            _check_same_prompts(out, self.cells, done)
        except BaseException:
            self.directory.close()
            raise
        groups = batches(self.cells, done, grid.batch)[team.rank :: team.size]
        self.todo = [batch for group in groups for batch in group]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.directory.close()

    def decode(self, progress: Progress | None = None) -> None:
        """All batches of this process. Each is on the disk before the next begins.

        Raises:
            RunError: a record that could not be written, or a score that is not finite.
        """
        with ExitStack() as stack:
            bar = None
            if progress is not None and self.team.is_main:
                bar = progress(sum(len(examples) for _, examples in self.todo))
                stack.callback(bar.close)
            rank = self.team.rank if self.team.size > 1 else None
            lines = stack.enter_context(self.directory.lines(rank))
            prefills, yardstick = Prefills(self.model), Yardstick()
            for cell, examples in self.todo:
                if bar is not None:
                    bar.set_description(one_line(f"{cell.task.name}, {cell.method.text}"))
                full = replace(cell, method=parse_method(BASELINE))
                compared = self._beside_full(full, examples)
                if compared and cell.method.text != BASELINE and yardstick.lacks(cell, examples):
                    self._records(full, examples, prefills, yardstick)  # these are written already
                lines.append(
                    self._records(cell, examples, prefills, yardstick if compared else None)
                )
                if bar is not None:
                    bar.update(len(examples))

    def _records(
        self,
        cell: Cell,
        examples: Sequence[Example],
        prefills: Prefills,
        yardstick: Yardstick | None,
    ) -> list[Record]:
        with _attach(self.model, self.grid, cell.method) as session:
            return list(
                records_of(session, self.tokenizer, self.grid, cell, examples, prefills, yardstick)
            )

    def _beside_full(self, full: Cell, examples: Sequence[Example]) -> bool:
        """Whether distributions are compared with those of full attention: it is asked for, or was."""
        if full.task.kind != "perplexity":
            return False
        asked = any(method.text == BASELINE for method in self.grid.methods)
        return asked or all(full.key(example) in self.done for example in examples)

    def finish(self) -> list[Summary]:
        """Merge what the processes wrote; summary and report are the main one's.

        Raises:
            RunError: the disk is full.
        """
        self.team.wait()
        if not self.team.is_main:
            return []
        records = self.directory.tidy(self._order())
        summaries = summarize(records)
        try:
            write_csv(self.directory.path / "summary.csv", summaries)
            write_report(self.directory.path, records, summaries)
        except OSError as error:
            raise cannot_write(self.directory.path, error) from error
        return summaries

    def _order(self) -> Callable[[Record], tuple[int, ...]]:
        """Task, method, mode, example: the order of one process that was never stopped."""
        tasks = list(self.directory.config["tasks"])
        methods = self.directory.config["methods"]
        places = {
            cell.key(example): place
            for cell in self.cells
            for place, example in enumerate(cell.examples)
        }
        beyond = len(places)  # for examples of an earlier run with a higher limit

        def order(record: Record) -> tuple[int, ...]:
            return (
                tasks.index(record["task"]),
                methods.index(record["method"]),
                MODES.index(record["mode"]),
                places.get(record["key"], beyond),
            )

        return order


def _attach(model: PreTrainedModel, grid: Grid, method: MethodSpec) -> Session:
    settings = method.with_budget(grid.budget)
    return refreshkv.attach(model, method=method.name, stats=RowStats(), graphs=False, **settings)


def _check_lengths(model: PreTrainedModel, grid: Grid) -> None:
    """Before prompts are made, which takes as long as they are: their length is within the model's positions.

    Of texts that the user gives it is the most that is taken, and they may be shorter.
    """
    positions = encoding.positions_in(model)
    for task in grid.tasks:
        length = 0 if hasattr(task, "data") else getattr(task, "length", 0)
        if positions is not None and length > positions:
            raise ValueError(
                f"{task.name}: prompts of {length} tokens, but the model has {positions} positions; lower the length of"
                " the task"
            )


def _check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    cells: Sequence[Cell],
) -> None:
    """Every prompt fits the model together with its output. No method changes either."""
    for cell in {(cell.task.name, cell.mode): cell for cell in cells}.values():
        prompts, names, room = [], [], []
        for example in cell.examples:
            gold = encoding.answer_tokens(tokenizer, example.answer or "")
            prompts.append(example.prompt)
            names.append(cell.title(example))
            room.append(len(gold) if cell.mode == "forced" else example.max_new_tokens)
            if room[-1] < 1:
                raise ValueError(f"{names[-1]}: nothing to decode; check its data")
        encoding.encode_all(model, tokenizer, prompts, room, grid.chat, names)


def _check_same_prompts(out: Path, cells: Sequence[Cell], done: dict[str, str]) -> None:
    """What is done already was done with the prompts of today."""
    for cell in cells:
        for example in cell.examples:
            before = done.get(cell.key(example))
            if before is not None and before != hash_of(example):
                raise ValueError(
                    f"run directory '{out}' holds {cell.title(example)} with another prompt: the data has changed;"
                    " use another --out"
                )
