"""Many short requests, some of them aborted: nothing leaks, and the answers stay those of stock vLLM."""

from __future__ import annotations

import random
import time
from typing import Any

import psutil
import pytest

from tests.vllm.engines import Answer, Engine, Prompt, Stock, answer, assert_same, prompt

REQUESTS, SECONDS = 2000, 60.0
NEW = 12
AT_ONCE = 16


@pytest.mark.parametrize(
    "settings", [{"mode": "mixed", "budget": 2048}, {"mode": "refresh", "budget": 2048}], ids=str
)
def test_soak(settings: dict[str, Any], stock: Stock) -> None:
    choose = random.Random(7)
    texts = [prompt(choose.randrange(20, 260), seed) for seed in range(24)]
    running: dict[str, Prompt] = {}
    kept: list[tuple[Prompt, Answer]] = []
    begun = aborted = 0
    sizes: list[int] = []
    with Engine(settings, max_num_seqs=AT_ONCE, num_gpu_blocks_override=64) as engine:
        free = engine.free_blocks
        end = time.monotonic() + SECONDS / 2
        while running or (begun < REQUESTS / 2 and time.monotonic() < end):
            while len(running) < 2 * AT_ONCE and begun < REQUESTS / 2 and time.monotonic() < end:
                # One of some texts, cut anywhere: prefix hits, and blocks that are freed and filled anew.
                text = choose.choice(texts)
                text = text[: choose.randrange(10, len(text) + 1)]
                running[engine.begin(text, NEW)] = text
                begun += 1
            for out in engine.step():
                text = running.pop(out.request_id)
                if choose.random() < 0.05:
                    kept.append((text, answer(out)))
            if choose.random() < 0.15 and running:
                name = choose.choice(list(running))
                engine.abort(name)
                del running[name]
                aborted += 1
            if begun % 100 == 0:
                sizes.append(psutil.Process().memory_info().rss)
        engine.step(2)
        assert engine.free_blocks == free and not engine.core.has_unfinished_requests()
        counts = engine.counts()
    print(
        f"{begun} requests, {aborted} aborted, {len(kept)} compared, {sizes[-1] - sizes[len(sizes) // 4]} bytes more"
    )
    assert begun > 100 and aborted > 10 and counts.rows > 1000
    assert sizes[-1] - sizes[len(sizes) // 4] < 32 << 20
    kept = kept[-40:]
    assert_same([one for _, one in kept], stock.generate([text for text, _ in kept], NEW))
