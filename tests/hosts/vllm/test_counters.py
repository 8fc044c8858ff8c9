"""What a vLLM server says of its rows: every row once, every byte of every worker, nothing left over after a pause."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from refreshkv.hosts.vllm import counters, settings
from refreshkv.hosts.vllm.counters import Counter, Counts, Reporter, line, reporter_for
from refreshkv.hosts.vllm.planner import Kind
from refreshkv.stats import COUNTS

ENTRY = 256  # bytes
READ, ROUNDED = COUNTS.index("read"), COUNTS.index("rounded")


def step(rows: int, tokens: int, kinds: list[Kind] | None = None, *, begins: bool = True) -> Any:
    """Of so many decode rows of together so many tokens, beside a prompt that `begins`."""
    told = None if kinds is None else np.array(kinds, dtype=np.int8)
    return SimpleNamespace(count=rows, entries=tokens, kinds=told, begins=begins)


def counter(layers: int = 2, heads: int = 3) -> Counter:
    return Counter(
        layers=layers, heads=heads, rows=4, entry_bytes=ENTRY, device=torch.device("cpu")
    )


def serve(one: Counter, rows: int, tokens: int, read: int, rounded: int = 0) -> None:
    """A step in which every head of every layer reads so many entries of each row, and bytes of codes."""
    one.follow(step(rows, tokens))
    for _ in range(one.layers):
        one.rows_of(rows)[..., READ] += read
        one.rows_of(rows)[..., ROUNDED] += rounded


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Counts]:
    found: list[Counts] = []
    monkeypatch.setattr(counters, "export", found.append)
    return found


def test_a_counter_counts() -> None:
    one = counter()
    one.follow(step(0, 0))
    serve(one, rows=2, tokens=300, read=10, rounded=100)
    found = one.collect()
    assert (found.rows, found.available, found.read) == (2, 300 * 6, 2 * 10 * 6)
    assert found.read_bytes == found.read * ENTRY + 2 * 100 * 6
    assert found.full_bytes == 300 * 6 * ENTRY
    assert one.collect() == Counts() and one.total() == found
    kinds = [Kind.FULL, Kind.PARTIAL, Kind.DUE, Kind.LOST, Kind.PROMPT, Kind.IDLE]
    one.follow(step(5, 50, kinds))
    found = one.collect()
    assert (found.rows, found.full, found.partial, found.lost) == (5, 2, 2, 1)


def test_what_vllm_tries_before_the_first_prompt_counts_for_nothing() -> None:
    """For its graphs and its memory; afterwards steps without a prompt count."""
    one = counter()
    one.follow(step(4, 4, begins=False))
    one.rows_of(4)[...] += 7
    assert one.rows == 0
    serve(one, rows=2, tokens=300, read=10)
    one.follow(step(2, 302, begins=False))
    found = one.collect()
    assert (found.rows, found.available, found.read) == (4, 602 * 6, 2 * 10 * 6)


def test_rows_are_those_of_the_first_group_and_bytes_of_all(exported: list[Counts]) -> None:
    lines: list[str] = []
    reporter = Reporter(3600, lines.append, first=True)
    groups = [counter(layers=2), counter(layers=4)]
    for number, one in enumerate(groups):
        reporter.add(f"layer.{number}", one)
        serve(one, rows=2, tokens=100, read=25)
    reporter.tell()
    reporter.tell()  # nothing more to say
    (found,) = exported
    assert (found.rows, found.read, found.available) == (2, 2 * 25 * 18, 100 * 18)
    assert lines == ["RefreshKV: 2 decode rows, 50.0% of entries read exactly, KV read 50.0%"]
    serve(groups[0], rows=1, tokens=100, read=100)
    groups[1].follow(step(1, 100))
    reporter.tell()
    assert exported[1].rows == 1 and exported[1].read == 600
    assert lines[1].startswith("RefreshKV: 1 decode row, 33.3% of entries")


def test_a_group_that_is_made_anew_starts_anew(exported: list[Counts]) -> None:
    """vLLM sets up a small cache first where it measures the memory of graphs."""
    reporter = Reporter(3600, print, first=True)
    for read in (50, 10):
        one = counter()
        reporter.add("layer.0", one)
        serve(one, rows=1, tokens=100, read=read)
        reporter.tell()
    assert [found.read for found in exported] == [300, 60]


def test_other_workers_count_their_heads_and_no_rows(exported: list[Counts]) -> None:
    lines: list[str] = []
    reporter = Reporter(3600, lines.append, first=False)
    one = counter()
    reporter.add("layer.0", one)
    one.follow(step(2, 100, [Kind.FULL, Kind.PARTIAL]))
    one.tally[..., READ] += 1
    reporter.tell()
    (found,) = exported
    assert (found.rows, found.full, found.partial) == (0, 0, 0)
    assert found.read == one.tally[..., READ].sum() > 0 and found.available == 600
    assert not lines


@pytest.mark.parametrize("interval", [0.05, 0.0])
def test_the_last_rows_before_a_pause_are_told(
    exported: list[Counts], monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    monkeypatch.setattr(counters, "_QUIET", 0.1)
    monkeypatch.setattr(counters, "_EVERY", 0.05)
    lines: list[str] = []
    reporter = Reporter(interval, lines.append, first=True)
    one = counter()
    reporter.add("layer.0", one)
    reporter.follow()
    serve(one, rows=2, tokens=100, read=25)
    until(lambda: bool(exported))
    assert exported[0].rows == 2
    assert len(lines) == bool(interval)


def test_steps_tell_at_the_interval(
    exported: list[Counts], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep)
    clock = [0.0]
    monkeypatch.setattr(counters, "time", now)
    reporter = Reporter(60, print, first=True)
    one = counter()
    reporter.add("layer.0", one)
    for clock[0] in (1.0, 59.0, 61.0, 100.0, 122.0):
        reporter.follow()
        serve(one, rows=1, tokens=10, read=1)
    assert [found.rows for found in exported] == [2, 2]


def test_the_thread_ends_with_its_engine() -> None:
    before = threading.active_count()
    reporter = Reporter(0.01, print, first=True)
    gone = weakref.ref(reporter)
    assert threading.active_count() == before + 1
    del reporter
    until(lambda: threading.active_count() == before)
    gc.collect()
    assert gone() is None


def test_an_engine_has_one_reporter_and_the_next_another() -> None:
    class Config:
        pass

    engine, other = Config(), Config()
    made, new = reporter_for(engine, lambda: Reporter(3600, print, first=True))
    again, old = reporter_for(engine, lambda: Reporter(3600, print, first=True))
    assert again is made and new and not old
    third, new = reporter_for(other, lambda: Reporter(3600, print, first=True))
    assert third is not made and new


def test_a_line_names_what_there_was() -> None:
    found = Counts(rows=1200, full=300, partial=899, lost=1, read=1, available=4, read_bytes=3)
    text = line(found - Counts() + Counts(full_bytes=10))
    assert text == (
        "RefreshKV: 1,200 decode rows, 300 full, 899 partial, 1 lost, 25.0% of entries read exactly, KV read 30.0%"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "mode mixed budget=0.05 key_bits=2 value_bits=2 skip=0.05"),
        ({"mode": "full"}, "mode full"),
        (
            {"preset": "paper-llama", "threshold": None, "stagger": False},
            "mode refresh budget=0.125 group_reduction=max pool_kernel=7 stride=5 threshold=None stagger=False",
        ),
    ],
)
def test_the_log_says_every_setting_that_is_read(given: dict[str, Any], words: str) -> None:
    assert settings.check(given).words == words


def until(holds: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
