"""From a table and a model to the runs of `refreshkv.evals`: one grid and one directory for each measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refreshkv.config import unknown
from refreshkv.evals.grid import Grid, parse_methods
from refreshkv.evals.results import RESULTS
from refreshkv.evals.summary import read_results, summarize
from refreshkv.reproduce import paper, small_data
from refreshkv.reproduce.tables import GENERATED, OWN, Column, Data, Measure, Row, Table
from refreshkv.tasks import expand, make_task, options_of

RUNS, DATA = "runs", "data"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        out: folder of the runs, and of what is made of them.
        model, trained: as the records call them; without `trained` its columns are left out.
        family: of the model, for the threshold; `None` where the paper has none like it.
        small: the small forms.
        limit: examples a task; `None` is each form's own number.
        data: name of a data set -> what is taken in its place.
        only: names of columns; empty for all.
        budget, max_new_tokens: of problems only; `None` is the form's own.

    Raises:
        ValueError: an unknown data set or column, named with its nearest neighbour, or data that are missing.
    """

    table: Table
    out: Path
    model: str
    trained: str | None = None
    family: str | None = None
    small: bool = False
    limit: int | None = None
    seed: int = 0
    batch: int = 1
    data: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()
    budget: int | float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        columns = [column.name for column in self.table.columns]
        known = {data.name for data in self.every_data()}
        for kind, given, names in (("column", self.only, columns), ("data set", self.data, known)):
            for name in given:
                if name not in names:
                    raise ValueError(unknown(f"{kind} of {self.table.title}:", name, names))
        if not self.columns:
            raise ValueError(
                "all columns that are asked for need --trained, or data; see refreshkv reproduce --list"
            )

    def every_data(self) -> list[Data]:
        """What the columns of the table read."""
        return [m.data for c in self.table.columns for m in c.measures if m.data is not None]

    @property
    def columns(self) -> list[Column]:
        """Those that are run."""
        return [
            column
            for column in self.table.columns
            if (not self.only or column.name in self.only)
            and (self.trained is not None or not any(m.trained for m in column.measures))
            and (column.name != OWN or OWN in self.data)
        ]

    def methods(self, column: Column) -> dict[str, str]:
        """Row -> method, of those that do not depend on what another has shown."""
        threshold = paper.THRESHOLDS[self.family or paper.LLAMA]
        return {
            row.name: row.method.format(threshold=threshold)
            for row in self.table.rows_of(column)
            if row.like is None
        }

    def folder(self, measure: Measure) -> Path:
        """The run directory of a measure."""
        return self.out / RUNS / measure.name

    def source(self, measure: Measure) -> str | None:
        """What the task reads; `None` where it makes its examples itself.

        Raises:
            ValueError: data that nobody has given.
        """
        data = measure.data
        if data is None:
            return None
        given = self.data.get(data.name)
        if given is not None:
            return None if data.kind == "pages" and given == GENERATED else given
        if self.small:
            return None if data.kind == "pages" else str(self.made(measure))
        if data.hub is None:
            raise ValueError(
                f"{data.name} needs data: --data {data.name}=PATH, where PATH is {data.local}"
            )
        return data.hub

    def made(self, measure: Measure) -> Path:
        """The file of a small form's own data."""
        assert measure.data is not None
        return self.out / DATA / f"{measure.data.name}.jsonl"


@dataclass(frozen=True)
class Job:
    """One measure to run."""

    column: Column
    measure: Measure
    grid: Grid
    folder: Path


def make_jobs(request: Request) -> list[Job]:
    """The runs of all columns that are asked for, each in a directory of its own.

    Raises:
        ValueError: data that are missing, or what a task or method refuses.
    """
    return [
        Job(
            column,
            measure,
            _grid(request, measure, list(request.methods(column).values())),
            request.folder(measure),
        )
        for column in request.columns
        for measure in column.measures
    ]


def placeholders(request: Request) -> dict[str, str]:
    """For a plan, which reads nothing: something in the place of data that nobody has given yet."""
    return {data.name: GENERATED for data in request.every_data() if data.kind == "pages"}


def make_data(request: Request, jobs: Sequence[Job]) -> None:
    """Write the texts that small forms read, where none were given.

    Raises:
        OSError: they cannot be written.
    """
    for job in jobs:
        source, data = request.source(job.measure), job.measure.data
        if data is not None and source == str(request.made(job.measure)):
            small_data.write(Path(source), data.kind, request.seed, job.grid.limit or 1)


def matched(request: Request, job: Job) -> Job | None:
    """The run of the rows that follow what another row has shown; `None` where there are none.

    To be asked when the job is done.
    """
    methods = [
        method
        for row in request.table.rows_of(job.column)
        if row.like is not None and (method := following(request, job.column, row)) is not None
    ]
    if not methods:
        return None
    return Job(job.column, job.measure, _grid(request, job.measure, methods), job.folder)


def following(request: Request, column: Column, row: Row) -> str | None:
    """The method of a row that is run at the mean stride of the row `like`; `None` before that one is run."""
    assert row.like is not None
    wanted = request.methods(column)[row.like]
    found = [
        summary.effective_stride
        for measure in column.measures
        for summary in summarize(records_of(request, measure))
        if summary.method == wanted
    ]
    if not found:
        return None
    return "no-refresh" if found[0] is None else row.method.format(stride=round(found[0]))


def records_of(request: Request, measure: Measure) -> list[dict[str, Any]]:
    """What the directory of a measure holds; nothing before it is run."""
    folder = request.folder(measure)
    return read_results(folder) if (folder / RESULTS).is_file() else []


def _grid(request: Request, measure: Measure, methods: Sequence[str]) -> Grid:
    form = measure.form(request.small)
    options = dict(form.options)
    if request.max_new_tokens is not None:
        options["max_new_tokens"] = request.max_new_tokens
    if (source := request.source(measure)) is not None:
        options["data"] = source
    budget = form.budget if request.budget is None else request.budget
    return Grid(
        model=(request.trained or "") if measure.trained else request.model,
        tasks=tuple(
            make_task(name, **{k: v for k, v in options.items() if k in options_of(name)})
            for name in expand(list(form.tasks))
        ),
        methods=parse_methods(methods, budget),
        budget=budget,
        limit=form.limit if request.limit is None else request.limit,
        seed=request.seed,
        batch=request.batch,
    )
