"""What a table says of itself: whose model it is, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from refreshkv.bench.shapes import config_of
from refreshkv.reproduce import paper, tables
from refreshkv.reproduce.jobs import Request
from refreshkv.reproduce.notes import lines, of_column


def said(config: Any, table: tables.Table = tables.LEVELS, **given: Any) -> str:
    family = paper.family_of(config.model_type)
    request = Request(table=table, out=Path("out"), model="m", family=family, **given)
    return "\n".join(lines(request, config, family or paper.LLAMA, []))


@pytest.mark.parametrize(
    "shape, beside, threshold",
    [
        ("llama-3.1-8b", "m has the shape of the paper's Llama-3.1-8B", 0.85),
        ("llama-3.2-1b", "m is not the paper's Llama-3.1-8B", 0.85),
        ("qwen2-7b", "m has the shape of the paper's Qwen2-7B", 0.95),
        ("qwen3-8b", "m is not the paper's Qwen2-7B", 0.95),
    ],
)
def test_the_family_of_a_model(shape: str, beside: str, threshold: float) -> None:
    config = config_of(shape)
    text = said(config)
    assert beside in text and "no model of type" not in text
    family = paper.family_of(config.model_type)
    assert family is not None and paper.THRESHOLDS[family] == threshold


@pytest.mark.parametrize("table", [tables.LEVELS, tables.REASONING], ids=lambda table: table.name)
def test_a_model_of_no_family(table: tables.Table) -> None:
    text = said(AutoConfig.for_model("olmo2"), table)
    assert "no model of type olmo2: the threshold is 0.85" in text


def test_what_is_missing_or_in_the_place_of_something() -> None:
    config = config_of("llama-3.1-8b")
    assert "refreshkv train --model m" in said(config, tables.TRAINING)
    assert "refreshkv train" not in said(config, tables.TRAINING, trained="t")
    given = {"html-0.5k": "generated", "html-2k": "a.json"}
    assert "in the place of LongProc's: html-0.5k." in said(config, data=given)
    assert (
        said(config, small=True).splitlines()[0].endswith("not comparable with the paper's numbers")
    )


def test_a_note_on_data_is_of_what_was_read() -> None:
    column = tables.LANGUAGE.columns[0]
    for given, hub in (({}, True), ({"data": {"arxiv": "a.txt"}}, False), ({"small": True}, False)):
        request = Request(table=tables.LANGUAGE, out=Path("out"), model="m", **given)  # type: ignore[arg-type]
        assert ("SlimPajama" in of_column(request, column)) == hub
