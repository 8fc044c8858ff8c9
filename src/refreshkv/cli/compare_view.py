"""What `refreshkv compare` prints: a row a mode, where texts part, the verdict; the same as JSON; and the preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refreshkv.cli import common
from refreshkv.cli.eval_view import sections
from refreshkv.cli.generate import STATS
from refreshkv.cli.side_by_side_view import TITLE, plain, share
from refreshkv.evals.candidates import Candidate
from refreshkv.evals.compare import FULL, TRANSFORMERS, Comparison, Row
from refreshkv.evals.verdict import Verdict
from refreshkv.presets import write_preset

HEADINGS = ("texts", "tokens", "ppl", "tok/s", "speed", "whole", "KV read", "cache")
MOST_SHOWN = 12  # differences
NOTES = (
    "Texts: that are full attention's. Tokens: of its text, fed, the share that the row would have written too; what"
    " transformers lacks there is rounding, as is a text that leaves it where two tokens are as likely (nats). ppl:"
    " perplexity of that text over full attention's. tok/s: of decoding. Speed: of it over the faster of transformers"
    " and full, median of the rounds; whole: with the prompt's pass. KV read: against full attention. Cache: memory of"
    " keys, values and all beside them; + is what a row adds."
)


def show(comparison: Comparison, verdict: Verdict, saved: Path | None) -> None:
    """Print everything to stdout, the verdict last."""
    from refreshkv.stats import KV_READ_NOTE

    console, rows = common.console(), comparison.rows()
    prompts, new = len(comparison.written), sum(comparison.written.values())
    title = f"Greedy; full attention wrote {new} tokens"
    section = f"{prompts} prompt{'s' * (prompts != 1)}"
    shown = [(section, cells(row, rows, verdict)) for row in rows]
    console.print(sections(HEADINGS, shown, title=title, **TITLE))
    console.print(f"{NOTES} {KV_READ_NOTE}")
    found = list(differences(rows))
    for line in found[:MOST_SHOWN]:
        console.print(plain(line), soft_wrap=True)
    if len(found) > MOST_SHOWN:
        console.print(f"and {len(found) - MOST_SHOWN} more, which --json has")
    console.print(f"\n{plain(verdict.text)}", soft_wrap=True)
    chosen = named(rows, verdict)
    if chosen is not None:
        console.print(plain(f"  {call(chosen)}"), soft_wrap=True)
    if saved is not None:
        console.print(plain(f"  --preset {saved}"), soft_wrap=True)


def cells(row: Row, rows: Sequence[Row], verdict: Verdict) -> tuple[str, ...]:
    """A row of the table."""
    full = next(one for one in rows if one.name == FULL)
    speed = verdict.speedups.get(row.name)
    return (
        row.name,
        f"{row.same}/{len(row.texts)}" if row.texts else "-",
        "-" if row.agreement is None else f"{row.agreement:.1%}",
        "-" if row.perplexity_ratio is None else ratio(row.perplexity_ratio),
        "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
        "-" if speed is None else f"{speed.median:.2f}x",
        "-" if speed is None else f"{speed.with_prompt:.2f}x",
        share(row.kv_read_share),
        memory(row, full),
    )


def memory(row: Row, full: Row) -> str:
    """The cache of full attention, and what another adds to it."""
    if row.cache_bytes is None or full.cache_bytes is None:
        return "-"
    if row is full:
        return size(row.cache_bytes)
    added = row.cache_bytes - full.cache_bytes
    return f"{'-' if added < 0 else '+'}{size(abs(added))}"


def ratio(value: float) -> str:
    """Three digits behind the point, for what is near 1; few digits of what is far."""
    return f"{value:.3f}" if value < 10 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def differences(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each text that is not full attention's."""
    for row in rows:
        for text in row.texts:
            if (found := text.difference) is not None:
                where = f"{row.name}, {text.prompt}: token {found.token} differs"
                full, own = (
                    repr(words) if words else "the end" for words in (found.full, found.own)
                )
                nats = "" if found.nats is None else f" ({found.nats:.2g} nats)"
                yield f"{where} after {found.before!r}: full attention {full}, here {own}{nats}"


def named(rows: Sequence[Row], verdict: Verdict) -> Candidate | None:
    """What the verdict says to use."""
    return next((row.candidate for row in rows if row.name == verdict.use), None)


def call(candidate: Candidate) -> str:
    """How Python asks for it."""
    given = dict(candidate.arguments)
    if not isinstance(preset := given.get("preset", ""), str):
        given = {**preset, **{name: given[name] for name in given if name != "preset"}}
    return f"refreshkv.attach({', '.join(['model', *(f'{k}={v!r}' for k, v in given.items())])})"


def record(
    comparison: Comparison,
    verdict: Verdict,
    bar: float,
    saved: Path | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The machine-readable form (docs/cli.md)."""
    rows = comparison.rows()
    prompts = [
        {"name": name, "prompt_tokens": len(tokens), "new_tokens": comparison.written.get(name)}
        for name, tokens in comparison.tokens.items()
    ]
    chosen = named(rows, verdict)
    return {
        **about,
        "prompts": prompts,
        "baseline": verdict.baseline,
        "results": [row_record(row, verdict) for row in rows],
        "verdict": {
            "text": verdict.text,
            "use": verdict.use,
            "bar": bar,
            "arguments": None if chosen is None else chosen.arguments,
        },
        "preset_file": None if saved is None else str(saved),
    }


def row_record(row: Row, verdict: Verdict) -> dict[str, Any]:
    """One row; speeds are null where nothing was timed."""
    found = {one.name: getattr(row, one.name) for one in dataclasses.fields(row)}
    candidate, stats = found.pop("candidate"), found.pop("stats")
    speed = verdict.speedups.get(row.name)
    return {
        **found,
        "config": None if candidate is None else candidate.config,
        "stats": None if stats is None else {name: stats[name] for name in STATS},
        "tokens_per_s": row.tokens_per_s,
        "speedup": None if speed is None else speed.median,
        "speedup_least": None if speed is None else speed.least,
        "speedup_with_prompt": None if speed is None else speed.with_prompt,
    }


def save(
    file: Path, rows: Sequence[Row], verdict: Verdict, about: Mapping[str, Any]
) -> Path | None:
    """Write the settings of the verdict as a preset; `None` where it names none, or none that can be one."""
    row = next((row for row in rows if row.name == verdict.use and row.name != TRANSFORMERS), None)
    config = None if row is None or row.candidate is None else row.candidate.preset
    if row is None or config is None:
        return None
    kept = ("same", "agreement", "perplexity_ratio", "kv_read_share", "tokens_per_s")
    kept += ("speedup", "speedup_least", "speedup_with_prompt", "cache_bytes")
    found = row_record(row, verdict)
    measured = {name: found[name] for name in kept}
    where = {name: value for name, value in about.items() if name not in ("model", "complete")}
    measured |= {"texts": len(row.texts), "baseline": verdict.baseline, **where}
    write_preset(file, config, model=about["model"], measured=measured)
    return file
