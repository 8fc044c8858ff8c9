"""`Method`: what a comparison calls by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from refreshkv.config import RefreshConfig, make_config, unknown
from refreshkv.step import Algorithm

# `(settings, place of the layer among the served ones, number of served layers)` -> what drives that layer.
Make = Callable[[RefreshConfig, int, int], Algorithm]

# Every setting but the mode, which belongs to the method.
ALL_SETTINGS = tuple(f.name for f in fields(RefreshConfig) if f.name != "mode")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to decode.

    Attributes:
        name: as given to `attach(model, method=...)`.
        label: for people.
        source: the paper, and where in it.
        note: what its paper fixes, and where ours differs.
        settings: what it sets in `RefreshConfig`.
        uses: the settings that a caller may give; it has no others.
        make: makes the algorithm of one layer; `None` is RefreshKV's own.
    """

    name: str
    label: str
    source: str
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ALL_SETTINGS
    make: Make | None = None

    def config(self, preset: str | None = None, **overrides: Any) -> RefreshConfig:
        """The settings of a run: the method's own with `overrides` on top.

        Raises:
            ValueError: a setting that the method does not have, a value out of range, or a preset for a method that is
                not plain RefreshKV.
        """
        if preset is not None and (self.make is not None or self.settings):
            raise ValueError(
                f"method {self.name!r} has settings of its own: drop preset={preset!r}, or give single settings"
            )
        for key in overrides:
            if key not in self.uses:
                raise ValueError(unknown(f"setting of {self.name}:", key, self.uses))
        if self.make is not None:  # presets are RefreshKV's
            return RefreshConfig(**{**self.settings, **overrides})
        return make_config(preset, **{**self.settings, **overrides})
