"""From lines of results to one row per task, mode and method: the score, its 95 % interval, and what was read for it.

Intervals are percentile bootstraps over examples (`scipy.stats.bootstrap`, seeded). Such an interval moves with any
growing function, so that of a perplexity is the exponential of that of its mean log-likelihood.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from refreshkv.evals.results import BASELINE, RESULTS, read_lines

Record = Mapping[str, Any]  # one line of results
Places = Mapping[tuple[str, str, str], Record]  # (task, mode, example) -> record of full attention

BESIDE_FULL = ("score", "ratio", "95 %", "agree", "KL", "KV read")
BESIDE_FULL_NOTE = (
    "Ratio: of the perplexity to that of full attention on the same documents, and its interval. Agree: the share of"
    " fed tokens in whose place the most probable one is that of full attention. KL: KL(full || method) of the"
    " distributions of the next token, mean, in nats."
)
CONFIDENCE = 0.95
RESAMPLES = 4999
FEWEST = (
    5  # the chance that all of four differences are positive by luck is 1/16: no 95 % statement
)


@dataclass(frozen=True)
class Summary:
    """One row of `summary.csv`.

    Attributes:
        score: mean over examples; for perplexity exp(mean negative log-likelihood over documents).
        ci_low, ci_high: ends of the 95 % interval; the score itself where nothing varies.
        output_tokens, answer_tokens: means; `answer_tokens` over the examples that have an answer.
        kv_read_share: KV bytes read / KV bytes of full attention, pooled: each example counts with the entries that
            full attention would read in it, n * (prompt + n / 2) for n output tokens.
        full_share, effective_stride: full steps / steps and its inverse, from the sums over layers and examples.
        kv_read_most: the largest share of a single example.
        same_as_full: share of the examples whose generated text is that of the method "full", where there is one.
        passes_per_token: forward passes of the model for each token of the lossless mode, pooled over tokens.
        ratio: perplexity over that of the method "full", on the documents that both have.
        ratio_low, ratio_high: ends of the 95 % interval of the ratio; the bootstrap draws documents, and so pairs.
        agreement: share of the fed tokens in whose place the most probable token is that of full attention.
        kl: mean over fed tokens of KL(full || method) of the distributions of the next token, in nats.
    """

    task: str
    mode: str
    method: str
    metric: str
    score: float
    ci_low: float
    ci_high: float
    examples: int
    output_tokens: float
    answer_tokens: float | None
    kv_read_share: float | None
    full_share: float | None
    effective_stride: float | None
    kv_read_most: float | None
    same_as_full: float | None
    passes_per_token: float | None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    agreement: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Difference:
    """A method against the baseline on the same examples.

    Attributes:
        gain: mean difference, positive where the method is better; in the score's units, for perplexity in nats.
        ci_low, ci_high: ends of the 95 % interval of the gain.
    """

    task: str
    mode: str
    method: str
    gain: float
    ci_low: float
    ci_high: float
    examples: int

    @property
    def beats(self) -> bool:
        """Better than the baseline beyond the interval, on examples enough to say so."""
        return self.examples >= FEWEST and self.ci_low > 0


def read_results(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of `results.jsonl`; of records with the same key the first. Half a line at the end is left out.

    Raises:
        ValueError: there is no such file, or a line that is no result (its number is named).
    """
    path = Path(directory) / RESULTS
    found: dict[str, dict[str, Any]] = {}
    try:
        for record in read_lines(path):
            found.setdefault(record["key"], record)
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}; give the --out of a run of 'refreshkv eval'"
        ) from error
    return list(found.values())


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One row per task, mode and method, in the order in which they are first seen.

    The order of the examples and of the groups does not matter to any number.
    """
    records = list(records)
    full = of_full(records)
    return [_summary(*key, list(of.values()), full) for key, of in _groups(records).items()]


def average(records: Iterable[Record], name: str) -> list[Summary]:
    """One row per mode and method over several tasks, called `name`: the mean of the tasks' means.

    The bootstrap draws within each task. A method that lacks a task which another has in this mode gets no row.
    """
    records = list(records)
    full, groups = of_full(records), _groups(records, name)
    tasks: dict[str, set[str]] = defaultdict(set)
    for (_, mode, _), strata in groups.items():
        tasks[mode] |= strata.keys()
    return [
        _summary(*key, list(strata.values()), full)
        for key, strata in groups.items()
        if len(strata) == len(tasks[key[1]])
    ]


def _groups(
    records: Iterable[Record], name: str | None = None
) -> dict[tuple[str, str, str], dict[str, list[Record]]]:
    """Task (or `name` for all of them), mode and method -> task -> records."""
    groups: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in records:
        strata = groups.setdefault((name or record["task"], record["mode"], record["method"]), {})
        strata.setdefault(record["task"], []).append(record)
    return groups


def differences(records: Iterable[Record], baseline: str = BASELINE) -> list[Difference]:
    """Each method against `baseline` in the same task and mode, over the examples that both have."""
    groups: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for record in records:
        methods = groups.setdefault((record["task"], record["mode"]), {})
        methods.setdefault(record["method"], {})[record["example"]] = record["score"]
    found = []
    for (task, mode), methods in groups.items():
        base = methods.get(baseline, {})
        sign = -1.0 if is_perplexity(task) else 1.0
        for method, scores in methods.items():
            both = sorted(scores.keys() & base.keys())
            if method == baseline or not both:
                continue
            gains = np.array([sign * (scores[example] - base[example]) for example in both])
            ends = interval([gains])
            found.append(Difference(task, mode, method, float(gains.mean()), *ends, len(both)))
    return found


def interval(samples: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of the samples' means; the point itself where no sample varies."""
    point = float(np.mean([sample.mean() for sample in samples]))
    if all(np.ptp(sample) == 0 for sample in samples):
        return point, point
    # scipy wants two values a sample; one value twice is the same stratum without variance
    data = tuple(sample if len(sample) > 1 else np.repeat(sample, 2) for sample in samples)
    found = (
        need("scipy.stats")
        .bootstrap(
            data,
            lambda *drawn, axis: np.mean([sample.mean(axis=axis) for sample in drawn], axis=0),
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return float(found.low), float(found.high)


def write_csv(path: str | os.PathLike[str], summaries: Iterable[Summary]) -> None:
    """`summary.csv`, whole or not at all. An unknown value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Summary))
    for summary in summaries:
        writer.writerow(
            f"{value:.8g}" if isinstance(value, float) else value for value in astuple(summary)
        )
    write_whole(path, text.getvalue().encode())


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write aside, then rename: a reader sees the old file or the new one, and a full disk leaves the old one."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def need(module: str) -> Any:
    """An optional module, imported. Raises `ModuleNotFoundError` with the command that installs it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise  # the package is there, and broken
        raise ModuleNotFoundError(
            f"the evaluation needs {package}: pip install '.[eval]' in a checkout of refreshkv",
            name=package,
        ) from None


def is_perplexity(task: str) -> bool:
    """Whether a task's score is a log-likelihood: shown as its exponential, and better where lower."""
    return task.split()[0] == "perplexity"


def scale(task: str) -> float:
    """What a score is multiplied by for people: shares are shown in per cent."""
    return 1.0 if is_perplexity(task) else 100.0


def figures(row: Summary) -> tuple[str, str, str]:
    """The score and the ends of its interval as people read them: in per cent, or a perplexity."""
    factor, digits = scale(row.task), 2 if is_perplexity(row.task) else 1
    score, low, high = (f"{factor * x:.{digits}f}" for x in (row.score, row.ci_low, row.ci_high))
    return score, low, high


def beside_full(row: Summary) -> tuple[str, ...]:
    """The cells under `BESIDE_FULL` of a perplexity that has a ratio."""
    return (
        f"{row.score:.2f}",
        f"{row.ratio:.4f}",
        f"[{row.ratio_low:.4f}, {row.ratio_high:.4f}]",
        "-" if row.agreement is None else f"{row.agreement:.1%}",
        "-" if row.kl is None else f"{row.kl:.4f}",
        "-" if row.kv_read_share is None else f"{row.kv_read_share:.1%}",
    )


def pooled(records: Iterable[Record]) -> tuple[float | None, float | None, float | None]:
    """KV read share, share of full steps and effective stride, as `Summary` says."""
    read = available = full = steps = 0.0
    for record in records:
        count = record.get("output_tokens") or 0
        share = record.get("kv_read_share")
        if share is not None:
            weight = count * (record.get("prompt_tokens", 0) + count / 2)
            read, available = read + weight * share, available + weight
        for layer in record.get("layers", {}).values():
            full, steps = full + layer["full_steps"], steps + layer["steps"]
    return (
        read / available if available else None,
        full / steps if steps else None,
        steps / full if full else None,
    )


def of_full(records: Iterable[Record]) -> Places:
    """What full attention made of each example."""
    return {_place(record): record for record in records if record["method"] == BASELINE}


def _place(record: Record) -> tuple[str, str, str]:
    return record["task"], record["mode"], record["example"]


def _share_of_same(records: Sequence[Record], full: Places) -> float | None:
    """Over the examples that full attention has been run on."""
    same = [
        record.get("output") == full[place].get("output")
        for record in records
        if record["mode"] == "free" and (place := _place(record)) in full
    ]
    return float(np.mean(same)) if same else None


def _agreement(records: Sequence[Record], full: Places) -> float | None:
    """Pooled over tokens."""
    same = [
        one == other
        for record in records
        for one, other in zip(
            record.get("said") or (), full.get(_place(record), {}).get("said") or (), strict=False
        )
    ]
    return float(np.mean(same)) if same else None


def _divergence(records: Sequence[Record]) -> float | None:
    """Pooled over tokens, as far as it was measured."""
    found = [(r["output_tokens"], r["kl"]) for r in records if r.get("kl") is not None]
    tokens = sum(count for count, _ in found)
    return sum(count * kl for count, kl in found) / tokens if tokens else None


def _ratio(strata: Sequence[Sequence[Record]], full: Places) -> dict[str, float]:
    """Of perplexities, with its interval, where full attention has been fed the same."""
    apart = [
        np.array([r["score"] - full[_place(r)]["score"] for r in group if _place(r) in full])
        for group in strata
    ]
    if not all(len(sample) for sample in apart):
        return {}
    mean = float(np.mean([sample.mean() for sample in apart]))
    ends = (mean, *interval(apart))
    return dict(zip(("ratio", "ratio_low", "ratio_high"), map(math.exp, ends), strict=True))


def _passes(records: Sequence[Record]) -> float | None:
    """Forward passes for each token after the first."""
    counted = [
        (record["output_tokens"] - 1, record["passes_per_token"])
        for record in records
        if record.get("passes_per_token") is not None
    ]
    tokens = sum(count for count, _ in counted)
    return sum(count * passes for count, passes in counted) / tokens if tokens else None


def _summary(
    task: str, mode: str, method: str, strata: Sequence[Sequence[Record]], full: Places
) -> Summary:
    """One row over several tasks, or one."""
    # A seeded bootstrap depends on the order of its data, and batches and processes end in any order.
    strata = [sorted(group, key=lambda record: record["example"]) for group in strata]
    records = [record for group in strata for record in group]
    samples = [np.array([record["score"] for record in group], dtype=float) for group in strata]
    numbers = (float(np.mean([sample.mean() for sample in samples])), *interval(samples))
    if is_perplexity(task):
        numbers = tuple(math.exp(number) for number in numbers)
    answers = [r["answer_tokens"] for r in records if r.get("answer_tokens") is not None]
    return Summary(
        task,
        mode,
        method,
        records[0].get("metric", "score"),
        *numbers,
        len(records),
        float(np.mean([record.get("output_tokens", 0) for record in records])),
        float(np.mean(answers)) if answers else None,
        *pooled(records),
        max((s for r in records if (s := r.get("kv_read_share")) is not None), default=None),
        _share_of_same(records, full),
        _passes(records),
        agreement=_agreement(records, full),
        kl=_divergence(records),
        **(_ratio(strata, full) if is_perplexity(task) else {}),
    )
