"""What every operation computes, in short, readable float32; any device."""

from refreshkv.kernels.reference.attention import (
    attend,
    attend_and_rank,
    attend_and_score,
    score,
    top_slots,
    verify,
    vote,
)
from refreshkv.kernels.reference.mixed import attend_mixed, encode
from refreshkv.kernels.reference.rings import drift, fetch, push, refresh, write
from refreshkv.policy.selection import select

__all__ = [
    "attend",
    "attend_and_rank",
    "attend_and_score",
    "attend_mixed",
    "drift",
    "encode",
    "fetch",
    "push",
    "refresh",
    "score",
    "select",
    "top_slots",
    "verify",
    "vote",
    "write",
]
