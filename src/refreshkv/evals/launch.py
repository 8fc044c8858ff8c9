"""Several processes on one grid, under `accelerate launch` or torchrun. In a single process nothing is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from refreshkv.evals.summary import need

# A process that is done waits for the slowest; torch's own limit of minutes is for training steps.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Team:
    """The processes of a launch, as this one sees them.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    _state: Any = None

    @property
    def is_main(self) -> bool:
        """The one process that owns the run directory."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def leave(self) -> None:
        """At the end: close the connections."""
        if self._state is not None:
            self._state.destroy_process_group()


def is_launch() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_cpu() -> bool:
    """Whether the launcher was told to leave GPUs alone (`accelerate launch --cpu`)."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")


def join(cpu: bool) -> Team:
    """Meet the other processes. With GPUs, each process gets one: the current device from here on.

    Args:
        cpu: the model will be on the CPU.

    Raises:
        ModuleNotFoundError: accelerate is not installed.
    """
    if not is_launch():
        return Team()
    accelerate = need("accelerate")
    import torch

    # Where there is no GPU, accelerate has to be told: otherwise each process takes itself for the only one.
    cpu = cpu or not torch.cuda.is_available()
    state = accelerate.PartialState(cpu=cpu, timeout=_PATIENCE)
    return Team(state.process_index, state.num_processes, state)
