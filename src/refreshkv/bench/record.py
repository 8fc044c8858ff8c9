"""What a benchmark leaves behind: its settings and machine, and rows of a CSV file that is looked at beforehand."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import refreshkv
from refreshkv.bench.job import Job
from refreshkv.kernels.backend import language
from refreshkv.text import reason, setting_of

Row = Mapping[str, Any]

_SETTINGS = (
    *("shape", "context", "batch", "budget", "stride", "draft", "acceptance"),
    *("steps", "cycles", "tokens_per_pass", "form"),
)


def settings(
    job: Job, bandwidth: float | None = None, names: Sequence[str] = _SETTINGS
) -> dict[str, Any]:
    """When, what (by `names`) and on what a run was made; the first columns of a file. `bandwidth`: bytes a second."""
    said = {name: getattr(job, name) for name in names}
    if "tokens_per_pass" in said:
        said["tokens_per_pass"] = round(job.tokens_per_pass, 3)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **said,
        "device": device_name(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "bandwidth": None if bandwidth is None else round(bandwidth),
        "versions": versions(job.device),
    }


def device_name(device: torch.device) -> str:
    """What the timings were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} CPU, {os.cpu_count()} cores, {platform.machine()}"


def versions(device: torch.device) -> dict[str, str | None]:
    """The libraries, and the kernels, that decide the speed."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "refreshkv": refreshkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton,
        "kernels": language(device),
    }


def flat(record: Row, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """A record as one row: a part `ms.partial` for each entry of a part `ms`; lists have no place in a row."""
    row: dict[str, Any] = {}
    for key, value in record.items():
        if key in leave_out or isinstance(value, list):
            continue
        if isinstance(value, Mapping):
            row.update({f"{key}.{name}": part for name, part in value.items()})
        else:
            row[key] = value
    return row


def check_file(path: Path | None, row: Row) -> list[str] | None:
    """Whether `row` can be appended; to be asked before hours of timing, with a row of the same columns.

    Returns the header of the file; `None` of one that is empty or not there.

    Raises:
        ValueError: a file of other columns, or a place that cannot be written.
    """
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = None
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                known = next(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"cannot write {path} ({reason(error)}): give another file") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: give another file")
    if known is not None and not set(row) <= set(known):
        raise ValueError(f"{path} has other columns than this benchmark writes: give another file")
    return known


def append(path: Path | None, rows: Sequence[Row]) -> None:
    """Add rows that all have the columns of the first; to no file where `path` is `None`.

    Raises:
        ValueError: as `check_file`.
    """
    if path is None:
        return
    known = check_file(path, rows[0])
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, known or list(rows[0]), restval="")
            if known is None:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk has no name


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, numbers as numbers and empty cells as `None`; none where there is no file.

    Raises:
        ValueError: a file that is no CSV, or has a row of more or fewer cells than its header.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}): give a CSV file") from error
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} has rows that do not fit its header: give another file")
    return [{key: setting_of(text or "none") for key, text in row.items()} for row in rows]


def rounded(values: Mapping[str, float | None], digits: int = 4) -> dict[str, float | None]:
    """Numbers to so many significant digits; what was not measured (`None` or NaN) is `None`."""
    return {
        name: None if value is None or math.isnan(value) else float(f"{value:.{digits}g}")
        for name, value in values.items()
    }
