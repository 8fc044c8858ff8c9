"""On a GPU, `make test-vllm-gpu`: in bfloat16, where two best tokens may be as good as equal. Not run yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.vllm.engines import BLOCK, Answer, Engine, Stock, prompt, ragged

pytestmark = pytest.mark.gpu
NEW = 40
PLAIN: dict[str, Any] = {"dtype": "bfloat16", "gpu_memory_utilization": 0.2}
OURS = PLAIN | {"attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}}}
MIXED = {"mode": "mixed", "budget": 64}
REFRESH = {"mode": "refresh", "budget": 64, "stride": 5}


def alike(found: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """The share of tokens before the first that differs."""
    same = [
        next(
            (i for i, (a, b) in enumerate(zip(x.tokens, y.tokens, strict=True)) if a != b),
            len(x.tokens),
        )
        for x, y in zip(found, expected, strict=True)
    ]
    return sum(same) / sum(len(x.tokens) for x in found)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "mixed", "budget": 2048},
        {"mode": "full"},
        {"mode": "refresh", "budget": 2048},
        {"mode": "refresh", "budget": 64, "stride": 1, "threshold": None},
    ],
    ids=str,
)
def test_whoever_reads_everything_is_stock(
    settings: dict[str, Any], eager: bool, stock: Stock
) -> None:
    prompts = ragged()
    with Engine(settings, **OURS | {"enforce_eager": eager}) as engine:
        found, counts = engine.generate(prompts, NEW), engine.counts()
    assert alike(found, stock.generate(prompts, NEW, **PLAIN)) > 0.9
    assert counts.rows == len(prompts) * (NEW - 1)
    assert counts.read == counts.available > 0


@pytest.mark.parametrize("settings", [MIXED, REFRESH], ids=str)
def test_a_batch_is_its_requests_alone(settings: dict[str, Any]) -> None:
    prompts = ragged()
    with Engine(settings, **OURS, enable_prefix_caching=False) as engine:
        together, counts = engine.generate(prompts, NEW), engine.counts()
        assert alike(together, engine.alone(prompts, NEW)) > 0.9
    assert 0 < counts.read < counts.available and counts.lost == 0


@pytest.mark.parametrize("settings", [MIXED, REFRESH], ids=str)
def test_graphs_of_whole_steps(settings: dict[str, Any]) -> None:
    """vLLM captures them, and requests that come and go get what they get without."""
    prompts, answers = ragged(), []
    new = [NEW + 5 * number for number in range(len(prompts))]
    for eager in (True, False):
        with Engine(settings, **OURS | {"enforce_eager": eager}) as engine:
            answers.append(engine.come_and_go(prompts, new))
            assert engine.counts().rows == sum(new) - len(new)
            mode = engine.core.vllm_config.compilation_config.cudagraph_mode
            assert mode.has_full_cudagraphs() is not eager
    assert alike(*answers) > 0.9


def test_codes_of_chunks_and_prefix_hits() -> None:
    shared = prompt(10 * BLOCK, 1)
    prompts = [shared + prompt(length, length)[1:] for length in (20, 65, 129)]
    with Engine(MIXED, **OURS, max_num_batched_tokens=192) as engine:
        engine.generate(prompts[:1], NEW)
        found = engine.generate(prompts, NEW)
    assert all(one.cached for one in found)
    with Engine(MIXED, **OURS, enable_prefix_caching=False) as engine:
        assert alike(found, engine.alone(prompts, NEW)) > 0.9
