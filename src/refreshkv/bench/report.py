"""The record of `bench decode`: what was timed, beside the bytes that had to move. Fields: `docs/bench.md`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from refreshkv.bench import roofline
from refreshkv.bench.record import machine, rounded
from refreshkv.bench.roofline import Reads, Sizes
from refreshkv.bench.variants import MIX, PARTS, VARIANTS, Job

# Every time that is reported, in the order of the table.
NAMES = {
    **{name: what for name, what in VARIANTS.items() if name not in PARTS},
    **{name: what for parts in PARTS.values() for name, what in parts.items()},
    **MIX,
    **{name: VARIANTS[name] for name in PARTS},
}
# What follows from other columns stays out of the CSV file.
LEFT_OUT = (
    "ms_range",
    "tokens_per_s",
    "over_own_dense",
    "ideal_over_own_dense",
    "share_of_ideal",
    "notes",
)
_CHECKED = ("own_dense", "full", "verify")


def reads(job: Job) -> dict[str, Reads]:
    """What a token of each variant reads that yields tokens."""
    full, partial = roofline.dense(job.context), roofline.partial(job.context, job.budget)
    return {
        "snapkv": partial,
        "partial": partial,
        "full": full,
        "own_dense": full,
        "static": full,
        "flash": full,
        "default": full,
        "mix": roofline.mix(job.context, job.budget, job.stride),
        "fast": roofline.fast(job.context, job.budget),
        "exact": roofline.exact(job.context, job.budget, job.draft, job.acceptance),
    }


def report(
    job: Job,
    sizes: Sizes,
    times: Mapping[str, list[float]] | None = None,
    errors: Mapping[str, float] | None = None,
    bandwidth: float | None = None,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The record of a run; without `times` one of the same columns. What was skipped is there as `None`.

    Args:
        times: milliseconds of each turn.
        errors: relative RMS of the logits that were checked.
        bandwidth: bytes a second that reading reached in this run.
        notes: why a variant is missing, or how it ran.
    """
    times, errors = times or {}, errors or {}
    ms = _medians(job, times)
    moved = {name: one.bytes(sizes, job.batch) for name, one in reads(job).items()}
    over_own = {name: _over(ms, "own_dense", name) for name in moved}
    ideal = {name: moved["own_dense"] / size for name, size in moved.items()}
    share = {name: _divided(over_own[name], ideal[name]) for name in moved}
    # bytes / milliseconds are thousands of bytes a second
    speed = {name: _divided(moved[name] * 1e3, ms[name]) for name in moved}
    ratios = {
        "mix_over_static": _over(ms, "static", "mix"),
        "mix_over_default": _over(ms, "default", "mix"),
        "mix_over_own_dense": over_own["mix"],
        "mix_over_snapkv": _over(ms, "snapkv", "mix"),
        "share_of_ideal": share["mix"],
        "fast_over_own_dense": over_own["fast"],
        "exact_over_own_dense": over_own["exact"],
        "exact_over_static": _over(ms, "static", "exact"),
        "exact_share_of_ideal": share["exact"],
        "partial_over_empty": _over(ms, "partial", "empty"),
        "full_over_static": _over(ms, "full", "static"),
        "full_over_own_dense": _over(ms, "full", "own_dense"),
    }
    about = machine(job.device)
    return {
        "time": about["time"],
        "shape": job.shape,
        "context": job.context,
        "batch": job.batch,
        "budget": job.budget,
        "stride": job.stride,
        "draft": job.draft,
        "acceptance": job.acceptance,
        "tokens_per_pass": round(roofline.tokens_per_pass(job.draft, job.acceptance), 3),
        "steps": job.steps,
        "cycles": job.cycles,
        "form": "compiled" if job.compiled else "static" if job.static else "growing",
        "device": about["device"],
        "dtype": str(job.dtype).removeprefix("torch."),
        "threads": about["threads"],
        "bandwidth": None if bandwidth is None else round(bandwidth),
        "ms": rounded(ms, 6),
        "ms_range": {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()
        },
        "tokens_per_s": rounded({name: _divided(job.batch * 1e3, ms[name]) for name in moved}),
        "bytes": {name: round(size) for name, size in moved.items()},
        "bandwidth_share": rounded({name: _divided(speed[name], bandwidth) for name in moved}),
        "over_own_dense": rounded(over_own),
        "ideal_over_own_dense": rounded(ideal),
        "share_of_ideal": rounded(share),
        "ratios": rounded(ratios),
        "acceptance_curve": curve(job, sizes, ms),
        "relative_rms_error": rounded({name: errors.get(name) for name in _CHECKED}, 3),
        "notes": dict(notes or {}),
        "versions": about["versions"],
    }


def curve(job: Job, sizes: Sizes, ms: Mapping[str, float | None]) -> list[dict[str, float | None]]:
    """Speed-up of the lossless mode over our dense step against acceptance, measured and by bytes.

    A cycle costs the same however many drafts stand, so one timing gives the whole curve.
    """
    full = roofline.dense(job.context).bytes(sizes, job.batch)
    found = []
    for acceptance in (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0):
        tokens = roofline.tokens_per_pass(job.draft, acceptance)
        cost = roofline.exact(job.context, job.budget, job.draft, acceptance)
        point = {
            "acceptance": acceptance,
            "tokens_per_pass": tokens,
            "exact_over_own_dense": _divided(_times(ms["own_dense"], tokens), ms["cycle"]),
            "ideal": full / cost.bytes(sizes, job.batch),
        }
        found.append(rounded(point))
    return found


def _medians(job: Job, times: Mapping[str, list[float]]) -> dict[str, float | None]:
    """Milliseconds of each of `NAMES`, those that are made of others too."""
    ms: dict[str, float | None] = {
        name: statistics.median(times[name]) if name in times else None for name in NAMES
    }
    full_share = 0.0 if job.stride is None else 1 / job.stride
    ms["mix"] = _sum((1 - full_share, ms["partial"]), (full_share, ms["full"]))
    share = roofline.FAST_FULL_SHARE
    ms["fast"] = _sum((1.0, ms["fast_partial"]), (share, ms["fast_full"]), (-share, ms["empty"]))
    ms["exact"] = _divided(ms["cycle"], roofline.tokens_per_pass(job.draft, job.acceptance))
    return ms


def _over(ms: Mapping[str, float | None], one: str, other: str) -> float | None:
    """How many times longer `one` takes than `other`."""
    return _divided(ms[one], ms[other])


def _divided(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _times(one: float | None, other: float) -> float | None:
    return None if one is None else one * other


def _sum(*terms: tuple[float, float | None]) -> float | None:
    """Factors times values; `None` where a value is missing."""
    if any(value is None for _, value in terms):
        return None
    return sum(factor * value for factor, value in terms if value is not None)
