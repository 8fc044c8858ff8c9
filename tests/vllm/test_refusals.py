"""A server that cannot do what it was told does not start, and says why in one line."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.engines import Engine


@pytest.mark.parametrize(
    "settings, options, says",
    [
        (
            {"budgte": 64},
            {},
            r"additional-config .*unknown setting .budgte.; did you mean .budget.",
        ),
        ({"mode": "exact"}, {}, "drafts and verifies"),
        ({"mode": "mixed", "stride": 5}, {}, "stride has no effect in mode 'mixed'"),
        ({"mode": "refresh", "recent": 4}, {}, "recent is not available in vLLM"),
        ({"stagger": False}, {}, "stagger has no effect"),
        ({"budget": 64}, {"kv_cache_dtype": "fp8"}, "a KV cache of fp8"),
        ({"budget": 64}, {"block_size": 32}, "block size"),
        ({"mode": "refresh"}, {"block_size": 96}, "block size"),
    ],
)
def test_it_refuses(settings: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says), Engine(settings, **options):
        pass
