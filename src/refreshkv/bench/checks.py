"""Nothing wrong is timed: how far a result may be from the truth."""

from __future__ import annotations

import torch
from torch import Tensor

# Errors of correct computations in the same dtype are nearly the same: of whole models ours are .33 to 1.1 of those of
# transformers, of logits and of attention, on the demo and 1B shapes in bfloat16, float16 and float32.
FACTOR = 1.5
_SUMS = 32 * torch.finfo(torch.float32).eps  # what sums of a whole context in float32 may lose


class WrongResultError(RuntimeError):
    """Something does not compute what it should; nothing was timed."""


def relative_rms(found: Tensor, truth: Tensor) -> float:
    """Relative RMS of a result against the truth, both of the same shape."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm())


def within(what: str, error: float, unit: float) -> float:
    """The error of a result, where it is about what a trusted computation loses by rounding, its `unit`.

    Raises:
        WrongResultError: it is more than `FACTOR` units; NaN counts as more. `what` says whose.
    """
    if not error <= FACTOR * unit:
        raise WrongResultError(
            f"{what} by {error:.2g} (relative RMS), where rounding costs {unit:.2g}"
        )
    return error


def rounding(dtype: torch.dtype) -> float:
    """What a kernel may lose by rounding, relative RMS; its reference computes in float32 and rounds the output.

    A kernel rounds numbers of `dtype` once or twice more on the way: attention weights, numbers restored from codes.
    One rounding is at most half an `eps`, the RMS of two or three .3 to .5. An error of one in a hundred is found in
    every dtype.
    """
    return max(torch.finfo(dtype).eps / 2, _SUMS)
