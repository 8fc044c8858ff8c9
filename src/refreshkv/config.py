"""The settings by theme, each checked and described where it is defined; `RefreshConfig` of them all; the presets.

A wrong value, or one that nothing would read, is a `ValueError` in one line that names the setting and the remedy.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Mode = Literal["mixed", "refresh", "exact", "full"]
Drafter = Literal["partial", "mixed"]
TriggerName = Literal["query", "lse-drop"]
Decide = Literal["layer", "head"]
Reduction = Literal["max", "mean"]
RingName = Literal["copied", "indexed"]
LARGEST = 2**31 - 1  # tokens or steps: more than any context, and still a number for every kernel
BLOCK = 64  # tokens that share a grid of the rounded copy
GRID_BITS = 16  # of such a grid
T = TypeVar("T")


def setting(default: T, says: str, holds: Callable[[Any], bool]) -> T:
    """A field whose values are of its type and `holds`; for any other the error is that the setting `says`."""
    made: T = field(default=default, metadata={"says": says, "holds": holds})
    return made


def at_least(least: int, default: T, alternative: str = "") -> T:
    """A field of integers from `least` on; of `None` too where its type says so, which is the `alternative`."""
    says = f"must be an integer >= {least}{alternative}"
    return setting(default, says, lambda value: value is None or value >= least)


def odd(default: int) -> int:
    """A field of odd integers."""
    return setting(default, "must be an odd integer >= 1", lambda n: n >= 1 and n % 2 == 1)


def bits_of_code(default: int) -> int:
    """A field of bits of a code."""
    return setting(default, "must be an integer from 1 to 6", lambda bits: 1 <= bits <= 6)


def cosine(default: float | None, alternative: str) -> float | None:
    """A field of cosines, or `None`, which is the `alternative`."""
    says = f"is a cosine in [-1, 1], or None {alternative}"
    return setting(default, says, lambda value: value is None or -1.0 <= value <= 1.0)


class Settings:
    """Base of the themes: checks each field by its type and rule, then whether anything reads it."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        given = []
        for one in fields(self):  # type: ignore[arg-type]
            value, says, hint = getattr(self, one.name), one.metadata.get("says"), hints[one.name]
            if _fits(value, int) and value > LARGEST:
                raise ValueError(f"{one.name} must be at most {LARGEST}; got {value}")
            if says is None:
                names = (True, False) if hint is bool else get_args(hint)
                says = f"must be {' or '.join(map(repr, names))}"
            if not _fits(value, hint) or not one.metadata.get("holds", lambda _: True)(value):
                raise ValueError(f"{one.name} {says}; got {value!r}")
            if value != one.default:
                given.append(one.name)
        check_read(given, self.unread(vars(self)))

    @staticmethod
    def unread(settings: Mapping[str, Any]) -> dict[str, str]:
        """Which of the settings have no effect beside the others: name -> why, and the remedy."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Budgeted(Settings):
    """What every method has. `mode` and `window` are for hosts, which ask any settings for them.

    Attributes:
        budget: K, the size of the partial cache per KV head. A float in (0, 1] is a share of the prompt, an int
            >= 1 is tokens. A share becomes tokens once per prompt, at its first decode step. Paper: 1/8.
    """

    mode = "refresh"
    window = 1

    budget: int | float = setting(
        0.125,
        "must be at least 1 token, or a float that is a share of the prompt in (0, 1]",
        lambda k: k >= 1 if isinstance(k, int) else 0.0 < k <= 1.0,
    )

    def resolve_budget(self, prompt_tokens: int) -> int:
        """K in tokens for a prompt of `prompt_tokens` visible tokens. A share is rounded up."""
        if isinstance(self.budget, float):
            # The inner rounding undoes float noise such as 0.07 * 100 = 7.000000000000001.
            return max(1, math.ceil(round(self.budget * prompt_tokens, 9)))
        return self.budget

    def for_cache(self) -> RefreshConfig:
        """What the caches of the layers are made with: K, and the prompt queries that are kept."""
        return RefreshConfig(budget=self.budget, window=self.window)


@dataclass(frozen=True, kw_only=True)
class Grouped(Budgeted):
    """One set of tokens for each KV head.

    Attributes:
        group_reduction: how the query heads of a GQA group agree on one score per token (paper: max).
    """

    group_reduction: Reduction = "max"


@dataclass(frozen=True, kw_only=True)
class Selection(Grouped):
    """What the partial cache holds.

    Attributes:
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
    """

    pool_kernel: int = odd(7)
    recent: int = at_least(0, 0)
    successor: int = at_least(0, 0)
    window: int = at_least(1, 1)
    anchor: float = setting(0.0, "is a share of the budget in [0, 1]", lambda a: 0.0 <= a <= 1.0)
    ring: RingName = "copied"


@dataclass(frozen=True, kw_only=True)
class Schedule(Settings):
    """When a layer refreshes, and what a full step is.

    Attributes:
        stride: S, at most every S-th step may be full. `None` never refreshes (SnapKV with window 1).
        threshold: a due step is full only where the query's cosine to that of the last full step is at most this.
            `None` makes every due step full (fixed stride). Paper: 0.85 Llama, 0.95 Qwen.
        decide: who compares queries. "layer" (paper) averages all query heads and decides for the whole layer,
            "head" averages within a GQA group and decides per KV head (ours).
        trigger: what asks for a full step. "query" is the paper's comparison, by `stride` and `threshold`; "lse-drop"
            (ours) looks at every partial step of every KV head, and `stride` only caps the steps without a refresh.
        drop: nats by which the log-sum-exp of a query head falls below that of its last full step before "lse-drop"
            asks for another.
        score_only: a full step reads the keys only, selects, and attends to what it selected (the paper's ablation "no
            full attention").
    """

    stride: int | None = at_least(1, 5, ", or None to never refresh")
    threshold: float | None = cosine(0.85, "for a fixed stride")
    decide: Decide = "layer"
    trigger: TriggerName = "query"
    drop: float = setting(4.0, "is a number of nats > 0", lambda nats: nats > 0.0)
    score_only: bool = False

    @staticmethod
    def unread(settings: Mapping[str, Any]) -> dict[str, str]:
        """See `Settings.unread`."""
        why = "{}; leave it out, or set {}".format
        of_queries = ("threshold", "decide")
        if settings["trigger"] == "lse-drop":
            return dict.fromkeys(of_queries, why("with trigger 'lse-drop'", "trigger='query'"))
        found = {"drop": why("with trigger 'query'", "trigger='lse-drop'")}
        if settings["stride"] is None:
            found |= dict.fromkeys(of_queries, why("without a stride", "one"))
        elif settings["threshold"] is None:
            found["decide"] = why("without a threshold", "one")
        return found


@dataclass(frozen=True, kw_only=True)
class Rounding(Settings):
    """The copy of all keys and values in a few bits that mixed steps read (ours).

    Attributes:
        key_bits: of the code of a key's number, 1 to 6; it lies on a grid of its channel over 64 tokens.
        value_bits: of the code of a value's number, 1 to 6; likewise.
        skip: values of a block are not read where that leaves out no more than this share of a query head's weight, by
            the rounded keys, all blocks together.
    """

    key_bits: int = bits_of_code(2)
    value_bits: int = bits_of_code(2)
    skip: float = setting(0.05, "is a share of the weight in [0, 1]", lambda s: 0.0 <= s <= 1.0)


@dataclass(frozen=True, kw_only=True)
class Exact(Settings):
    """How the lossless mode drafts.

    Attributes:
        drafter: what steps draft with: "partial", a partial cache, or "mixed", the steps of that mode.
        draft: most tokens that "exact" drafts before it verifies them; fewer where fewer have been right.
        confidence: a draft ends after a token of which the drafting model is less sure than this probability.
    """

    drafter: Drafter = "partial"
    draft: int = at_least(1, 8)
    confidence: float = setting(0.0, "is a probability in [0, 1]", lambda p: 0.0 <= p <= 1.0)


@dataclass(frozen=True, kw_only=True)
class RefreshConfig(
    Rounding, Exact, Schedule, Selection
):  # the fields come in the order from the last base to the first
    """Every choice of the method: `Selection`, `Schedule`, `Exact`, `Rounding` and the mode. Frozen.

    A setting that the mode, or the trigger, does not read keeps its default; anything else is an error. The budget
    alone may be given in every mode, so that a comparison can name one for all.

    Attributes:
        mode: "refresh" is the method as published and what was built on it; "mixed" reads, in every step, a copy of all
            entries in two bits and exactly the few that have weight, K of a KV head at most (ours); "exact" drafts with
            cheap steps and verifies the drafts with a full one, so that the output is that of full attention (ours; in
            `generate` only); "full" is ordinary attention through the same code.
    """

    mode: Mode = "refresh"

    @staticmethod
    def unread(settings: Mapping[str, Any]) -> dict[str, str]:
        """See `Settings.unread`."""
        mode = settings["mode"]
        why = f"in mode {mode!r}; leave it out"
        read_by = f"{why}, or set mode={{!r}}".format
        # Of the partial cache, beyond its size.
        selection = [name for name in names_of(Selection) if name != "budget"]
        if mode == "refresh":
            of_modes = dict.fromkeys(names_of(Exact), read_by("exact"))
            of_modes |= dict.fromkeys(names_of(Rounding), read_by("mixed"))
            return Schedule.unread(settings) | of_modes
        if mode == "exact":
            found = dict.fromkeys(names_of(Schedule), read_by("refresh"))
            other = "partial" if settings["drafter"] == "mixed" else "mixed"
            why = f"with drafter {settings['drafter']!r}; leave it out, or set drafter={other!r}"
            of_drafter = selection if other == "partial" else names_of(Rounding)
            return found | dict.fromkeys(of_drafter, why)
        if mode == "mixed":
            found = dict.fromkeys((*selection, *names_of(Schedule)), read_by("refresh"))
            return found | dict.fromkeys(names_of(Exact), read_by("exact"))
        if mode == "full":
            return dict.fromkeys(set(settings) - {"budget", "mode"}, why)
        return {}

    @property
    def rounds(self) -> bool:
        """Whether steps read a rounded copy."""
        return self.mode == "mixed" or (self.mode == "exact" and self.drafter == "mixed")

    def for_cache(self) -> RefreshConfig:
        """See `Budgeted.for_cache`."""
        return self


_SELECTION = {"recent": 16, "successor": 2, "window": 32, "anchor": 0.5}
_EXACT = {"mode": "exact", "budget": 0.0625, "draft": 16, "confidence": 0.5}
_DROP = {"trigger": "lse-drop", "drop": 2.5, "stride": None, "score_only": True}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper-llama": MappingProxyType({"stride": 5, "threshold": 0.85}),
        "paper-qwen": MappingProxyType({"stride": 5, "threshold": 0.95}),
        # Measured in docs/fidelity.md.
        "default": MappingProxyType({**_EXACT, **_SELECTION}),
        "fast": MappingProxyType({"mode": "mixed", "budget": 0.05}),
        "lse-drop": MappingProxyType({**_DROP, **_SELECTION}),
    }
)


def make_config(preset: str | Mapping[str, Any] | None = None, **overrides: Any) -> RefreshConfig:
    """A preset with some settings replaced; what the replaced ones leave without effect is dropped from the preset.

    A preset is a name of `PRESETS`, or settings of your own, as `load_preset` reads them. Without one it is "default",
    which is lossless; `mode="mixed"` starts from "fast", and settings of the schedule (`Schedule`), or
    `mode="refresh"`, ask for the published mode and start from "paper-llama".

    Raises:
        ValueError: an unknown preset or setting, named with its nearest neighbour, a value out of range, or a preset or
            setting without effect.
    """
    check_names("setting", overrides, names_of(RefreshConfig))
    named = preset is not None
    if preset is None:
        scheduled = any(name in overrides for name in names_of(Schedule))
        mode = overrides.get("mode", "refresh" if scheduled else "exact")
        preset = {"refresh": "paper-llama", "mixed": "fast"}.get(mode, "default")
    if isinstance(preset, Mapping):
        check_names("setting", preset, names_of(RefreshConfig))
        base = preset
    elif isinstance(preset, str) and preset in PRESETS:
        base = PRESETS[preset]
    else:
        raise ValueError(unknown("preset", preset, PRESETS))
    settings = {**base, **overrides}
    ignored = RefreshConfig.unread({**vars(RefreshConfig()), **settings})
    check_read(overrides, ignored)
    if named and settings.get("mode") == "full":
        raise ValueError(f"preset {preset!r} has no effect in mode 'full'; leave it out")
    return RefreshConfig(**{name: settings[name] for name in settings if name not in ignored})


def names_of(theme: type[Settings]) -> list[str]:
    """The settings of a theme."""
    return [one.name for one in fields(theme)]  # type: ignore[arg-type]


def described(theme: type[Settings]) -> dict[str, str]:
    """What a theme, and those it is made of, say of each setting: name -> text."""
    texts = [inspect.cleandoc(base.__doc__ or "") for base in theme.__mro__]
    lists = "\n".join(text.partition("Attributes:")[2] for text in texts)
    said = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", lists, re.MULTILINE))
    return {name: " ".join(said[name].split()) for name in names_of(theme)}


def check_names(kind: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise `ValueError` for the first name that is not `valid`."""
    for name in given:
        if name not in valid:
            raise ValueError(unknown(kind, name, valid))


def check_read(given: Iterable[str], unread: Mapping[str, str]) -> None:
    """Raise `ValueError` for the first setting that was given and is not read."""
    for name in given:
        if name in unread:
            raise ValueError(f"{name} has no effect {unread[name]}")


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """One line for an unknown name: `unknown preset 'paper-lama'; did you mean 'paper-llama'? (...)`."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} (one of: {', '.join(valid)})"


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; an integer is a number, and True is none."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
