"""What is compared with full attention: modes and methods by name, and the settings that `--tune` tries of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refreshkv.config import Budgeted, RefreshConfig, make_config, unknown
from refreshkv.evals.grid import parse_method
from refreshkv.methods import METHODS, find

# What people call the modes: the method that says which settings there are, and what `attach` is given.
MODES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "exact": ("refreshkv", {"mode": "exact"}),
    "fast": ("refreshkv-fast", {"preset": "fast"}),
}
# The grid is small, each point a different trade of what is read and what is right.
# What drafts, and how sure it has to be to go on: what depends on model and text.
LOSSLESS: Mapping[str, Sequence[Any]] = {
    "drafter": ("partial", "mixed"),
    "confidence": (0.9, 0.5, 0.3),
}
MIXED: Mapping[str, Sequence[Any]] = {"budget": (1 / 32, 1 / 20, 1 / 10), "value_bits": (2, 1)}
PARTIAL: Mapping[str, Sequence[Any]] = {"budget": (1 / 32, 1 / 16, 1 / 8)}


@dataclass(frozen=True)
class Candidate:
    """What is compared with full attention: its name here, and the arguments of `attach`."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Budgeted:
        """What it runs with.

        Raises:
            ValueError: as `attach`.
        """
        rest = dict(self.arguments)
        method = rest.pop("method", None)
        return make_config(**rest) if method is None else find(method).config(**rest)

    @property
    def lossless(self) -> bool:
        """Whether its tokens are those of full attention by construction."""
        return self.config.mode in ("exact", "full")

    @property
    def preset(self) -> RefreshConfig | None:
        """The settings, where they can be a preset: full attention and other algorithms cannot."""
        config, method = self.config, self.arguments.get("method")
        own = isinstance(config, RefreshConfig) and config.mode != "full"
        return config if own and (method is None or find(method).make is None) else None


def parse_candidate(text: str) -> Candidate:
    """`exact`, `fast` or a method, with settings as in `grid.parse_method`: `exact:draft=8:confidence=0.5`.

    Raises:
        ValueError: an unknown name or setting, or a value out of range.
    """
    name, colon, rest = text.partition(":")
    if name not in MODES and name not in METHODS:
        raise ValueError(unknown("method", name, [*MODES, *METHODS]))
    method, arguments = MODES.get(name, (name, {"method": name}))
    spec = parse_method(method + colon + rest)
    return Candidate(text, {**arguments, **spec.settings})


def variants(candidate: Candidate) -> list[Candidate]:
    """The candidate at every point of its grid; a setting that was asked for stays, other algorithms stay as they are.

    Points at which a setting that was asked for has no effect are left out.

    Raises:
        ValueError: as `Candidate.config`.
    """
    preset = candidate.preset
    if preset is None:
        return [candidate]
    grid = {"exact": LOSSLESS, "mixed": MIXED}.get(preset.mode, PARTIAL)
    free = {name: values for name, values in grid.items() if name not in candidate.arguments}
    found = []
    for values in itertools.product(*free.values()):
        settings = dict(zip(free, values, strict=True))
        name = ":".join([candidate.name, *(f"{key}={value}" for key, value in settings.items())])
        point = Candidate(name, {**candidate.arguments, **settings})
        if _has_effect(point):
            found.append(point)
    return found


def _has_effect(candidate: Candidate) -> bool:
    """Whether everything that was asked for is read."""
    try:
        return candidate.preset is not None
    except ValueError:
        return False
