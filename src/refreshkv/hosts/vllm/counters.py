"""What a server's decode rows read: in its log at an interval, and in `/metrics` where Prometheus is shared.

Counters live in the workers. `/metrics` is answered by another process, which sees them where vLLM uses Prometheus'
multi-process mode: with several API servers, or wherever PROMETHEUS_MULTIPROC_DIR is set (`refreshkv serve` sets it).
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreshkv.hosts.vllm.planner import Kind
from refreshkv.hosts.vllm.steps import Step
from refreshkv.stats import COUNTS

_EVERY = 10.0  # seconds between two updates of the metrics where the log is silent
_QUIET = 1.0  # seconds without a step after which there may be none to come
_ROWS = ("rows", "full", "partial", "lost")


@dataclass
class Counts:
    """Of rows, and sums over layers and KV heads.

    Attributes:
        rows: decode rows.
        full: of those, full ones: every entry was read, in the published mode where nothing asked the query.
        partial: those that read their partial cache, due ones among them.
        lost: full ones because there was no state.
        full_heads: KV heads of a layer and row that read everything.
        read: entries that were read exactly.
        available: entries that full attention would have read.
        read_bytes: of keys, values and their copy in few bits.
        full_bytes: that full attention would have read.
    """

    rows: int = 0
    full: int = 0
    partial: int = 0
    lost: int = 0
    full_heads: int = 0
    read: int = 0
    available: int = 0
    read_bytes: int = 0
    full_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, n) + getattr(other, n) for n in _NAMES))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, n) - getattr(other, n) for n in _NAMES))

    def without_rows(self) -> Counts:
        """These, of rows that are counted elsewhere."""
        return replace(self, **dict.fromkeys(_ROWS, 0))


_NAMES = [one.name for one in fields(Counts)]


class Counter:
    """The counts of one group of layers, which share their rows.

    Nothing is ever set back, so that whoever asks, in whatever thread, takes nothing from the others.

    Args:
        layers: how many there are.
        heads: Hkv.
        rows: the most that a step has.
        entry_bytes: of the key and value of one token and KV head.
        device: of the layers.

    Attributes:
        tally: `[rows, Hkv, 5]` int64, what the kernels add to.
    """

    def __init__(
        self, *, layers: int, heads: int, rows: int, entry_bytes: int, device: torch.device
    ) -> None:
        self.layers, self.heads, self.entry_bytes = layers, heads, entry_bytes
        self.tally = torch.zeros(rows, heads, len(COUNTS), dtype=torch.int64, device=device)
        self._host, self._collected = Counts(), Counts()
        self._begun = False

    def rows_of(self, count: int) -> Tensor:
        """The tally of so many rows."""
        return self.tally[:count]

    def follow(self, step: Step) -> None:
        """A step begins. What vLLM tried before the first prompt, for its graphs and its memory, counts for nothing."""
        if not self._begun:
            if not step.begins:
                return
            self._begun = True
            self.tally.zero_()
        host, kinds = self._host, step.kinds
        host.rows += step.count
        host.available += step.entries * self.heads * self.layers
        if kinds is not None:
            host.full += int(np.isin(kinds, (Kind.FULL, Kind.PROMPT)).sum())
            host.lost += int((kinds == Kind.LOST).sum())
            host.partial += int(np.isin(kinds, (Kind.PARTIAL, Kind.DUE)).sum())

    @property
    def rows(self) -> int:
        """Decode rows so far."""
        return self._host.rows

    def total(self) -> Counts:
        """Everything since the beginning; waits for the device."""
        found = self._host + Counts()
        sums = dict(zip(COUNTS, self.tally.sum((0, 1)).tolist(), strict=True))
        found.full_heads, found.read = sums["full"], sums["read"]
        found.read_bytes = found.read * self.entry_bytes + sums["rounded"]
        found.full_bytes = found.available * self.entry_bytes
        return found

    def collect(self) -> Counts:
        """What was counted since the last call."""
        before, self._collected = self._collected, self.total()
        return self._collected - before


class Reporter:
    """Tells what the counters of one worker found, at an interval: as a line of the log, and to Prometheus.

    Steps tell it what time it is. A thread tells the rest where no step follows, so that the last rows before a pause
    are seen too; it ends when the reporter is dropped.

    Args:
        interval: seconds between two lines; 0: none, only metrics.
        report: takes a line of the log.
        first: this is the first worker of its server. Tensor and pipeline parallel workers have the same rows, so this
            one alone counts them and writes lines, as all groups of layers have the same rows, and those of the first
            count. Entries and bytes are of the worker's own heads and layers; the metrics are sums over all of them.
    """

    def __init__(self, interval: float, report: Callable[[str], Any], *, first: bool) -> None:
        self._report = report if interval and first else None
        self._every, self._first = interval or _EVERY, first
        self._counters: dict[str, Counter] = {}
        self._told: dict[str, Counts] = {}
        self._last = self._stepped = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=_watch, args=(weakref.ref(self), self._every), daemon=True).start()

    def add(self, name: str, counter: Counter) -> None:
        """The counter of a group of layers; a later one of that name takes its place."""
        with self._lock:
            self._counters[name], self._told[name] = counter, Counts()

    def follow(self) -> None:
        """A step begins."""
        self._stepped = time.monotonic()
        if self._stepped - self._last >= self._every:
            self.tell()

    def tell_if_idle(self) -> None:
        """Tell what there is, if the steps do not."""
        if time.monotonic() - self._stepped >= _QUIET:
            self.tell()

    def tell(self) -> None:
        """A line of the log, and the metrics, if there were decode rows."""
        with self._lock:
            self._last = time.monotonic()
            if all(one.rows == self._told[name].rows for name, one in self._counters.items()):
                return
            found = Counts()
            for number, (name, counter) in enumerate(self._counters.items()):
                total = counter.total()
                new, self._told[name] = total - self._told[name], total
                found = found + (new if number == 0 else new.without_rows())
        if self._report is not None:
            self._report(line(found))
        export(found if self._first else found.without_rows())


def _watch(reporter: weakref.ref[Reporter], every: float) -> None:
    while True:
        time.sleep(every)
        found = reporter()
        if found is None:
            return
        found.tell_if_idle()
        del found


_newest: tuple[weakref.ref[Any], weakref.ref[Reporter]] | None = None


def reporter_for(owner: object, make: Callable[[], Reporter]) -> tuple[Reporter, bool]:
    """The reporter of an engine's worker, known by an object that is its own, and whether it is new.

    vLLM makes the groups of layers of an engine one after the other, before those of another engine.
    """
    global _newest
    if _newest is not None and _newest[0]() is owner:
        if (known := _newest[1]()) is not None:
            return known, False
    made = make()
    _newest = weakref.ref(owner), weakref.ref(made)
    return made, True


def line(counts: Counts) -> str:
    """Of a log."""
    parts = [f"{counts.rows:,} decode row{'s' * (counts.rows != 1)}"]
    for name in ("full", "partial", "lost"):
        if number := getattr(counts, name):
            parts.append(f"{number:,} {name}")
    parts.append(f"{counts.read / max(1, counts.available):.1%} of entries read exactly")
    share = counts.read_bytes / max(1, counts.full_bytes)
    return f"RefreshKV: {', '.join(parts)}, KV read {share:.1%}"


METRICS = {  # attribute of `Counts` -> name and description
    "rows": ("rows", "Decode rows that RefreshKV served"),
    "full": ("full", "Decode rows that read everything, by the published rule"),
    "partial": ("partial", "Decode rows that read their partial cache"),
    "lost": ("lost", "Decode rows that read everything because their state was gone"),
    "read": ("exact_entries", "Entries read exactly, over layers and KV heads"),
    "available": ("entries", "Entries that full attention would have read"),
    "read_bytes": ("read_bytes", "KV bytes read, codes included"),
    "full_bytes": ("full_bytes", "KV bytes that full attention would have read"),
}


def export(counts: Counts) -> None:
    """Add to the Prometheus counters `refreshkv_*_total` of this process."""
    for name, metric in _metrics().items():
        metric.inc(getattr(counts, name))


@functools.cache
def _metrics() -> dict[str, Any]:
    from prometheus_client import Counter as Metric

    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder and not os.path.isdir(folder):  # a worker on another machine, say: it serves without
        return {}
    return {key: Metric(f"refreshkv_{name}", says) for key, (name, says) in METRICS.items()}
