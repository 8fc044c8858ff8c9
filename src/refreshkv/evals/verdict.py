"""What a comparison says in one line: which mode to use on this machine, or to stay with full attention.

The rule, which docs/cli.md repeats. The baseline is the faster of transformers' own cache and our full attention. A row
is *faster* where its decoding speed over the baseline's, both of the same round, is at least `GAIN` in the median and
above 1 in every round, and with the prompt it is not slower in the median. It is *kept* if it is lossless, and leaves
full attention's text only where two tokens are about as likely (`TIE`); or if it would have written at least the share
`bar` of full attention's tokens, or what transformers' own pass has of them, which only rounds differently. The fastest
row that is both is used; a lossy one only where it is `GAIN` times as fast as the fastest lossless one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refreshkv.evals.compare import FULL, TRANSFORMERS, Row

GAIN = 1.05  # less is not told from the noise of three rounds
BAR = 0.95  # share of full attention's tokens that a lossy mode has to agree with
TIE = 0.5  # nats; logits in bfloat16 lie up to 0.125 apart, and rounding adds up
LEAST = 32  # tokens: on fewer there is nothing to say
ROUNDS = 3  # of timing, as for tokens
_NAMED = 3  # rows of which is said why they are not used


@dataclass(frozen=True)
class Speedup:
    """A row's speed over the baseline's: median of the rounds, the least of them, median with the prompt."""

    median: float
    least: float
    with_prompt: float

    @property
    def measurable(self) -> bool:
        """Whether the row is faster beyond doubt."""
        return self.median >= GAIN and self.least > 1 and self.with_prompt >= 1


@dataclass(frozen=True)
class Verdict:
    """The line, the row it names (`None`: full attention, or no verdict), what speeds are compared with, and those."""

    text: str
    use: str | None
    baseline: str | None
    speedups: Mapping[str, Speedup]


def judge(rows: Sequence[Row], bar: float = BAR) -> Verdict:
    """The verdict over `Comparison.rows`."""
    named = {row.name: row for row in rows}
    full, theirs = named[FULL], named[TRANSFORMERS]
    written = sum(text.new_tokens for text in full.texts)
    if not (theirs.rates and full.rates):
        why = "no token to time" if full.rates_with_prompt else "the speed was not measured"
        return Verdict(f"no verdict: {why}", None, None, {})
    own = speedup(full, theirs)
    baseline = full if own.median > 1 else theirs
    speedups = {row.name: speedup(row, baseline) for row in rows if row.rates}
    if written < LEAST:
        text = f"no verdict: {written} tokens are too few to tell; give longer answers room, or other prompts"
        return Verdict(text, None, baseline.name, speedups)
    rounds = min(len(row.rates) for row in rows if row.rates)
    if rounds < ROUNDS:
        text = f"no verdict: {rounds} of at least {ROUNDS} rounds of timing"
        return Verdict(text, None, baseline.name, speedups)

    bar = bar if theirs.agreement is None else min(bar, theirs.agreement)
    others = [row for row in rows if row not in (full, theirs)]
    faster = [row for row in others if row.rates and speedups[row.name].measurable]
    kept = [row for row in faster if _is_kept(row, bar)]
    # Ascending, so that the last of those that pass is the fastest.
    ranked = sorted(kept, key=lambda row: speedups[row.name].median)
    lossless = [row for row in ranked if row.lossless]
    best = ranked[-1] if ranked else None
    if best and lossless and speedups[best.name].median < GAIN * speedups[lossless[-1].name].median:
        best = lossless[-1]
    if best is not None:
        text = (
            f"use {best.name}: {speedups[best.name].median:.2f}x full attention, {_fidelity(best)}"
        )
        return Verdict(text, best.name, baseline.name, speedups)
    slower = sorted((r for r in others if r.rates), key=lambda r: -speedups[r.name].median)
    reasons = [_why(row, speedups[row.name], bar) for row in slower[:_NAMED]]
    if len(slower) > _NAMED:
        reasons.append(f"{len(slower) - _NAMED} more are slower")
    why = "; ".join(reasons)
    if own.measurable:
        text = f"use full: {own.median:.2f}x transformers' own cache, the same attention; {why}"
        return Verdict(text.removesuffix("; "), FULL, baseline.name, speedups)
    text = f"stay with full attention: {why or 'nothing was compared with it'}"
    return Verdict(text, None, baseline.name, speedups)


def speedup(row: Row, baseline: Row) -> Speedup:
    """Of the rounds that both have."""
    decode = [a / b for a, b in zip(row.rates, baseline.rates, strict=False)]
    whole = [a / b for a, b in zip(row.rates_with_prompt, baseline.rates_with_prompt, strict=False)]
    return Speedup(statistics.median(decode), min(decode), statistics.median(whole))


def _is_kept(row: Row, bar: float) -> bool:
    return _parts(row) <= TIE if row.lossless else (row.agreement or 0) >= bar


def _parts(row: Row) -> float:
    """The largest gap in likelihood at which a text leaves that of full attention, in nats; 0 where none does."""
    gaps = [text.difference.nats for text in row.texts if text.difference is not None]
    return max((math.inf if nats is None else nats for nats in gaps), default=0.0)


def _fidelity(row: Row) -> str:
    if row.lossless:
        parted = "" if row.same == len(row.texts) else f" (else a tie within {TIE} nats)"
        return f"the same text in {row.same} of {len(row.texts)}{parted}"
    return f"{row.agreement:.1%} of the tokens"


def _why(row: Row, speed: Speedup, bar: float) -> str:
    """Why a row is not used."""
    said = f"{row.name} is {speed.median:.2f}x"
    if speed.measurable and row.lossless:
        return f"{said}, but leaves the text by {_parts(row):.2g} nats"
    if speed.measurable:
        return f"{said}, but has {row.agreement or 0:.1%} of the tokens (the bar is {bar:.1%})"
    if speed.median >= GAIN and speed.least > 1:
        return f"{said} without the prompt, {speed.with_prompt:.2f}x with it"
    return f"{said}, not beyond doubt" if speed.median > 1 else said
