"""`RefreshConfig`: every choice of the method in one frozen, strict record, and the named presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Mode = Literal["refresh", "exact", "full"]
TriggerName = Literal["query", "lse-drop"]
Decide = Literal["layer", "head"]
Reduction = Literal["max", "mean"]
RingName = Literal["copied", "indexed"]
LARGEST = 2**31 - 1  # tokens or steps: more than any context, and still a number for every kernel


@dataclass(frozen=True, kw_only=True)
class RefreshConfig:
    """How RefreshKV selects and when it refreshes. Frozen; a wrong value raises `ValueError` in one line.

    Attributes:
        budget: K, the size of the partial cache per KV head. A float in (0, 1] is a share of the prompt, an int
            >= 1 is tokens. A share becomes tokens once per prompt, at its first decode step. Paper: 1/8.
        stride: S, at most every S-th step may be full. `None` never refreshes (SnapKV with window 1).
        threshold: a due step is full only where the query's cosine to that of the last full step is at most this.
            `None` makes every due step full (fixed stride). Paper: 0.85 Llama, 0.95 Qwen.
        decide: who compares queries. "layer" (paper) averages all query heads and decides for the whole layer,
            "head" averages within a GQA group and decides per KV head (ours).
        group_reduction: how the query heads of a GQA group agree on one score per token (paper: max).
        pool_kernel: odd width of the max-pooling over neighbouring tokens (paper: 7). 1 turns it off.
        recent: the newest tokens that every selection keeps, at most a quarter of K (ours; paper: 0, they win on score
            or not at all).
        successor: how many of the most attended entries of a partial step fetch the token that follows them (ours;
            paper: 0). Copying moves on by one token a step, and pooling reaches three.
        window: the last prompt queries that vote on the first selection (paper: 1; SnapKV: 32).
        anchor: share of the budget that stays with the best of the first selection through every refresh (ours;
            paper: 0).
        ring: "copied": the partial cache is a copy, which a partial step reads in one piece; "indexed": a list of
            positions, 4 bytes an entry, and a partial step reads the full cache there (ours).
        trigger: what asks for a full step. "query" is the paper's comparison, by `stride` and `threshold`; "lse-drop"
            (ours) looks at every partial step of every KV head, and `stride` only caps the steps without a refresh.
        drop: nats by which the log-sum-exp of a query head falls below that of its last full step before "lse-drop"
            asks for another.
        score_only: a full step reads the keys only, selects, and attends to what it selected (the paper's ablation "no
            full attention").
        mode: "refresh" is the method; "exact" drafts with partial steps and verifies the drafts with a full one, so
            that the output is that of full attention (ours; only in `generate`); "full" is ordinary attention through
            the same code.
        confidence: a draft ends after a token of which the drafting model is less sure than this probability.
        draft: most tokens that "exact" drafts before it verifies them; fewer where fewer have been right.
    """

    budget: int | float = 0.125
    stride: int | None = 5
    threshold: float | None = 0.85
    decide: Decide = "layer"
    group_reduction: Reduction = "max"
    pool_kernel: int = 7
    recent: int = 0
    successor: int = 0
    window: int = 1
    anchor: float = 0.0
    ring: RingName = "copied"
    trigger: TriggerName = "query"
    drop: float = 4.0
    score_only: bool = False
    mode: Mode = "refresh"
    draft: int = 8
    confidence: float = 0.0

    def __post_init__(self) -> None:
        for name, number in dataclasses.asdict(self).items():
            if _is_int(number) and number > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST}; got {number}")
        _check_budget(self.budget)
        if self.stride is not None and (not _is_int(self.stride) or self.stride < 1):
            raise ValueError(
                f"stride must be an integer >= 1, or None to never refresh; got {self.stride!r}"
            )
        if self.threshold is not None:
            if not _is_number(self.threshold) or not -1.0 <= self.threshold <= 1.0:
                raise ValueError(
                    f"threshold is a cosine in [-1, 1], or None for a fixed stride; got {self.threshold!r}"
                )
        if not _is_int(self.pool_kernel) or self.pool_kernel < 1 or self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be an odd integer >= 1; got {self.pool_kernel!r}")
        for name, least in (("recent", 0), ("successor", 0), ("window", 1), ("draft", 1)):
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}; got {value!r}")
        if not _is_number(self.anchor) or not 0.0 <= self.anchor <= 1.0:
            raise ValueError(f"anchor is a share of the budget in [0, 1]; got {self.anchor!r}")
        if not _is_number(self.confidence) or not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"confidence is a probability in [0, 1]; got {self.confidence!r}")
        if not _is_number(self.drop) or not self.drop > 0.0:
            raise ValueError(f"drop is a number of nats > 0; got {self.drop!r}")
        if not isinstance(self.score_only, bool):
            raise ValueError(f"score_only must be True or False; got {self.score_only!r}")
        for name, allowed in (
            ("decide", Decide),
            ("group_reduction", Reduction),
            ("ring", RingName),
            ("trigger", TriggerName),
            ("mode", Mode),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be {_either(get_args(allowed))}; got {value!r}")

    def resolve_budget(self, prompt_tokens: int) -> int:
        """K in tokens for a prompt of `prompt_tokens` visible tokens. A share is rounded up."""
        if isinstance(self.budget, float):
            # The inner rounding undoes float noise such as 0.07 * 100 = 7.000000000000001.
            return max(1, math.ceil(round(self.budget * prompt_tokens, 9)))
        return self.budget


_SELECTION = {"recent": 16, "successor": 2, "window": 32, "anchor": 0.5}
_EXACT = {"mode": "exact", "budget": 0.0625, "draft": 16, "confidence": 0.9}
_FAST = {"trigger": "lse-drop", "drop": 2.5, "stride": None, "score_only": True}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper-llama": MappingProxyType({"stride": 5, "threshold": 0.85}),
        "paper-qwen": MappingProxyType({"stride": 5, "threshold": 0.95}),
        # Measured in docs/fidelity.md.
        "default": MappingProxyType({**_EXACT, **_SELECTION}),
        "fast": MappingProxyType({**_FAST, **_SELECTION}),
    }
)
# What decides on full steps. The lossless mode has no use for it.
SCHEDULE = ("stride", "threshold", "decide", "trigger", "drop", "score_only")


def make_config(preset: str | None = None, **overrides: Any) -> RefreshConfig:
    """A preset with some settings replaced.

    Without a preset it is "default", which is lossless; settings of the schedule (`SCHEDULE`), or `mode="refresh"`,
    ask for the lossy mode and start from "paper-llama".

    Raises:
        ValueError: an unknown preset or setting, named with its nearest neighbour, a value out of range, or a setting
            of the schedule where nothing is scheduled.
    """
    fields = [field.name for field in dataclasses.fields(RefreshConfig)]
    for key in overrides:
        if key not in fields:
            raise ValueError(unknown("setting", key, fields))
    scheduled = [key for key in SCHEDULE if key in overrides]
    if preset is None:
        lossy = overrides.get("mode", "refresh" if scheduled else "exact") == "refresh"
        preset = "paper-llama" if lossy else "default"
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(unknown("preset", preset, PRESETS))
    config = RefreshConfig(**{**PRESETS[preset], **overrides})
    if scheduled and config.mode == "exact":
        raise ValueError(
            f"{scheduled[0]} has no effect in mode 'exact'; leave it out, or set mode='refresh'"
        )
    return config


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """One line for an unknown name: `unknown preset 'paper-lama'; did you mean 'paper-llama'? (...)`."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} (one of: {', '.join(valid)})"


def _check_budget(budget: object) -> None:
    if _is_int(budget):
        if budget < 1:  # type: ignore[operator]
            raise ValueError(
                f"budget must be at least 1 token, or a share in (0, 1]; got {budget!r}"
            )
    elif isinstance(budget, float):
        if not 0.0 < budget <= 1.0:  # NaN fails too
            raise ValueError(
                f"a float budget is a share of the prompt in (0, 1]; got {budget!r}; for tokens pass an integer"
            )
    else:
        raise ValueError(
            f"budget must be an int (tokens) or a float (share of the prompt); got {budget!r}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _either(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
