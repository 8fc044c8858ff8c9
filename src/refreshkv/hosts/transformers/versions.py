"""Which transformers this package was tested with, and what its releases call the same thing."""

from __future__ import annotations

import transformers
from packaging.version import Version

# As in pyproject.toml, whose range a test compares: from the first on, and before the second.
OLDEST, BEFORE = "5.16", "5.25"
VERSION = Version(transformers.__version__)


def check_version() -> None:
    """Raises `RuntimeError` outside the tested range: the seams we use move, and a missed one is plain attention."""
    if not Version(OLDEST) <= VERSION < Version(f"{BEFORE}.dev0"):
        raise RuntimeError(
            f"refreshkv was tested with transformers {OLDEST} and newer, before {BEFORE}, not with"
            f" {VERSION}: pip install 'transformers>={OLDEST},<{BEFORE}'"
        )


# The argument and the output of a model that hold its KV cache: renamed in 5.24.
CACHE = "cache" if Version("5.24.dev0") <= VERSION else "past_key_values"
