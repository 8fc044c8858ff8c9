"""`Method`: what a comparison calls by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refreshkv.config import Budgeted, RefreshConfig, check_names, make_config, names_of
from refreshkv.step import Algorithm

# `(settings, index of the layer among the served ones, number of served layers)` -> what drives that layer.
Make = Callable[[Any, int, int], Algorithm]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to decode.

    Attributes:
        name: as given to `attach(model, method=...)`.
        label: for people.
        source: the paper, and where in it.
        note: what its paper fixes, and where ours differs.
        settings: the class of its settings.
        preset: of RefreshKV, what its settings start from.
        fixed: the settings that make the method what it is; nobody may give others.
        make: makes the algorithm of one layer; `None` is RefreshKV's own.
    """

    name: str
    label: str
    source: str
    note: str = ""
    settings: type[Budgeted] = RefreshConfig
    preset: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    make: Make | None = None

    @property
    def names(self) -> list[str]:
        """The settings that a caller may give."""
        return [n for n in names_of(self.settings) if n != "mode" and n not in self.fixed]

    def config(self, preset: str | Mapping[str, Any] | None = None, **overrides: Any) -> Budgeted:
        """The settings of a run: the method's own with `overrides` on top.

        Raises:
            ValueError: a setting that the method does not have, a value out of range, or a preset for a method that is
                not plain RefreshKV.
        """
        ours = self.settings is RefreshConfig
        if preset is not None and (not ours or self.preset or self.fixed):
            raise ValueError(
                f"method {self.name!r} has settings of its own: drop preset={preset!r}, or give single settings"
            )
        check_names(f"setting of {self.name}:", overrides, self.names)
        settings = {**self.fixed, **overrides}
        return make_config(preset or self.preset, **settings) if ours else self.settings(**settings)
