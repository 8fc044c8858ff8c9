"""The tables as data: what each column measures, in the paper's form and in a small one, and under which methods.

We could not check the numbers of the paper's tables again, so each has a name too. Settings: RefreshKV (Xu, Goyal,
Choi, ACL 2025); the small forms are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refreshkv.config import unknown

GENERATED = "generated"  # as `--data html-0.5k=generated`


@dataclass(frozen=True)
class Data:
    """Where the texts of a measure come from.

    Attributes:
        name: as `--data NAME=PATH` calls it.
        kind: what the small form makes: "text", "summaries" or "problems"; "pages" the task makes itself.
        hub: what the task calls it on the hub; `None` where it has to be given.
        local: what may be given.
        note: what a reader has to know of the hub's.
    """

    name: str
    kind: str
    hub: str | None
    local: str
    note: str = ""


@dataclass(frozen=True)
class Form:
    """How a measure is taken.

    Attributes:
        tasks: of `refreshkv.tasks`, groups too.
        options: their settings.
        limit: examples a task; `None` is all that there are.
        budget: K of every method: tokens, or a share of the prompt.
        prompt, new: most tokens of a prompt, and about how many follow it; for plans.
    """

    tasks: tuple[str, ...]
    options: Mapping[str, Any]
    limit: int | None
    budget: int | float
    prompt: int
    new: int


@dataclass(frozen=True)
class Measure:
    """What one run directory holds; `trained`: of the trained model."""

    name: str
    full: Form
    small: Form
    data: Data | None = None
    trained: bool = False

    def form(self, small: bool) -> Form:
        """The one that is asked for."""
        return self.small if small else self.full


@dataclass(frozen=True)
class Column:
    """What stands over numbers of the paper: the mean of one measure or of several.

    Attributes:
        note: what a reader has to know who compares.
        rows: the names of the table's rows that it has; empty for all.
    """

    name: str
    title: str
    measures: tuple[Measure, ...]
    note: str = ""
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A method. `{threshold}` is the model family's, `{stride}` the mean stride that the row `like` has shown."""

    name: str
    label: str
    method: str
    like: str | None = None


@dataclass(frozen=True)
class Table:
    """Columns and rows, and what they say together. `number` is the paper's; `None` for what it does not have."""

    number: int | None
    name: str
    about: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = field(repr=False)

    def rows_of(self, column: Column) -> list[Row]:
        """The rows of a column, in the table's order."""
        return [row for row in self.rows if not column.rows or row.name in column.rows]

    def title_of(self, column: str) -> str:
        """What a column is called for people."""
        return next(one.title for one in self.columns if one.name == column)

    @property
    def title(self) -> str:
        """For people."""
        return self.name if self.number is None else f"Table {self.number}, {self.name}"


def _form(
    tasks: str, limit: int | None, budget: int | float, new: int, prompt: int = 0, **options: Any
) -> Form:
    """Of tasks between commas; the prompt is as long as its setting says."""
    return Form(tuple(tasks.split(",")), options, limit, budget, options.get("length", prompt), new)


def _perplexity(
    name: str, data: Data, length: int, scored: int, short: int, trained: bool = False
) -> Measure:
    full = _form("perplexity", 100, 2048, scored, length=length, scored=scored)
    small = _form("perplexity", 2, 64, 32, length=short, scored=32)
    return Measure(name, full, small, data, trained)


def _summaries(name: str, length: int, new: int, budget: int | float, limit: int = 100) -> Column:
    local = 'JSONL with "document", "summary" and, where a question is asked, "query"'
    full = _form("summarization", limit, budget, new, length=length, max_new_tokens=new)
    small = _form("summarization", 2, 0.125, 16, length=400, max_new_tokens=16)
    measure = Measure(name, full, small, Data(name, "summaries", name, local))
    return Column(name, f"{name}, ROUGE-L", (measure,), "The wording of the prompts is ours.")


def _pages(level: str, length: int, new: int, rows: int, short: int) -> Measure:
    name = f"html-{level}"
    local = f"LongProc's html_to_tsv_{level}.json, or '{GENERATED}' for pages of our own"
    full = _form("html-to-tsv", 50, 0.125, new, length=length, rows=rows)
    small = _form("html-to-tsv", 1, 0.125, 20 * short, length=500, rows=short)
    return Measure(name, full, small, Data(name, "pages", None, local))


_REDPAJAMA = "RedPajama without duplicates (SlimPajama): RedPajama itself needs a loading script."
_DOCUMENTS = 'a folder of text files, a text file, or JSONL with "text"'
_ARXIV = Data("arxiv", "text", "arxiv", _DOCUMENTS, _REDPAJAMA)
_BOOK = Data("book", "text", "books", _DOCUMENTS, _REDPAJAMA)
_LEVELS = (
    _pages("0.5k", 18_000, 500, 35, 1),
    _pages("2k", 35_000, 1600, 118, 2),
    _pages("8k", 38_000, 4600, 350, 3),
)
_F1 = "row F1"

FULL = Row("full", "full attention", "full")
STREAMING = Row("streaming-llm", "StreamingLLM", "streaming-llm")
H2O = Row("h2o", "H2O", "h2o")
SNAPKV = Row("snapkv-1", "SnapKV, window 1", "snapkv-1")
STRIDE_5, STRIDE_10 = (
    Row(
        f"stride-{stride}",
        f"RefreshKV, S {stride}",
        f"refreshkv-paper:stride={stride}:threshold={{threshold}}",
    )
    for stride in (5, 10)
)
METHODS = (FULL, STREAMING, H2O, SNAPKV, STRIDE_5, STRIDE_10)


def _texts(name: str, data: Data, rows: tuple[str, ...] = ()) -> Column:
    measure = _perplexity(name, data, 16_384, 256, 512)
    return Column(name, f"{name.capitalize()}, perplexity", (measure,), "", rows)


def _level(measure: Measure, rows: tuple[str, ...] = ()) -> Column:
    return Column(measure.name, f"HTML to TSV {measure.name[5:]}, {_F1}", (measure,), "", rows)


_RULER = Measure(
    "ruler",
    _form("ruler", 100, 0.125, 128, length=32_768),
    _form("ruler-fwe,ruler-qa-1,ruler-qa-2", 1, 0.125, 40, length=600),
)
_CHAIN = Measure(
    "chain-of-key",
    _form("chain-of-key", 100, 0.125, 50, length=22_000),
    _form("chain-of-key", 2, 0.125, 30, length=500, keys=3),
)
LANGUAGE = Table(
    2,
    "language-modelling",
    "perplexity of the last 256 tokens after 16K, and RULER at 32K",
    (
        _texts("arxiv", _ARXIV),
        _texts("book", _BOOK),
        Column(
            "ruler",
            "RULER, mean of its tasks",
            (_RULER,),
            "RULER's kinds in our own wording: what transfers is the share of full attention.",
        ),
    ),
    METHODS,
)
LONG_FORM = Table(
    3,
    "long-form",
    "long outputs: summaries, HTML to TSV, chains of keys",
    (
        _summaries("govreport", 10_000, 700, 0.125),
        _summaries("qmsum", 10_000, 100, 0.125),
        _summaries("novelsumm", 100_000, 1000, 4096, 103),
        Column("html-to-tsv", f"HTML to TSV, {_F1}, mean of 3 levels", _LEVELS),
        Column(
            "chain-of-key",
            "Chain of keys, valid prefix",
            (_CHAIN,),
            "The paper's numbers are of larger models, 70B and 72B; the words of our keys are made up.",
        ),
    ),
    METHODS,
)
_ABLATED = ("full", "snapkv-1", "stride-10", "no-reselection", "no-full-attention")
ABLATIONS = Table(
    4,
    "ablations",
    "what a refresh gains: re-selection, the full attention of its step, the time it is chosen",
    (_texts("arxiv", _ARXIV, _ABLATED), _level(_LEVELS[0], (*_ABLATED, "dynamic", "fixed"))),
    (
        *(FULL, SNAPKV, STRIDE_10),
        *(
            Row(f"no-{what}", label, f"no-{what}:stride=10:threshold={{threshold}}")
            for what, label in (
                ("reselection", "no re-selection"),
                ("full-attention", "no full attention"),
            )
        ),
        Row("dynamic", "by the query, S 5", STRIDE_5.method),
        Row("fixed", "fixed, same mean S", "refreshkv-fixed:stride={stride}", like="dynamic"),
    ),
)
TRAINING = Table(
    5,
    "continued-pretraining",
    "perplexity of the last 50 tokens before and after `refreshkv train`, K 2048, fixed strides",
    tuple(
        Column(
            f"{size}-{when}",
            f"{size.upper()}, {when} training, perplexity",
            (_perplexity(f"{size}-{when}", _ARXIV, length, 50, short, when == "after"),),
        )
        for size, length, short in (("8k", 8192, 256), ("16k", 16_384, 512))
        for when in ("before", "after")
    ),
    (
        *(FULL, STREAMING, H2O, SNAPKV),
        *(
            Row(f"fixed-{stride}", f"RefreshKV, S {stride}", f"refreshkv-fixed:stride={stride}")
            for stride in (10, 25, 50)
        ),
    ),
)
LEVELS = Table(
    10,
    "html-levels",
    "HTML to TSV by level: outputs of 0.5K, 1.6K and 4.6K tokens",
    tuple(map(_level, _LEVELS)),
    METHODS,
)


def _problems(name: str, hub: str | None, limit: int | None) -> Column:
    measure = Measure(
        name,
        _form("reasoning", limit, 1024, 16_384, 200, max_new_tokens=16_384),
        _form("reasoning", 2, 24, 48, 60, max_new_tokens=48),
        Data(name, "problems", hub, 'JSONL with "problem" and "answer"'),
    )
    return Column(name, f"{name}, answer right", (measure,))


OWN = "own"  # the column of the user's problems
REASONING = Table(
    None,
    "reasoning",
    "problems of mathematics with long outputs (not in the paper)",
    (
        _problems("math-500", "math-500", 100),
        _problems("aime-2024", "aime-2024", 30),
        _problems(OWN, None, None),
    ),
    (
        FULL,
        Row("fast", "mixed (fast)", "refreshkv-fast"),
        Row("lossless", "lossless", "refreshkv"),
        STRIDE_5,
    ),
)
TABLES = (LANGUAGE, LONG_FORM, ABLATIONS, TRAINING, LEVELS)


def find(asked: str) -> Table:
    """The table of that number or name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    for table in TABLES:
        if asked in (str(table.number), table.name):
            return table
    raise ValueError(
        unknown("table", asked, [name for t in TABLES for name in (str(t.number), t.name)])
    )
