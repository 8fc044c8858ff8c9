"""The report: self-contained, escaped, the same every time, and it says what the records say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from refreshkv.evals import plots, report
from refreshkv.evals.summary import summarize
from tests.evals import synthetic

METHODS = ("full", "snapkv", "refreshkv", "no-refresh")
TASKS = ("chain-of-key", "ruler-vt", "ruler-cwe", "perplexity", "summarization")
CONFIG = {
    "model": "demo",
    "seed": 0,
    "budget": 0.125,
    "limit": 4,
    "mode": "both",
    "tasks": {"chain-of-key": {"length": 2048, "data": None}},
    "methods": ["full", "refreshkv:stride=10"],
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return list(synthetic.records(TASKS, METHODS, examples=6))


@pytest.fixture(scope="module")
def page(records: list[dict]) -> str:
    return report.render(records, summarize(records), CONFIG)


class Outside(HTMLParser):
    """Collects what a page would load, and its open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(
                ("#", "data:")
            ):
                self.loaded.append(f"{tag} {value}")
            if name == "id":
                self.ids.append(value or "")


def parse(text: str) -> Outside:
    parser = Outside()
    parser.feed(text)
    return parser


def test_it_loads_nothing_and_runs_nothing(page: str) -> None:
    found = parse(page)
    assert found.loaded == []
    assert "script" not in found.tags
    assert "@import" not in page
    assert len(found.ids) == len(set(found.ids)), "ids of two plots collide"


def test_generated_text_is_escaped(records: list[dict]) -> None:
    evil = '<script>alert("1")</script><img src=x onerror=y>'
    own = [dict(r, output=evil, method=evil) for r in records if r["task"] == "ruler-vt"]
    text = report.render(own, summarize(own), CONFIG | {"model": evil})
    found = parse(text)
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert "&lt;script&gt;" in text


@pytest.mark.filterwarnings("ignore:Glyph")  # of plots: no font has them
def test_control_characters_do_not_get_into_the_page(records: list[dict]) -> None:
    """Nor do marks that turn the direction of text, wherever a name comes from; they are shown."""
    evil = "\x1b[2J\u202e\u2066\u200f\u061c\x85\x7f\r"
    own = [
        dict(
            r, output=f"a\x00b{evil}\tc\nd\ud800", method=f"m{evil}", task=f"t{evil}", example=evil
        )
        for r in records[:3]
    ]
    config = CONFIG | {"model": evil, "tasks": {f"t{evil}": {"x": evil}}, "methods": [f"m{evil}"]}
    text = report.render(own, summarize(own), config)
    seen = r"\x1b[2J\u202e\u2066\u200f\u061c\x85\x7f\r"
    assert rf"a\x00b{seen}" + "\tc\nd" + r"\ud800" in text
    assert f"<td>m{seen}</td>" in text
    assert not set(text) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
    assert not set(text) & set("\u061c\u200e\u200f\u202a\u202e\u2066\u2069\ud800")


def test_the_papers_tables_and_their_numbers(page: str, records: list[dict]) -> None:
    for title in ("Perplexity", "RULER", "Summarisation", "Long outputs, free", "Ablations, free"):
        assert f"<h2>{title}" in page
    tables = {t.title: t for t in report.tables(records, summarize(records))}
    assert tables["RULER"].columns == ("average", "ruler-vt", "ruler-cwe")
    assert [method for method, _ in tables["RULER"].rows] == list(METHODS)
    for method, cells in tables["Long outputs, free-running"].rows:
        own = [
            r["score"]
            for r in records
            if (r["task"], r["mode"], r["method"]) == ("chain-of-key", "free", method)
        ]
        (cell,) = cells
        assert cell is not None
        assert cell.score == f"{100 * sum(own) / len(own):.1f}"
    assert [m for m, _ in tables["Ablations, free-running"].rows] == [
        "full",
        "refreshkv",
        "no-refresh",
    ]


def test_best_is_never_full_attention(records: list[dict]) -> None:
    for table in report.tables(records, summarize(records)):
        for method, cells in table.rows:
            assert not (method == "full" and any(c is not None and c.best for c in cells))


def test_plots_of_every_kind(records: list[dict]) -> None:
    captions = [caption for _, caption in report.all_plots(records, summarize(records))]
    assert "chain-of-key, free: quality against KV read" in captions
    assert "chain-of-key, forced: quality by position in the output" in captions
    assert not any("perplexity" in c and "position" in c for c in captions)


def test_the_same_records_give_the_same_bytes(page: str, records: list[dict]) -> None:
    assert report.render(records, summarize(records), CONFIG) == page


def test_perplexities_stand_beside_full_attention(page: str, records: list[dict]) -> None:
    fed = [dict(r, kl=0.0125, said=[1, 2]) for r in records if r["task"] == "perplexity"]
    strange = [dict(r, method="<b>") if r["method"] == "snapkv" else r for r in fed]
    shown = report.render(strange, summarize(strange), {})
    start = shown.index("<h2>Beside full attention</h2>")
    rows = shown[start : shown.index("</tbody>", start)].split("<tr>")[2:]
    cells = [re.findall("<td>(.*?)</td>", row) for row in rows]
    assert [row[1] for row in cells] == ["full", "&lt;b&gt;", "refreshkv", "no-refresh"]
    assert cells[0][3:6] == ["1.0000", "[1.0000, 1.0000]", "100.0%"]
    assert all(row[6] == "0.0125" and float(row[3]) >= 1 for row in cells)
    alone = [r for r in records if r["method"] != "full"]
    assert "Beside full attention" in page
    assert "Beside full attention" not in report.render(alone, summarize(alone), {})


def test_the_command_re_makes_the_run(page: str) -> None:
    line = report.command(CONFIG)
    assert line.startswith("refreshkv eval --model demo --tasks chain-of-key --methods full,")
    for part in ("--budget 0.125", "--limit 4", "--mode both", "chain-of-key.length=2048"):
        assert part in line
    assert "None" not in line
    assert report.command({}) == ""


def test_a_method_that_beats_full_attention_is_pointed_at(records: list[dict]) -> None:
    own = [r for r in records if r["task"] == "ruler-vt"]
    better = [dict(r, score=float(r["method"] != "full")) for r in own]
    assert "suspect the" in report.render(better, summarize(better), CONFIG)


def test_no_records_give_an_empty_page() -> None:
    assert "<h1>" in report.render([], [], {})


def test_a_run_directory_gets_its_report(tmp_path: Path, records: list[dict]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = report.write_report(tmp_path, records, summarize(records))
    assert path == tmp_path / "report.html"
    assert re.search(r"budget</dt><dd>0.125", path.read_text())
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_strides_are_sums_over_examples(records: list[dict], page: str) -> None:
    (free, forced) = report.strides(records)
    assert (free.mode, forced.mode) == ("free", "forced")
    assert "full" not in dict(free.rows) and "refreshkv" in dict(free.rows)
    own = [r for r in records if (r["method"], r["mode"]) == ("refreshkv", "free")]
    for place, layer in enumerate(free.layers):
        counts = [record["layers"][str(layer)] for record in own]
        full, steps = (sum(one[name] for one in counts) for name in ("full_steps", "steps"))
        text, shade = dict(free.rows)["refreshkv"][place]
        assert text == ("never" if not full else f"{steps / full:.1f}")
        assert 0 <= shade <= 1
    assert "<h2>Steps per full step, free" in page


def test_a_plot_as_a_file(records: list[dict]) -> None:
    own = [s for s in summarize(records) if (s.task, s.mode) == ("chain-of-key", "free")]
    figure = plots.pareto(own, plots.styles(s.method for s in own), "chain-of-key")
    assert figure is not None
    assert plots.render(figure).startswith(b"<?xml")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [s.method for s in sorted(own, key=lambda s: -s.score)]
