"""What a reader of a table has to know, a line each: the title first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from refreshkv.bench.shapes import SHAPES, config_of
from refreshkv.reproduce import paper
from refreshkv.reproduce.comparison import Cell
from refreshkv.reproduce.jobs import Request
from refreshkv.reproduce.tables import GENERATED, REASONING, TRAINING, Column

_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")


def lines(request: Request, config: Any, beside: str, found: Sequence[Cell]) -> list[str]:
    """The title and the notes; `config` is the model's, `beside` the family whose numbers stand beside."""
    return list(_lines(request, config, beside, found))


def _lines(request: Request, config: Any, beside: str, found: Sequence[Cell]) -> Iterator[str]:
    title = f"{request.table.title}, on {request.model}"
    yield title + (", small form: not comparable with the paper's numbers" if request.small else "")
    if request.small:
        yield "Short prompts, few examples, made-up texts where none are given: it shows that the path works."
    if request.family is None:
        yield (
            f"The paper has no model of type {config.model_type}: the threshold is {paper.THRESHOLDS[paper.LLAMA]},"
            " that of its Llama."
        )
    if request.table is REASONING:
        return
    theirs = paper.MODELS[beside]
    if has_shape(config, theirs.lower()):
        yield f"{request.model} has the shape of the paper's {theirs}, whose numbers stand beside."
    else:
        yield (
            f"{request.model} is not the paper's {theirs}, whose numbers stand beside: only what is kept of full"
            " attention can be compared."
        )
    pages = [name for name, given in request.data.items() if given == GENERATED]
    if pages:
        yield f"Pages of our own in the place of LongProc's: {', '.join(pages)}."
    if request.table is TRAINING and request.trained is None:
        yield (
            f"Without a trained model there is no column after: refreshkv train --model {request.model} --data arxiv"
            " --out RUN, then this command with --trained RUN."
        )
    counts = {cell.examples for cell in found}
    if counts and max(counts) < 20 and not request.small:
        yield "Fewer than 20 examples a column: the intervals are wide, and too narrow to be trusted."


def of_column(request: Request, column: Column) -> str:
    """What has to be known of one column: its own note, and that of the hub's data where they were read."""
    read = [m.data for m in column.measures if m.data is not None and not request.small]
    found = [column.note, *(data.note for data in read if data.name not in request.data)]
    return " ".join(dict.fromkeys(note for note in found if note))


def has_shape(config: Any, shape: str) -> bool:
    """Whether a model has the sizes of one of `SHAPES`."""
    config = config.get_text_config(decoder=True)
    assert shape in SHAPES
    known = config_of(shape)
    return config.model_type == known.model_type and all(
        getattr(config, name, None) == getattr(known, name) for name in _SHAPE
    )
