"""What a server's decode rows read: in its log at an interval, and in `/metrics` where Prometheus has several processes.

Counters live in the workers. `/metrics` is answered by another process, which sees them where vLLM uses Prometheus'
multi-process mode: with several API servers, or wherever PROMETHEUS_MULTIPROC_DIR is set (`refreshkv serve` sets it).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refreshkv.hosts.vllm.planner import Kind
from refreshkv.hosts.vllm.steps import Step
from refreshkv.stats import COUNTS


@dataclass
class Counts:
    """Sums over layers and KV heads of one group of layers.

    Attributes:
        rows: decode rows.
        full: of those, full ones: every entry was read, in the published mode where nothing asked the query.
        partial: those that read their partial cache, due ones among them.
        lost: full ones because there was no state.
        full_heads: KV heads of a layer and row that read everything.
        read: entries that were read exactly.
        code_bytes: of the copy in few bits.
        available: entries that full attention would have read.
    """

    rows: int = 0
    full: int = 0
    partial: int = 0
    lost: int = 0
    full_heads: int = 0
    read: int = 0
    code_bytes: int = 0
    available: int = 0

    def add(self, other: Counts) -> None:
        """The sums of both."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


class Counter:
    """The counts of one group of layers, which share their rows.

    Args:
        layers: how many there are.
        heads: Hkv.
        rows: the most that a step has.
        entry_bytes: of the key and value of one token and KV head.
        interval: seconds between two reports; 0: none.
        report: takes a line of the log.
        device: of the layers.

    Attributes:
        tally: `[rows, Hkv, 5]` int64, what the kernels add to.
        total: since the beginning, but for what is still in the tally.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        rows: int,
        entry_bytes: int,
        interval: float,
        report: Callable[[str], Any],
        device: torch.device,
    ) -> None:
        self.layers, self.heads, self.entry_bytes = layers, heads, entry_bytes
        self.interval, self._report = interval, report
        self.tally = torch.zeros(rows, heads, len(COUNTS), dtype=torch.int64, device=device)
        self.total, self._new = Counts(), Counts()
        self._last = time.monotonic()

    def rows_of(self, count: int) -> Tensor:
        """The tally of so many rows."""
        return self.tally[:count]

    def follow(self, step: Step) -> None:
        """A step begins; from time to time what the ones before it read is told."""
        if self.interval and time.monotonic() - self._last >= self.interval:
            self.tell()
        if step.decodes is None:
            return
        new, kinds = self._new, step.kinds
        new.rows += len(step.decodes)
        new.available += step.decodes.total * self.heads * self.layers
        if kinds is not None:
            new.full += int((kinds == Kind.FULL).sum())
            new.lost += int((kinds == Kind.LOST).sum())
            new.partial += int(np.isin(kinds, (Kind.PARTIAL, Kind.DUE)).sum())

    def collect(self) -> Counts:
        """What was counted since the last call; waits for the device."""
        found, self._new = self._new, Counts()
        sums = dict(zip(COUNTS, self.tally.sum((0, 1)).tolist(), strict=True))
        self.tally.zero_()
        found.full_heads = sums["full"]
        found.read, found.code_bytes = sums["read"], sums["rounded"]
        self.total.add(found)
        return found

    def tell(self) -> None:
        """A line of the log, and the metrics."""
        self._last = time.monotonic()
        found = self.collect()
        if found.rows:
            self._report(line(found, self.entry_bytes))
            export(found, self.entry_bytes)


def kv_read_share(counts: Counts, entry_bytes: int) -> float:
    """Bytes read by those of full attention."""
    read = counts.read * entry_bytes + counts.code_bytes
    return read / max(1, counts.available * entry_bytes)


def line(counts: Counts, entry_bytes: int) -> str:
    """Of a log."""
    parts = [f"{counts.rows:,} decode rows"]
    for name in ("full", "partial", "lost"):
        if number := getattr(counts, name):
            parts.append(f"{number:,} {name}")
    exact = counts.read / max(1, counts.available)
    parts.append(f"{exact:.1%} of entries read exactly")
    return f"RefreshKV: {', '.join(parts)}, KV read {kv_read_share(counts, entry_bytes):.1%}"


METRICS = {
    "rows": "Decode rows that RefreshKV served",
    "full": "Decode rows that read everything, by the published rule",
    "partial": "Decode rows that read their partial cache",
    "lost": "Decode rows that read everything because their state was gone",
    "exact_entries": "Entries read exactly, over layers and KV heads",
    "read_bytes": "KV bytes read, codes included",
    "full_bytes": "KV bytes that full attention would have read",
}


def export(counts: Counts, entry_bytes: int) -> None:
    """Add to the Prometheus counters `refreshkv_*_total` of this process."""
    read = counts.read * entry_bytes + counts.code_bytes
    found = {
        "rows": counts.rows,
        "full": counts.full,
        "partial": counts.partial,
        "lost": counts.lost,
        "exact_entries": counts.read,
        "read_bytes": read,
        "full_bytes": counts.available * entry_bytes,
    }
    for name, metric in _metrics().items():
        metric.inc(found[name])


@functools.cache
def _metrics() -> dict[str, Any]:
    from prometheus_client import Counter as Metric

    return {name: Metric(f"refreshkv_{name}", says) for name, says in METRICS.items()}
