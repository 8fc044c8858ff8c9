"""Many short requests, some of them aborted: nothing leaks, and the answers stay those of stock vLLM."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.vllm.engines import (
    Answer,
    Elsewhere,
    Engine,
    Prompt,
    Stock,
    answer,
    assert_same,
    prompt,
)

REQUESTS, LEAST, SECONDS = 2000, 200, 60.0  # of each engine; on a slow machine not all
NEW, AT_ONCE = 12, 16


@dataclass
class Soak:
    """What came of it; `sizes` of the process after each twentieth of the requests."""

    begun: int = 0
    aborted: int = 0
    rows: int = 0
    kept: list[tuple[Prompt, Answer]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Bytes a request, after the first quarter of them."""
        at = len(self.sizes) // 4
        return (self.sizes[-1] - self.sizes[at]) / (self.begun * (1 - at / len(self.sizes)))


def soak(settings: dict[str, Any] | None) -> Soak:
    """Requests that come, go and leave, in an engine with room for a few of them."""
    choose, found = random.Random(7), Soak()
    texts = [prompt(choose.randrange(20, 260), seed) for seed in range(24)]
    running: dict[str, Prompt] = {}
    with Engine(settings, max_num_seqs=AT_ONCE, num_gpu_blocks_override=64) as engine:
        free, end = engine.free_blocks, time.monotonic() + SECONDS
        more = True
        while running or more:
            more = found.begun < (REQUESTS if time.monotonic() < end else LEAST)
            while more and len(running) < 2 * AT_ONCE:
                # One of some texts, cut anywhere: prefix hits, and blocks that are freed and filled anew.
                text = choose.choice(texts)
                text = text[: choose.randrange(10, len(text) + 1)]
                running[engine.begin(text, NEW)] = text
                found.begun += 1
                if found.begun % (REQUESTS // 20) == 0:
                    found.sizes.append(psutil.Process().memory_info().rss)
                more = found.begun < REQUESTS
            for out in engine.step():
                text = running.pop(out.request_id)
                if choose.random() < 0.02:
                    found.kept.append((text, answer(out)))
            if running and choose.random() < 0.15:
                name = choose.choice(list(running))
                engine.abort(name)
                del running[name]
                found.aborted += 1
        engine.step(2)
        assert engine.free_blocks == free and not engine.core.has_unfinished_requests()
        if settings is not None:
            found.rows = engine.counts().rows
    return found


def test_soak(stock: Stock) -> None:
    # Stock vLLM grows too: its matrix products keep something for every number of tokens that they have seen.
    with Elsewhere({"VLLM_PLUGINS": "", "REFRESHKV_VLLM_CPU": "0"}) as elsewhere:
        usual = elsewhere.run(soak, None)
    for settings in ({"mode": "mixed", "budget": 2048}, {"mode": "refresh", "budget": 2048}):
        with Elsewhere({"REFRESHKV_VLLM_CPU": "1"}) as elsewhere:
            found = elsewhere.run(soak, settings)
        print(f"{found.begun} requests, {found.aborted} aborted, {len(found.kept)} compared")
        print(f"{found.growth:.0f} bytes a request, stock {usual.growth:.0f}")
        assert found.begun >= LEAST and found.aborted > 10 and found.rows > 1000
        assert found.growth < 1.5 * usual.growth + 16384
        texts, answers = zip(*found.kept, strict=True)
        assert_same(answers, stock.generate(texts, NEW))
