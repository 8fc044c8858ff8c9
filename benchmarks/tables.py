"""The timings in README.md and docs/bench.md, written from `benchmarks/results`, so that no number is anybody's own.

    python benchmarks/tables.py [FOLDER OF THE CHECKOUT]

rewrites what stands between the two markers: a few rows in README.md, all of them in docs/bench.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from refreshkv.bench.record import Row, read
from refreshkv.cli.bench_view import Column, cells

BEGIN = (
    "<!-- speed: written by `python benchmarks/tables.py` from benchmarks/results; do not edit -->"
)
END = "<!-- end of speed -->"
_PLACES = {"cpu": "cpu", "cuda": "gpu"}  # the name of a file -> that of the target of make
_NONE = "No row yet: `make bench-{}` on such a machine makes them."
_MOST = 10  # rows of a machine in README.md
_TIMES = "{:.2f}x"


def _three(value: float) -> str:
    """At least three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


_SUMMARY = {
    "K": Column("budget", "{:,}"),
    "DynamicCache": Column("ms.default", _three),
    "StaticCache": Column("ms.static", _three),
    "our full attention": Column("ms.own_dense", _three),
    "mix": Column("ms.mix", _three),
    "mix over ours": Column("ratios.mix_over_own_dense", _TIMES),
    "mixed": Column("ms.mixed", _three),
    "mixed over ours": Column("ratios.mixed_over_own_dense", _TIMES),
    "drafts": Column("draft"),
    "lossless": Column("ms.exact", _three),
    "lossless over ours": Column("ratios.exact_over_own_dense", _TIMES),
    "lossless over StaticCache": Column("ratios.exact_over_static", _TIMES),
}
_DECODE = {
    "K": Column("budget", "{:,}"),
    "weights alone": Column("ms.empty", _three),
    "eviction, same K": Column("ms.snapkv", _three),
    "partial step": Column("ms.partial", _three),
    "full step": Column("ms.full", _three),
    "our dense": Column("ms.own_dense", _three),
    "StaticCache": Column("ms.static", _three),
    "DynamicCache": Column("ms.default", _three),
    "mix over our dense": Column("ratios.mix_over_own_dense", _TIMES),
    "over StaticCache": Column("ratios.mix_over_static", _TIMES),
    "over DynamicCache": Column("ratios.mix_over_default", _TIMES),
    "of what the bytes allow": Column("ratios.share_of_ideal", "{:.0%}"),
    "mixed step": Column("ms.mixed", _three),
    "mixed over our dense": Column("ratios.mixed_over_own_dense", _TIMES),
}
_SERVED = {
    "ms a step": Column("step_ms", _three),
    "tokens a second": Column("tokens_per_s", _three),
    "over stock": Column("over_stock", _TIMES),
}
_FLASH = {"FlashAttention": Column("ms.flash", _three)}  # where it was timed
_EXACT = {
    "K": Column("budget", "{:,}"),
    "drafts": Column("draft"),
    "that stand": Column("acceptance", "{:.0%}"),
    "draft": Column("ms.draft", _three),
    "full pass": Column("ms.verify", _three),
    "cycle": Column("ms.cycle", _three),
    "a token": Column("ms.exact", _three),
    "our dense": Column("ms.own_dense", _three),
    "over our dense": Column("ratios.exact_over_own_dense", _TIMES),
    "over StaticCache": Column("ratios.exact_over_static", _TIMES),
    "of what the bytes allow": Column("ratios.exact_share_of_ideal", "{:.0%}"),
}
_KERNEL = {
    "µs": Column("ms", _three, 1e3),
    "of the bandwidth": Column("bandwidth_share", "{:.0%}"),
    "the fastest of others": Column("rival"),
    "its µs": Column("rival_ms", _three, 1e3),
}
_GENERATE = {
    "variant": Column("variant"),
    "new tokens": Column("new_tokens"),
    "prompt, s": Column("prefill_s", _three),
    "tokens/s": Column("tokens_per_s", _three),
    "of the second half": Column("later_tokens_per_s", _three),
    "as vanilla": Column("same_tokens"),
}
_MACHINE = ("shape", "dtype", "device", "threads", "versions.kernels")
_SIZE = (*_MACHINE, "batch", "context", "budget", "stride", "draft", "acceptance")


def summary(results: Path) -> str:
    """What stands between the markers in README.md: what a token costs in each mode."""
    return _places(results, lambda rows, file: _short(rows[:_MOST], file), {})


def section(results: Path) -> str:
    """What stands between the markers in docs/bench.md: every newest row."""
    return _places(results, _decode, {"kernels": _kernels, "generate": _generate})


def served(results: Path) -> str:
    """What stands between the markers in docs/vllm.md: the newest rows of vLLM's decoding."""
    rows = [row for kind in _PLACES.values() for row in read(results / f"vllm-{kind}.csv")]
    same = ("shape", "layers", "context", "requests", "block", "variant", "device", "dtype")
    last = {tuple(row[name] for name in same): row for row in rows}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in last.values():
        groups.setdefault((*(row[name] for name in same[:4]), row["time"][:13]), []).append(row)
    parts = []
    for group in groups.values():
        row = group[0]
        parts.append(
            f"{row['requests']} requests of {row['context']:,} tokens at once, shape of {row['shape']} with"
            f" {row['layers']} layers (random weights), {row['dtype']}, {row['device']}, {row['threads']} threads,"
            f" vLLM {row['versions.vllm']}, blocks of {row['block']} tokens"
            " (`python benchmarks/vllm_decode.py`, `benchmarks/results/vllm-*.csv`):"
        )
        lines = ["| | ms a step | tokens a second | over stock |", "|---|---:|---:|---:|"]
        for one in group:
            named = [one["variant"], *cells(one, _SERVED)]
            lines.append(f"| {' | '.join(named)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No row yet: `python benchmarks/vllm_decode.py` makes them."


DOCUMENTS = {"README.md": summary, "docs/bench.md": section, "docs/vllm.md": served}


def rewrite(text: str, written: str) -> str:
    """A document with `written` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{written}\n\n{END}{rest.split(END)[1]}"


def newest(rows: Iterable[Row], same: Sequence[str]) -> list[Row]:
    """The last of the rows that agree in `same`, as far as they have it, in the order of rows and context."""
    last = {tuple(row.get(name) for name in same): row for row in rows}
    return sorted(last.values(), key=lambda row: (row["shape"], row["batch"], row["context"]))


Parts = Callable[[list[Row], str], list[str]]


def _places(results: Path, decode: Parts, more: dict[str, Parts]) -> str:
    """A heading a kind of machine, then the parts of each machine of that kind."""
    parts = []
    for kind, target in _PLACES.items():
        parts.append(f"### On a {target.upper()}")
        said = len(parts)
        for name, write in {"decode": decode, **more}.items():
            file = f"{name}-{kind}.csv"
            rows = [row for row in read(results / file) if row["shape"] != "demo"]
            groups: dict[tuple[Any, ...], list[Row]] = {}
            for row in newest(_over_turns(rows), (*_SIZE, "kernel", "new", "variant")):
                groups.setdefault(tuple(row[name] for name in _MACHINE), []).append(row)
            for group in groups.values():
                parts += write(group, file)
        if len(parts) == said:
            parts.append(_NONE.format(target))
    return "\n\n".join(parts)


def _short(rows: list[Row], file: str) -> list[str]:
    """A paragraph and a table: full attention, the mix, the mixed mode, the lossless mode."""
    drafts = sorted({(row["draft"], row["acceptance"]) for row in rows})
    stand = " or ".join(f"{draft} drafts of which {share:.0%} stand" for draft, share in drafts)
    return [
        f"Median milliseconds a token, {_about(rows[0], file)}. The mix is the published method at a fixed"
        f" stride, one full step in {_strides(rows)}; mixed is `fast` with that K; lossless is {stand}, which is a"
        " matter of text ([fidelity](docs/fidelity.md)).",
        _table("rows x context", rows, _SUMMARY),
    ]


def _decode(rows: list[Row], file: str) -> list[str]:
    """A paragraph and a table for the lossy modes, and one more for the lossless mode where it was timed."""
    columns = _DECODE | _FLASH if any(row["ms.flash"] is not None for row in rows) else _DECODE
    parts = [
        f"Median milliseconds a step, {_about(rows[0], file)}. The mix is S = {_strides(rows)}: one full step in S, the"
        " others partial.",
        _table("rows x context", rows, columns),
    ]
    exact = [row for row in rows if row["ms.exact"] is not None]
    if exact:
        parts += [
            "The lossless mode; how many drafts of a cycle stand is a matter of text ([fidelity](fidelity.md)):",
            _table("rows x context", exact, _EXACT),
        ]
    return parts


def _kernels(rows: list[Row], file: str) -> list[str]:
    return [
        f"Kernels on one layer, cold caches, {_about(rows[0], file)}:",
        _table("rows x context, kernel", rows, _KERNEL),
    ]


def _generate(rows: list[Row], file: str) -> list[str]:
    return [
        f"`generate` from the prompt on, {_about(rows[0], file)}. Tokens per second of all rows, after the first token;"
        " the second half is without what warms up. The last column counts tokens from the first on that are those of"
        " transformers' `DynamicCache`:",
        _table("rows x prompt", rows, _GENERATE),
    ]


def _over_turns(rows: list[Row]) -> list[Row]:
    """Rows of `bench generate`: those of the turns of a run become one of median times."""
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for number, row in enumerate(rows):
        run = (row["time"], row["variant"]) if "turn" in row else (number,)
        runs.setdefault(run, []).append(row)
    found = []
    for turns in runs.values():
        times = {}
        for name in ("prefill_s", "tokens_per_s", "later_tokens_per_s") if len(turns) > 1 else ():
            values = [turn[name] for turn in turns if turn[name] is not None]
            times[name] = statistics.median(values) if values else None
        found.append({**turns[-1], **times})
    return found


def _about(row: Row, file: str) -> str:
    """The settings that all rows of a table share, and how they were made."""
    threads = f", {row['threads']} threads" if "CPU" in row["device"] else ""
    model = f"shape of {row['shape']} (random weights)"
    if row["shape"] == "bundled":
        model = "the bundled model"
    return (
        f"{model}, {row['dtype']}, {row['device']}{threads}, kernels in"
        f" {row['versions.kernels']} (`refreshkv bench {file.split('-')[0]}`, `benchmarks/results/{file}`)"
    )


def _strides(rows: list[Row]) -> str:
    return " or ".join(sorted({str(row["stride"]) for row in rows}))


def _table(first: str, rows: Sequence[Row], columns: dict[str, Column]) -> str:
    """By size, and by kernel where rows have one; the first column is headed `first`."""
    lines = [f"| {first} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        tokens = row["context"]
        size = f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
        kernel = f", `{row['kernel']}`" if "kernel" in row else ""
        named = [f"{row['batch']} x {size}{kernel}", *cells(row, columns)]
        lines.append(f"| {' | '.join(named)} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    folder = parser.parse_args().folder
    for name, write in DOCUMENTS.items():
        text = (folder / name).read_text(encoding="utf-8")
        written = rewrite(text, write(folder / "benchmarks" / "results"))
        (folder / name).write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
