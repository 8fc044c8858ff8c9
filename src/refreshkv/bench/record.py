"""What every benchmark records beside its timings: the machine, the versions, one CSV row a run."""

from __future__ import annotations

import csv
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import refreshkv


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading 1 GiB that is in no cache, best of five."""
    block = torch.ones(1 << 28, dtype=torch.float32, device=device)
    best = 0.0
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        block.sum()
        wait_for(device)
        best = max(best, block.numel() * 4 / (time.perf_counter() - start))
    return best


def device_name(device: torch.device) -> str:
    """What the timings were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} CPU, {os.cpu_count()} cores, {platform.machine()}"


def versions() -> dict[str, str]:
    """The libraries that decide the speed."""
    return {
        "refreshkv": refreshkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def append_row(path: Path, record: dict[str, Any]) -> None:
    """One row a run; nested parts become `part.name` columns.

    Raises:
        ValueError: the file holds other columns.
    """
    row: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            row.update({f"{key}.{name}": part for name, part in value.items() if key != "ms_range"})
        else:
            row[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    known = (
        path.read_text().splitlines()[0].split(",")
        if path.exists() and path.stat().st_size
        else None
    )
    if known is not None and not set(row) <= set(known):
        raise ValueError(f"{path} has other columns than this benchmark writes: give another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, known or list(row), restval="")
        if known is None:
            writer.writeheader()
        writer.writerow(row)
