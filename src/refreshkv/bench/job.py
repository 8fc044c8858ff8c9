"""What is timed: the settings of a run, checked and resolved, and how a record tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from refreshkv.bench.roofline import Load

if TYPE_CHECKING:
    import torch

WARM_UP = 2  # turns that are not timed
_SPARE = 8  # positions beyond those that a run needs


@dataclass(frozen=True)
class Job(Load):
    """A load on a shape and a machine. Strings for `device` and `dtype` become those of torch.

    Attributes:
        shape: a name in `shapes.SHAPES`, of random weights.
        device, dtype: of its weights and the caches.
        threads: of the CPU; `None` leaves torch's choice.
        steps, cycles: timed turns of single steps, and of cycles of the lossless mode.
        static: our single steps run on the static form of the cache, which a CUDA graph can hold; `None`: on a GPU.
        compiled: they are compiled too, as transformers' static cache always is on a GPU; that takes a minute or more.

    Raises:
        ValueError: an unknown shape, a number out of range.
    """

    shape: str = "llama-3.2-1b"
    device: torch.device = "cpu"  # type: ignore[assignment]  # resolved below
    dtype: torch.dtype = "bfloat16"  # type: ignore[assignment]
    threads: int | None = None
    steps: int = 20
    cycles: int = 4
    static: bool | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        import torch

        from refreshkv.bench.shapes import config_of

        super().__post_init__()
        config_of(self.shape)
        device = torch.device(self.device)
        static = device.type == "cuda" if self.static is None else self.static or self.compiled
        dtype = getattr(torch, str(self.dtype).removeprefix("torch."))
        for name, value in {"device": device, "dtype": dtype, "static": static}.items():
            object.__setattr__(self, name, value)

    @property
    def form(self) -> str:
        """Of our cache."""
        return "compiled" if self.compiled else "static" if self.static else "growing"

    @property
    def room(self) -> int:
        """Positions of a preallocated cache."""
        return self.context + self.draft + 1 + _SPARE
