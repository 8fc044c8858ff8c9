"""The record of `bench decode`: what was timed, beside the bytes that had to move. Fields: `docs/bench.md`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refreshkv.bench.job import Job
from refreshkv.bench.record import rounded, settings
from refreshkv.bench.roofline import Sizes, mean
from refreshkv.bench.variants import NAMES

# What follows from other columns stays out of the CSV file.
LEFT_OUT = (
    *("ms_range", "tokens_per_s", "over_own_dense", "ideal_over_own_dense"),
    *("share_of_ideal", "notes", "memory", "rounding"),
)
# A variant that yields tokens -> the mode whose bytes it reads.
_MODES = {
    **{"snapkv": "snapkv", "partial": "snapkv"},
    **dict.fromkeys(("full", "own_dense", "static", "flash", "default"), "full"),
    **{"mix": "mix", "mixed": "mixed", "exact": "exact"},
}
# How many times faster the first is, and how many times longer it takes.
_FASTER = (
    *("mix_over_static", "mix_over_default", "mix_over_own_dense", "mix_over_snapkv"),
    *("mixed_over_own_dense", "exact_over_own_dense", "exact_over_static"),
)
_LONGER = ("partial_over_empty", "full_over_static", "full_over_own_dense")
_CHECKED = ("own_dense", "full", "mixed", "verify")


def report(
    job: Job,
    sizes: Sizes,
    times: Mapping[str, list[float]] | None = None,
    errors: Mapping[str, float] | None = None,
    bandwidth: float | None = None,
    notes: Mapping[str, str] | None = None,
    memory: Mapping[str, int] | None = None,
    rounding: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The record of a run; without `times` one of the same columns. What was skipped is there as `None`.

    Args:
        times: milliseconds of each turn.
        errors: relative RMS of the logits that were checked.
        bandwidth: bytes a second that reading reached in this run.
        notes: why a variant is missing, or how it ran.
        memory: bytes by part, as `memory.Needs.as_dict` estimates them.
        rounding: what transformers loses by rounding in the passes that were checked.
    """
    times, errors = times or {}, errors or {}
    ms, modes = _medians(job, times), job.bytes(sizes)
    moved = {name: modes[mode] for name, mode in _MODES.items()}
    over_own = {name: ms["own_dense"] / ms[name] for name in moved}
    ideal = {name: moved["own_dense"] / size for name, size in moved.items()}
    share = {name: over_own[name] / ideal[name] for name in moved}
    read = {name: size / (ms[name] * 1e-3) for name, size in moved.items()}  # bytes a second
    ratios = {}
    for name in _FASTER + _LONGER:
        one, other = (ms[part] for part in name.split("_over_"))
        ratios[name] = other / one if name in _FASTER else one / other
    return {
        **settings(job, bandwidth),
        "ms": rounded(ms, 6),
        "ms_range": {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()
        },
        "tokens_per_s": rounded({name: job.batch * 1e3 / ms[name] for name in moved}),
        "bytes": {name: round(size) for name, size in moved.items()},
        "bandwidth_share": rounded(
            {name: speed / (bandwidth or math.nan) for name, speed in read.items()}
        ),
        "over_own_dense": rounded(over_own),
        "ideal_over_own_dense": rounded(ideal),
        "share_of_ideal": rounded(share),
        "ratios": rounded(
            {**ratios, "share_of_ideal": share["mix"], "exact_share_of_ideal": share["exact"]}
        ),
        "acceptance_curve": curve(job, sizes, ms),
        "relative_rms_error": rounded({name: errors.get(name) for name in _CHECKED}, 3),
        "notes": dict(notes or {}),
        "memory": dict(memory or {}),
        "rounding": rounded(rounding or {}, 3),
    }


def curve(job: Job, sizes: Sizes, ms: Mapping[str, float]) -> list[dict[str, float | None]]:
    """Speed-up of the lossless mode over our dense step against acceptance, measured and by bytes.

    A cycle costs the same however many drafts stand, so one timing gives the whole curve.
    """
    found = []
    for acceptance in (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0):
        other = replace(job, acceptance=acceptance)
        moved = other.bytes(sizes)
        point = {
            "acceptance": acceptance,
            "tokens_per_pass": other.tokens_per_pass,
            "exact_over_own_dense": ms["own_dense"] * other.tokens_per_pass / ms["cycle"],
            "ideal": moved["full"] / moved["exact"],
        }
        found.append(rounded(point))
    return found


def _medians(job: Job, times: Mapping[str, list[float]]) -> dict[str, float]:
    """Milliseconds of each of `NAMES`, those that are made of others too; NaN where one was not timed."""
    ms = {name: statistics.median(times.get(name, [math.nan])) for name in NAMES}
    ms["mix"] = mean(ms["partial"], ms["full"], job.stride)
    ms["exact"] = ms["cycle"] / job.tokens_per_pass
    return ms
