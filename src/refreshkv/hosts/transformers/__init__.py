"""Hugging Face transformers: `attach`, the explicit `RefreshCache`, and `supported`.

Seams used, all documented by transformers: `AttentionInterface.register`, `AttentionMaskInterface.register`, a
`DynamicCache` whose full-attention layers are ours, and two methods of the one attached instance.
"""

from refreshkv.hosts.transformers.attach import Session, attach, detach
from refreshkv.hosts.transformers.cache import RefreshCache
from refreshkv.hosts.transformers.support import (
    PROVEN_ARCHITECTURES,
    Support,
    UnsupportedModelError,
    supported,
)

__all__ = [
    "PROVEN_ARCHITECTURES",
    "RefreshCache",
    "Session",
    "Support",
    "UnsupportedModelError",
    "attach",
    "detach",
    "supported",
]
