"""What one decode step of a layer would launch on a GPU, by name: there a small step is as long as its launches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.kernels.interpreted import device  # isort: skip  # before any kernel
from refreshkv.config import RefreshConfig
from refreshkv.exact import Cycle, ExactLayer, ExactMixedLayer
from refreshkv.kernels.options import AttendOptions
from refreshkv.step import decode_step
from tests.helpers import random_tokens
from tests.kernels.launches import counting, run_triton
from tests.test_static import StaticDecoder
from tests.test_step import CONFIGS, FIXED, NEVER

PROMPT, STEPS = 24, 4
WRITE = ["write_kernel", "aten::add_"]
ATTEND = ["attend_kernel", "merge_kernel"]
SCORE = [*ATTEND, "score_kernel"]
SELECT = ["choose_kernel"]  # of up to 4,096 slots
DRIFT = CONFIGS["drift of a head"]  # decides in every second step
RECENT = replace(DRIFT, recent=2, budget=10)

pytestmark = pytest.mark.skipif(
    device().type == "cuda", reason="counted in the interpreter, over tensors of the CPU"
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run the Triton kernels."""
    run_triton(monkeypatch)


def launched(config: RefreshConfig, step: int, *, known: bool = True) -> list[str]:
    """What the `step`-th step (1, 2, ...) of a cache of the fixed form launches; `known`: its host knows what it is.

    The tokens, the mask and what a host makes of them are there before.
    """
    tokens = random_tokens(length=PROMPT + STEPS, rows=2, pads=(0, 3), dim=16)
    static = StaticDecoder(tokens, config, PROMPT, options=AttendOptions(scale=0.25))
    cache, seen = static.cache, []

    def counted(*given: object) -> torch.Tensor:
        with counting() as launches:
            output = decode_step(*given)
        seen.append(launches.names)
        return output

    static.run_step = counted
    written: list[list[str]] = []
    append = cache.append

    def append_counted(*given: torch.Tensor, **named: bool) -> None:
        with counting() as launches:
            append(*given, **named)
        written.append(launches.names)

    cache.append = append_counted  # type: ignore[method-assign]
    for now in range(1, step + 1):
        if known and config.mode == "refresh":
            cache.due = cache.trigger.kind(now)
        elif known and config.mode == "mixed":
            cache.due = "partial"
        static.next()
    return written[-1] + seen[-1]


def test_a_dense_step() -> None:
    assert launched(RefreshConfig(mode="full"), 2) == [*WRITE, *ATTEND]


@pytest.mark.parametrize("config", [NEVER, FIXED, DRIFT, RECENT], ids=lambda c: str(c.stride))
def test_a_partial_step_is_one_more(config: RefreshConfig) -> None:
    assert launched(config, 3) == [*WRITE, "push_kernel", *ATTEND]


def test_what_follows_the_best_is_fetched_in_one() -> None:
    names = launched(replace(NEVER, successor=2), 2)
    assert names[:5] == [*WRITE, "push_kernel", *ATTEND] and names[-1] == "fetch_kernel"
    assert (
        len(names) <= len(WRITE) + 1 + len(ATTEND) + 2
    )  # ranks, of one kernel where a block holds the ring


def test_a_full_step() -> None:
    assert launched(FIXED, 4) == [*WRITE, *SCORE, *SELECT, "refresh_kernel"]


@pytest.mark.parametrize("config", [DRIFT, RECENT], ids=["plain", "recent"])
def test_a_step_that_decides_by_its_query(config: RefreshConfig) -> None:
    full = [*SCORE, *SELECT, "refresh_kernel"]
    steps = [*WRITE, "drift_kernel", "push_kernel", *ATTEND, *full]
    assert launched(config, 2) == launched(config, 3, known=False) == steps


def test_a_step_that_its_partial_attention_decides_is_a_few_more() -> None:
    config = RefreshConfig(trigger="lse-drop", drop=1.0, budget=6)
    names = Counter(launched(config, 2))
    assert names["attend_kernel"] == names["merge_kernel"] == 2
    assert names["push_kernel"] == names["refresh_kernel"] == names["score_kernel"] == 1
    assert sum(count for name, count in names.items() if "::" in name) <= 20


class Lossless:
    """One layer of a cache of the fixed form in the lossless mode, over tensors of the CPU."""

    def __init__(self, config: RefreshConfig) -> None:
        self.tokens = random_tokens(length=PROMPT + 8, rows=2, pads=(0, 3), dim=16)
        static = StaticDecoder(self.tokens, config, PROMPT, options=AttendOptions(scale=0.25))
        self.cycle = Cycle(static.cache.store.lengths)
        given = static.cache, AttendOptions(scale=0.25), self.tokens.seen(PROMPT), self.cycle
        self.layer = (ExactMixedLayer if config.rounds else ExactLayer)(*given)

    def draft(self) -> list[str]:
        self.cycle.begin_draft(grows=False)
        at = slice(PROMPT, PROMPT + 1)
        parts = (self.tokens.queries, self.tokens.keys, self.tokens.values)
        with counting() as launches:
            self.layer.draft(*(part[:, :, at][:, :, 0] for part in parts))
        self.cycle.end_draft()
        return launches.names

    def verify(self) -> list[str]:
        at = slice(PROMPT, PROMPT + 4)
        parts = (self.tokens.queries, self.tokens.keys, self.tokens.values)
        self.cycle.counts.fill_(4)
        with counting() as launches:
            self.layer.verify(*(part[:, :, at] for part in parts))
        return launches.names

    def select(self) -> list[str]:
        with counting() as launches:
            self.layer.select()
        return launches.names


DRAFTS = RefreshConfig(mode="exact", budget=6, draft=5)


def test_a_draft_and_a_full_pass() -> None:
    run = Lossless(DRAFTS)
    assert run.draft() == ["write_kernel", "push_kernel", *ATTEND, "aten::index_copy_"]
    assert run.verify() == ["write_kernel", *ATTEND, "aten::copy_"]
    assert run.select() == [*SELECT, "refresh_kernel"]


def test_a_draft_that_fetches() -> None:
    names = Lossless(replace(DRAFTS, successor=2, anchor=0.25, recent=2)).draft()
    fetching = ["write_kernel", "push_kernel", *ATTEND, "best_kernel", "fetch_kernel"]
    assert names == [*fetching, "aten::index_copy_"]


MIXED = RefreshConfig(mode="mixed", budget=6)
OVER_CODES = ["score_kernel", "count_kernel", "attend_kernel", "merge_kernel"]


def test_a_mixed_step() -> None:
    """A host that knows in which steps no block is complete leaves out what would look for one."""
    assert launched(MIXED, 2) == [*WRITE, *OVER_CODES]
    names = launched(MIXED, 2, known=False)
    assert names[-4:] == OVER_CODES and len(names) <= len(WRITE) + len(OVER_CODES) + 7


def test_a_mixed_draft_and_a_full_pass() -> None:
    run = Lossless(RefreshConfig(mode="exact", drafter="mixed", budget=6, draft=5))
    names = run.draft()
    assert [name for name in names if "::" not in name] == ["write_kernel", *OVER_CODES]
    assert len(names) <= len(WRITE) + len(ATTEND) + 4
    assert run.verify() == ["write_kernel", *ATTEND, "aten::copy_"]
