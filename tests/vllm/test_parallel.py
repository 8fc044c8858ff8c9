"""Two workers with a KV head each say what one says."""

from __future__ import annotations

from tests.vllm.engines import Elsewhere, assert_same, counted, ragged

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
ENVIRONMENT = {
    "REFRESHKV_VLLM_CPU": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def test_tensor_parallel() -> None:
    prompts = ragged((65, 300, 700))
    with Elsewhere(ENVIRONMENT) as elsewhere:
        for settings in (
            {"mode": "mixed", "budget": 64},
            {"mode": "refresh", "budget": 64, "threshold": None},
        ):
            found, half = elsewhere.run(counted, settings, prompts, **TWO)
            alone, counts = counted(settings, prompts)
            assert_same(found, alone, within=1e-2)
            assert (half.rows, half.partial) == (counts.rows, counts.partial)
            assert half.available == counts.available // 2
