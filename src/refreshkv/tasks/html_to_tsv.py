"""HTML to TSV: one table of a web page as tab-separated values (LongProc, Ye et al., 2025; RefreshKV, p. 6).

Own pages of several seeded tables with real tags, the wanted one named by its caption; or LongProc's own files.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refreshkv.tasks.longproc import html_examples
from refreshkv.tasks.task import Count, Example, Score, Seeded, answered, check_integers, fit
from refreshkv.tasks.words import CELLS, Endless, draw_word

INTRO = "Here is a web page with several tables.\n"
PAGE_OPEN, PAGE_CLOSE = "<html>\n<body>\n", "</body>\n</html>\n"
TABLE_OPEN, CAPTION_END = "<table>\n<caption>", "</caption>\n<tr><th>"
HEAD_CELL, HEAD_END = "</th><th>", "</th></tr>\n<tr><td>"
CELL, ROW, TABLE_END = "</td><td>", "</td></tr>\n<tr><td>", "</td></tr>\n</table>\n"
ASK = (
    "Write one of the tables as tab-separated values: a line for its header, then a line for each row, cells as they"
    " stand on the page. Caption of the table: "
)
PHRASES = (
    *(INTRO, PAGE_OPEN, PAGE_CLOSE, TABLE_OPEN, CAPTION_END),
    *(HEAD_CELL, HEAD_END, CELL, ROW, TABLE_END, ASK),
)
OTHER_ROWS = (2, 12)  # rows of the tables that are not asked for
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FENCE = re.compile(r"```tsv[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class HtmlToTsv(Seeded):
    """Settings: `length` of the prompt in tokens, `rows` of the wanted table, `columns` of all; or `data`.

    `data` is a JSON file of LongProc's; the other settings then mean nothing.
    """

    name = "html-to-tsv"
    metric = "row F1"
    number = 50  # the paper's
    recipe = (
        "Data: seeded pages of tables (words, names, prices, dates, numbers, codes, free text), as many as fit the"
        " length; or LongProc's files: --task-option html-to-tsv.data=html_to_tsv_0.5k.json (pages beside it).\n"
        "Prompt: the page, then the caption of the wanted table.\n"
        "Metric: the TSV stands in a ```tsv fence, else it is the whole output; the first line is the header. Cells are"
        " lower-cased, punctuation, articles and blanks dropped; a row counts if it stands anywhere in the other"
        " table; F1 of row precision and recall; unreadable output scores 0.\n"
        "Fed: the table itself, header first.\n"
        "Source: LongProc (Ye et al., 2025), html_to_tsv; the generated pages are ours."
    )
    length: int = 2048
    rows: int = 10
    columns: int = 3
    data: str | None = None

    def __post_init__(self) -> None:
        check_integers(self, length=1, rows=1, columns=1)

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`. Without a limit as many as in the paper, or all of a file."""
        if self.data is None:
            return super().examples(count, seed, limit)
        return html_examples(self.data, count, limit)

    def make(self, id: str, rng: np.random.Generator, count: Count) -> Example:
        """See `Seeded.make`."""
        seen: set[str] = set()
        wanted = Table.draw(rng, seen, self.rows, self.columns)
        low, high = OTHER_ROWS
        place = rng.random()
        others = Endless(
            lambda: Table.draw(rng, seen, int(rng.integers(low, high + 1)), self.columns)
        )

        def build(size: int) -> str:
            tables = others.first(size)
            tables.insert(int(place * (size + 1)), wanted)
            return page(tables) + request(wanted)

        return answered(id, build(fit(build, count, self.length)), wanted.tsv(), count)

    def score(self, example: Example, output: str) -> Score:
        """Value: F1 of rows. Parts: whether each row of the right table was found."""
        assert example.answer is not None
        fence = _FENCE.search(output)
        gold, found = read_rows(example.answer), read_rows(fence[1] if fence else output)
        parts = tuple(float(row in found) for row in gold)
        if not found or not any(parts):
            return Score(0.0, parts)
        precision = sum(row in gold for row in found) / len(found)
        recall = sum(parts) / len(parts)
        return Score(2 * precision * recall / (precision + recall), parts)


@dataclass(frozen=True)
class Table:
    """A caption, a header and rows of cells."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, seen: set[str], rows: int, columns: int) -> Table:
        """A table whose caption and first cells are in no other table drawn with the same `seen`."""
        caption = draw_word(rng, seen, (3, 4))
        header = tuple(draw_word(rng, seen) for _ in range(columns))
        kinds = [list(CELLS.values())[i] for i in rng.integers(0, len(CELLS), columns - 1)]
        body = [(draw_word(rng, seen), *(kind(rng) for kind in kinds)) for _ in range(rows)]
        return cls(caption, header, tuple(body))

    def html(self) -> str:
        """The table with its tags."""
        head = f"{TABLE_OPEN}{self.caption}{CAPTION_END}{HEAD_CELL.join(self.header)}{HEAD_END}"
        return head + ROW.join(CELL.join(row) for row in self.rows) + TABLE_END

    def tsv(self) -> str:
        """Header and rows, cells separated by tabs, each line with its newline."""
        return "".join("\t".join(row) + "\n" for row in (self.header, *self.rows))


def page(tables: list[Table]) -> str:
    """A page with these tables, and the words before it."""
    return INTRO + PAGE_OPEN + "".join(table.html() for table in tables) + PAGE_CLOSE


def request(table: Table) -> str:
    """The end of the prompt."""
    return f"{ASK}{table.caption}\n"


def read_rows(text: str) -> list[tuple[str, ...]]:
    """The rows of a TSV as normalised cells, without the header; a row of another width than it matches nothing."""
    lines = [line.split("\t") for line in text.strip().split("\n")]
    header, *body = lines
    if body and len(body[-1]) != len(header):
        body.pop()  # cut off, or a closing remark
    return [
        tuple(normalise(cell) for cell in row) if len(row) == len(header) else () for row in body
    ]


def normalise(cell: str) -> str:
    """Lower case, without punctuation, articles and blanks."""
    plain = cell.lower().translate(_PUNCTUATION)
    return "".join(_ARTICLES.sub(" ", plain).split())
