"""The settings that `refreshkv compare --tune` tries: few, each a different trade of what is read and what is right."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from refreshkv.evals.compare import Candidate

# How sure a draft has to be to go on, and how many tokens are drafted at most: what depends on model and text.
LOSSLESS: Mapping[str, Sequence[Any]] = {"confidence": (0.9, 0.5, 0.3), "draft": (8, 16)}
LOSSY: Mapping[str, Sequence[Any]] = {"budget": (1 / 32, 1 / 16, 1 / 8)}


def variants(candidate: Candidate) -> list[Candidate]:
    """The candidate at every point of its grid; a setting that was asked for stays, other algorithms stay as they are.

    Raises:
        ValueError: as `Candidate.config`.
    """
    if candidate.preset is None:
        return [candidate]
    grid = LOSSLESS if candidate.lossless else LOSSY
    free = {name: values for name, values in grid.items() if name not in candidate.arguments}
    found = []
    for values in itertools.product(*free.values()):
        settings = dict(zip(free, values, strict=True))
        name = ":".join([candidate.name, *(f"{key}={value}" for key, value in settings.items())])
        found.append(Candidate(name, {**candidate.arguments, **settings}))
    return found
