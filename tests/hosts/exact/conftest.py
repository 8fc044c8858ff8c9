"""Settings under which drafts are refused, and under which they stand."""

from __future__ import annotations

import pytest

from refreshkv import RefreshConfig

from .driver import CONFIGS


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> RefreshConfig:
    return CONFIGS[request.param]
