"""Nothing wrong is timed: how far a result may be from one that is trusted."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative RMS. Measured of logits: 4e-7 in float32 and 1e-3 in float16 on the demo shape; in bfloat16 on the 1B shape
# .005 for our full attention, .032 for a full step, which rounds attention logits to bfloat16 in each of 16 layers.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 0.05}


class WrongResultError(RuntimeError):
    """Something does not compute what it should; nothing was timed."""


def compare(difference: str, ours: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Relative RMS of `ours` against what is `expected`, both of the same shape.

    Args:
        difference: what to say of one that is too large: "logits differ from ..".
        dtype: that of the computation, which sets the tolerance.

    Raises:
        WrongResultError: more than the tolerance.
    """
    expected = expected.double()
    error = float((ours.double() - expected).norm() / expected.norm())
    if not error < TOLERANCE[dtype]:
        raise WrongResultError(f"{difference} by {error:.2g} (relative RMS)")
    return error
