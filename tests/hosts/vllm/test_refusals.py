"""What is not served is said before anything is served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from refreshkv.hosts.vllm import refusals


def config(**changes: Any) -> SimpleNamespace:
    """vLLM's configuration of a server that is served; `part__name=value` changes it."""
    parts: dict[str, Any] = {
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, enable_dbo=False),
        "cache_config": SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=False),
        "model_config": SimpleNamespace(use_mla=False),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    for name, value in changes.items():
        part, _, inner = name.partition("__")
        if inner:
            setattr(parts[part], inner, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


def test_an_ordinary_server_is_served() -> None:
    refusals.check(config())
    refusals.check(config(cache_config__cache_dtype="bfloat16"))
    refusals.check(config(speculative_config=SimpleNamespace(method="ngram")))
    refusals.check_layer(128, 128)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_config__use_mla": True}, "multi-head latent attention"),
        ({"model_config__attention_chunk_size": 8192}, "attention in chunks"),
        ({"model_config__rswa_window": 128}, "a window for new tokens"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"parallel_config__enable_dbo": True}, "dual-batch overlap"),
        ({"cache_config__cache_dtype": "fp8"}, "a KV cache of fp8"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"kv_transfer_config": SimpleNamespace()}, "--kv-transfer-config"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "'eagle'"),
        ({"speculative_config": SimpleNamespace(method="ngram_gpu")}, "'ngram_gpu'"),
    ],
    ids=str,
)
def test_what_a_server_is_refused_for(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(refusals.Refused, match=r"^RefreshKV does not serve .*; .*$") as error:
        refusals.check(config(**changes))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "layer, says",
    [
        ({"head_size": 576}, "heads of 576 dims (at most 512)"),
        ({"head_size": 512, "widest": 256}, "heads of 512 dims (at most 256)"),
        ({"head_size": 192, "value_size": 128}, "values of 128 dims beside keys of 192"),
        ({"head_size": 64, "alibi": True}, "ALiBi"),
    ],
    ids=str,
)
def test_what_a_layer_is_refused_for(layer: dict[str, Any], says: str) -> None:
    with pytest.raises(refusals.Refused) as error:
        refusals.check_layer(**layer)
    assert says in str(error.value)


def test_more_queries_of_a_kv_head_than_the_kernels_take() -> None:
    refusals.check_group(16, 16)
    refusals.check_group(64, None)
    with pytest.raises(refusals.Refused, match=r"17 query heads .* --tensor-parallel-size"):
        refusals.check_group(17, 16)
