"""RefreshKV: long outputs from long inputs over a small KV cache that is refreshed, not evicted.

The method of Xu, Goyal and Choi, "RefreshKV: Updating Small KV Cache During Long-form Generation", ACL 2025.

Letters in every shape of this package: B batch (rows), Hq query heads, Hkv KV heads, G = Hq / Hkv (GQA group), D head
dim, T tokens of one pass, L tokens so far, K budget (slots of a partial cache), S stride.

The algorithm is in `policy.selection`, `policy.triggers` and `step`, its arithmetic in `kernels.reference`. Importing
this package changes nothing and imports neither torch nor transformers until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from refreshkv.config import PRESETS as PRESETS
    from refreshkv.config import RefreshConfig as RefreshConfig
    from refreshkv.config import make_config as make_config
    from refreshkv.hosts.transformers import PROVEN_ARCHITECTURES as PROVEN_ARCHITECTURES
    from refreshkv.hosts.transformers import RefreshCache as RefreshCache
    from refreshkv.hosts.transformers import Session as Session
    from refreshkv.hosts.transformers import UnsupportedModelError as UnsupportedModelError
    from refreshkv.hosts.transformers import attach as attach
    from refreshkv.hosts.transformers import detach as detach
    from refreshkv.hosts.transformers import supported as supported
    from refreshkv.presets import load_preset as load_preset

_HOME = {
    "PRESETS": "refreshkv.config",
    "RefreshConfig": "refreshkv.config",
    "load_preset": "refreshkv.presets",
    "make_config": "refreshkv.config",
    "PROVEN_ARCHITECTURES": "refreshkv.hosts.transformers",
    "RefreshCache": "refreshkv.hosts.transformers",
    "Session": "refreshkv.hosts.transformers",
    "UnsupportedModelError": "refreshkv.hosts.transformers",
    "attach": "refreshkv.hosts.transformers",
    "detach": "refreshkv.hosts.transformers",
    "supported": "refreshkv.hosts.transformers",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refreshkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
