"""The speed section of README.md, written from the rows in `benchmarks/results`, so that no number is anybody's own.

    python -m refreshkv.bench.readme [README.md] [benchmarks/results]

rewrites the part between the two markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refreshkv.bench.record import Row, read

BEGIN = "<!-- speed: written by `python -m refreshkv.bench.readme` from benchmarks/results; do not edit -->"
END = "<!-- end of speed -->"
_PLACES = {"cpu": "CPU", "cuda": "GPU"}
_MS = "ms"  # three digits, however large
_NONE = "No row yet: `make bench-{}` on such a machine makes them."
# Column of the table -> column of the file, and how to write it.
_DECODE = {
    "K": ("budget", "{:,}"),
    "weights alone": ("ms.empty", _MS),
    "eviction, same K": ("ms.snapkv", _MS),
    "partial step": ("ms.partial", _MS),
    "full step": ("ms.full", _MS),
    "our dense": ("ms.own_dense", _MS),
    "StaticCache": ("ms.static", _MS),
    "DynamicCache": ("ms.default", _MS),
    "mix over our dense": ("ratios.mix_over_own_dense", "{:.2f}x"),
    "over StaticCache": ("ratios.mix_over_static", "{:.2f}x"),
    "over DynamicCache": ("ratios.mix_over_default", "{:.2f}x"),
    "of what the bytes allow": ("ratios.share_of_ideal", "{:.0%}"),
    "`fast` over our dense": ("ratios.fast_over_own_dense", "{:.2f}x"),
}
_EXACT = {
    "K": ("budget", "{:,}"),
    "drafts": ("draft", "{}"),
    "that stand": ("acceptance", "{:.0%}"),
    "draft": ("ms.draft", _MS),
    "full pass": ("ms.verify", _MS),
    "cycle": ("ms.cycle", _MS),
    "a token": ("ms.exact", _MS),
    "our dense": ("ms.own_dense", _MS),
    "over our dense": ("ratios.exact_over_own_dense", "{:.2f}x"),
    "over StaticCache": ("ratios.exact_over_static", "{:.2f}x"),
    "of what the bytes allow": ("ratios.exact_share_of_ideal", "{:.0%}"),
}
_KERNEL = {
    "µs": ("us", _MS),
    "of the bandwidth": ("bandwidth_share", "{:.0%}"),
    "the fastest of others": ("rival", "{}"),
    "its µs": ("rival_us", _MS),
}


def section(results: Path) -> str:
    """What stands between the markers."""
    parts = []
    for kind, place in _PLACES.items():
        parts.append(f"### On a {place}")
        rows = newest(read(results / f"decode-{kind}.csv"), _SIZE)
        rows = [row for row in rows if row["shape"] != "demo"]
        if not rows:
            parts.append(_NONE.format("cpu" if kind == "cpu" else "gpu"))
        for group in _alike(rows, _MACHINE):
            parts += _decode_parts(group, f"decode-{kind}.csv")
        kernels = newest(read(results / f"kernels-{kind}.csv"), (*_SIZE, "kernel"))
        for group in _alike([row for row in kernels if row["shape"] != "demo"], _MACHINE):
            parts += _kernel_parts(group, f"kernels-{kind}.csv")
    return "\n\n".join(parts)


_MACHINE = ("shape", "dtype", "device", "threads", "versions.kernels")
_SIZE = (*_MACHINE, "batch", "context", "budget", "stride", "draft", "acceptance")


def newest(rows: Iterable[Row], same: Sequence[str]) -> list[Row]:
    """The last of the rows that agree in `same`, as far as they have it, in the order of rows and context."""
    last = {tuple(row.get(name) for name in same): row for row in rows}
    return sorted(last.values(), key=lambda row: (row["shape"], row["batch"], row["context"]))


def rewrite(text: str, results: Path) -> str:
    """README.md with its speed section as the rows have it.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{rest.split(END)[1]}"


def _decode_parts(rows: list[Row], file: str) -> list[str]:
    """A paragraph and a table for the mixes, and one more for the lossless mode where it was timed."""
    one = rows[0]
    strides = " or ".join(sorted({str(row["stride"]) for row in rows}))
    parts = [
        f"Shape of {one['shape']} (random weights), {one['dtype']}, {_where(one)}; median milliseconds a"
        f" step, all variants taking turns in one run (`refreshkv bench decode`, `benchmarks/results/{file}`). The mix"
        f" is S = {strides}: one full step in S, the others partial.",
        _table("rows x context", rows, _DECODE),
    ]
    exact = [row for row in rows if row["ms.exact"] is not None]
    if exact:
        parts += [
            "The lossless mode; how many drafts of a cycle stand is a matter of text, which docs/fidelity.md measures:",
            _table("rows x context", exact, _EXACT),
        ]
    return parts


def _kernel_parts(rows: list[Row], file: str) -> list[str]:
    one = rows[0]
    micro = [
        {**row, "us": 1e3 * row["ms"], "rival_us": 1e3 * row["rival_ms"], "context": row["context"]}
        for row in rows
    ]
    return [
        f"Kernels on one layer of {one['shape']}, {one['dtype']}, {_where(one)}, cold caches"
        f" (`refreshkv bench kernels`, `benchmarks/results/{file}`):",
        _table("rows x context, kernel", micro, _KERNEL),
    ]


def _where(row: Row) -> str:
    threads = (
        f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if "CPU" in row["device"] else ""
    )
    return f"{row['device']}{threads}, kernels in {row['versions.kernels']}"


def _table(first: str, rows: Sequence[Row], columns: dict[str, tuple[str, str]]) -> str:
    lines = [f"| {first} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [_cell(row[name], form) for name, form in columns.values()]
        name = f"{row['batch']} x {_thousands(row['context'])}"
        name += f", `{row['kernel']}`" if "kernel" in row else ""
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if form == _MS:
        return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
    return form.format(value)


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _alike(rows: Iterable[Row], same: Sequence[str]) -> list[list[Row]]:
    """Rows that agree in `same`, together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in same), []).append(row)
    return list(groups.values())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", nargs="?", type=Path, default=Path("README.md"))
    parser.add_argument("results", nargs="?", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    text = given.readme.read_text(encoding="utf-8")
    given.readme.write_text(rewrite(text, given.results), encoding="utf-8")


if __name__ == "__main__":
    main()
