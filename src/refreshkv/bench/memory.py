"""What a run of `bench decode` holds in memory, by arithmetic, and which variants fit beside each other.

One full store serves all variants. What a variant keeps for itself stays for the whole run; what a step of it takes is
free again afterwards, so of that only the largest counts. Letters: B rows, C positions of the store, K budget.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from refreshkv.bench.job import Job
from refreshkv.bench.roofline import Sizes
from refreshkv.bench.shapes import config_of
from refreshkv.bench.yardstick import WIDER

_SPARE = 2 << 30  # bytes: activations, the library's own, what is lost between blocks


class Need(NamedTuple):
    """Bytes that stay for the whole run, and bytes that a step takes beside them."""

    stays: int
    passes: int = 0


@dataclass(frozen=True)
class Needs:
    """Bytes of a run.

    Attributes:
        weights: of the model.
        store: K and V of B rows of C positions.
        checks: what the truth takes in the wider dtype.
        variants: by name.
    """

    weights: int
    store: int
    checks: int
    variants: dict[str, Need]

    def as_dict(self) -> dict[str, int]:
        """For a report: the parts, and of each variant what it adds at most."""
        parts = {"weights": self.weights, "store": self.store, "checks": self.checks}
        return parts | {name: sum(need) for name, need in self.variants.items()}

    def fitting(self, names: Iterable[str], available: float) -> dict[str, str]:
        """Those of `names`, the most important first, that must be left out of `available` bytes, with the reason.

        Raises:
            ValueError: not even the store fits.
        """
        stays, passes = self.weights + self.store + _SPARE, self.checks
        if stays + passes > available:
            raise ValueError(
                f"weights and one full store need {_gb(stays + passes)}, and there are {_gb(available)}: give fewer"
                " rows or a shorter context"
            )
        left_out = {}
        for name in names:
            need = self.variants[name]
            most = stays + need.stays + max(passes, need.passes)
            if most > available:
                left_out[name] = f"left out: needs {_gb(most)} with the others, of {_gb(available)}"
            else:
                stays, passes = stays + need.stays, max(passes, need.passes)
        return left_out


def needs_of(job: Job, sizes: Sizes) -> Needs:
    """The sizes of what `variants.caches` makes, and of the copies that transformers' steps make of it."""
    config = config_of(job.shape)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    group = config.num_attention_heads // heads
    counts = job.room, min(job.budget, job.room)
    store, kept = (job.batch * count * sizes.entry for count in counts)
    codes = round(job.batch * job.room * sizes.codes)
    votes = 4 * job.batch * heads * job.room * layers  # float32, of each layer
    # With a mask torch repeats the keys and values of a layer for every query head.
    repeated = group * store // layers
    # What is captured keeps that.
    static = Need(repeated) if job.device.type == "cuda" else Need(0, repeated)
    # One layer and the head, and one row's keys and values of a layer: thrice in the wider dtype; or in that of the
    # model, where torch repeats them for every query head, up to three times.
    wide = WIDER[job.dtype].itemsize
    row = job.room * sizes.entry // layers
    rows = max(3 * row * wide // sizes.itemsize, (2 + 3 * group) * row)
    head = config.vocab_size * config.hidden_size
    weights = (sizes.weights // sizes.itemsize - head) // layers + head
    return Needs(
        sizes.stored,
        store,
        wide * weights + rows,
        {
            **dict.fromkeys(("own_dense", "flash", "empty", "snapkv"), Need(0)),
            **dict.fromkeys(("partial", "full"), Need(kept)),
            "exact": Need(kept + votes),
            "mixed": Need(codes),
            "static": static,
            # Every step copies the whole cache to append to it.
            "default": Need(0, store + repeated),
        },
    )


def available(device: torch.device) -> float:
    """Bytes of the device that this process has or can get; without a limit that torch knows: infinitely many."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def measured(device: torch.device) -> dict[str, int]:
    """The most bytes that tensors of this process held since the last call, where torch counts them."""
    if device.type != "cuda":
        return {}
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"measured": most}


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
