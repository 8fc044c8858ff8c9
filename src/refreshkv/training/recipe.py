"""Everything that decides what a run trains: the defaults are the paper's (RefreshKV, section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from refreshkv.config import RefreshConfig, Settings, at_least, setting

if TYPE_CHECKING:
    from refreshkv.training.tail import Tail

Keep = Literal["all", "budget"]
PAPER = RefreshConfig(budget=2048, stride=None)


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """What is trained on what, and how. A wrong value is a `ValueError` that names it.

    Attributes:
        model: as it was given, for the records.
        data: likewise.
        length: L, tokens that attend causally.
        tail: S, the tokens after them, which attend as decode steps do.
        config: what those attend to; see `Tail`.
        keep: what becomes of the selected tokens: all stay (paper), or new ones push them out of the budget, as in
            decoding (ours).
        shortest: L is drawn for every batch between this and the length; `None`: it is the length (ours).
        documents: at most so many long enough ones are used.
        rate: the highest learning rate; it falls linearly to 0.
        batch: sequences of an optimiser step, over all processes.
        micro_batch: sequences that a process computes at a time.
        epochs: passes over the training data.
        steps: optimiser steps; `None`: those of the epochs.
        warmup: steps in which the rate rises.
        lora: rank of adapters that are trained and then merged (peft); `None`: all weights are trained (ours).
        seed: of the order of the data.
    """

    model: str
    data: str
    config: RefreshConfig = PAPER
    length: int = at_least(8, 8192)
    tail: int = at_least(2, 50)
    keep: Keep = "all"
    shortest: int | None = at_least(8, None, ", or None")
    documents: int = at_least(3, 200_000)
    rate: float = setting(5e-6, "must be > 0 and finite", lambda rate: 0.0 < rate < math.inf)
    batch: int = at_least(1, 64)
    micro_batch: int = at_least(1, 1)
    epochs: int = at_least(1, 1)
    steps: int | None = at_least(1, None, ", or None")
    warmup: int = at_least(0, 20)
    lora: int | None = at_least(1, None, ", or None")
    seed: int = at_least(0, 0)

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        super().__post_init__()
        if self.shortest is not None and self.shortest > self.length:
            raise ValueError(f"shortest is {self.shortest}, more than length, {self.length}")
        self.of_tail()

    @staticmethod
    def unread(settings: Mapping[str, Any]) -> dict[str, str]:
        """See `Settings.unread`."""
        found = {} if settings["steps"] is None else {"epochs": "beside steps; leave one out"}
        if settings["config"].mode == "mixed":
            found["keep"] = "in mode 'mixed', which reads all entries; leave it out"
        return found

    def of_tail(self) -> Tail:
        """What the objective takes."""
        # It needs torch, which options and their defaults do not.
        from refreshkv.training.tail import Tail

        return Tail(self.tail, self.config, self.keep)

    def accumulation(self, processes: int) -> int:
        """Batches of a process in an optimiser step. Raises `ValueError` where `batch` is not made of whole ones."""
        at_once = self.micro_batch * processes
        if self.batch % at_once:
            raise ValueError(
                f"batch {self.batch} is not made of whole batches of {self.micro_batch} in {processes} process(es);"
                f" give a multiple of {at_once}"
            )
        return self.batch // at_once

    def described(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)
