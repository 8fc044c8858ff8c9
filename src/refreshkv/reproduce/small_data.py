"""Texts that the small forms read where none are given: made up, and the same for the same seed. Nobody's benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from refreshkv.evals.summary import write_whole
from refreshkv.tasks.ruler.questions import Person
from refreshkv.tasks.task import generator

_PEOPLE = 40  # some 15,000 characters: enough for the longest small prompt under any tokenizer


def write(path: Path, kind: str, seed: int, number: int) -> None:
    """A JSONL file of `number` records of a kind ("text", "summaries", "problems"); a larger one begins with the same.

    Raises:
        OSError: it cannot be written.
    """
    rows = (_KINDS[kind](generator(path.stem, seed, index)) for index in range(number))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _text(rng: np.random.Generator) -> Mapping[str, str]:
    """Made-up people and the towns they were born in."""
    seen: set[str] = set()
    return {
        "text": "\n\n".join(p for _ in range(_PEOPLE) for p in Person.draw(rng, seen).passages())
    }


def _summary(rng: np.random.Generator) -> Mapping[str, str]:
    """Such a text, and the first sentences of its first passages."""
    document = _text(rng)["text"]
    firsts = [passage.split(". ")[0] + "." for passage in document.split("\n\n")[:4]]
    return {"document": document, "summary": " ".join(firsts)}


def _problem(rng: np.random.Generator) -> Mapping[str, str]:
    """A sum of three numbers."""
    numbers = rng.integers(2, 99, 3).tolist()
    return {
        "problem": "A shelf holds {} red, {} green and {} blue books. How many is that?".format(
            *numbers
        ),
        "answer": str(sum(numbers)),
    }


_KINDS: Mapping[str, Callable[[np.random.Generator], Mapping[str, str]]] = {
    "text": _text,
    "summaries": _summary,
    "problems": _problem,
}
