"""The C++ kernels equal the reference in every build, threads and batches change no bit, broken ones are noticed."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.kernels.backend import CPU, CPU_TORCH, reference
from refreshkv.kernels.native import attention, build
from refreshkv.kernels.native import selection as native_selection
from refreshkv.policy import selection
from tests.helpers import PROPERTY, needs_compiler
from tests.kernels.comparison import (
    ATTENTION_CHECKS,
    CASES,
    EVERYTHING,
    PLAIN,
    Case,
    check_attend_at,
    check_gather,
    check_lengths,
    check_select,
    check_verify,
)

pytestmark = needs_compiler

# What a processor without the newest instructions would run: flags, and a feature that this machine needs for them.
BUILDS = {"this machine": ((), "")}
if platform.machine() == "x86_64":
    BUILDS |= {
        "no AMX": (("-mno-amx-tile", "-mno-amx-bf16"), "amx_bf16"),
        "no bfloat16": (("-march=skylake-avx512",), "avx512bw"),
        "AVX2": (("-march=haswell",), "avx2"),
        "SSE": (("-march=x86-64",), ""),
    }
CHUNK = 8192  # tokens that share a softmax
IN_BFLOAT16 = [replace(case, dtype=torch.bfloat16) for case in CASES]
SERVED = [case for case in IN_BFLOAT16 if not case.dim % 32 and not (case.value_dim or 0) % 32]
EVERY = replace(EVERYTHING, value_dim=96, dtype=torch.bfloat16)
# A part of a block, of a chunk, and one chunk and a part.
LONG = [
    Case(length=length, dtype=torch.bfloat16, hidden=hidden, sinks=True)
    for length, hidden in ((257, ""), (CHUNK, ""), (CHUNK + 1, "left"), (2 * CHUNK + 77, "holes"))
]


def features() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else ""


@cache
def built(name: str) -> ctypes.CDLL:
    flags, needs = BUILDS[name]
    if needs not in features():
        pytest.skip(f"this processor has no {needs}")
    return build.load(build.build(flags))


def with_build(op: str, **named: Any) -> Callable[..., Any]:
    return partial(getattr(attention, op), **named)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("op", ATTENTION_CHECKS)
def test_every_build_equals_the_reference(op: str, name: str) -> None:
    for case in [*SERVED, *LONG[:2]] if name == "this machine" else [*SERVED[::3], EVERY]:
        ATTENTION_CHECKS[op](with_build(op, library=built(name)), case)


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("op", ["attend_and_score", "verify"])
def test_long_texts_are_worked_off_in_chunks(op: str, case: Case) -> None:
    ATTENTION_CHECKS[op](getattr(CPU, op), case)


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, *LONG], ids=str)
def test_lengths_hide_what_lies_beyond(case: Case) -> None:
    check_lengths(CPU, replace(case, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", LONG, ids=str)
def test_neither_threads_nor_other_rows_change_a_bit(case: Case) -> None:
    """One row of two KV heads on more threads than heads is shared in chunks; two rows on one thread are not."""
    query, keys, values, options = case.several()
    alone: dict[str, Any] = {
        name: x[:1] if isinstance(x, Tensor) and name != "sinks" else x
        for name, x in options.items()
    }
    together = [attention.run(query, keys, values, **options, threads=n) for n in (1, 2, 3, 8)]
    for other in together[1:]:
        assert all(map(torch.equal, together[0], other))
    for threads in (1, 3, 8):
        one = attention.run(query[:1], keys[:1], values[:1], **alone, threads=threads)
        assert all(map(torch.equal, one, (x[:1] for x in together[0])))


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, LONG[0]], ids=str)
def test_entries_by_their_places(case: Case) -> None:
    check_attend_at(CPU.attend_at, replace(case, dtype=torch.bfloat16))


def test_heads_that_nobody_wants_cost_nothing_and_harm_nothing() -> None:
    query, keys, values, options = replace(EVERYTHING, dtype=torch.bfloat16).inputs()
    heads = torch.tensor([[True, False], [False, True]])
    (output, lse), (scores, _) = CPU.attend_and_score(query, keys, values, **options, heads=heads)
    (full, full_lse), (full_scores, _) = CPU.attend_and_score(query, keys, values, **options)
    wanted = heads.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    assert torch.equal(output[wanted], full[wanted]) and torch.equal(lse[wanted], full_lse[wanted])
    assert torch.equal(scores[heads], full_scores[heads]) and not scores[~heads].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.float(),
        lambda x: x[..., ::2],
        lambda x: x[..., :48],
        lambda x: torch.cat([x] * 9, -1),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["float32", "every other number", "48 wide", "576 wide", "gradients"],
)
def test_what_they_do_not_take_goes_the_way_of_torch(change: Callable[[Tensor], Tensor]) -> None:
    query, keys, values, _ = replace(PLAIN, dtype=torch.bfloat16).inputs()
    assert attention.serves(query, keys, values)
    others = change(query), change(keys), change(values)
    assert not attention.serves(*others)
    expected = CPU_TORCH.attend(*others, scale=0.1).output
    assert torch.equal(CPU.attend(*others, scale=0.1).output, expected)


# Selection, for any dtype.


def test_gather_and_select_equal_the_reference() -> None:
    check_gather(native_selection.gather)
    check_select(native_selection.select)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Scores with many ties, and any of the rules."""
    rows, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = draw(st.one_of(st.integers(1, 40), st.integers(200, 700)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(rows, heads, length, generator=gen) ** draw(st.sampled_from([1, 8]))
    if draw(st.booleans()):
        scores = (scores * 5).floor() / 5
    budget = torch.randint(1, length + 3, (rows,), generator=gen)
    options: dict[str, Any] = {"pool_kernel": draw(st.sampled_from([1, 3, 7, 9]))}
    if draw(st.booleans()):
        options["visible"] = torch.rand(rows, length, generator=gen) < 0.7
    if draw(st.booleans()):
        options["ends"] = torch.randint(1, length + 1, (rows,), generator=gen)
    if draw(st.booleans()):
        options["recent"] = torch.randint(0, 9, (rows,), generator=gen)
    if draw(st.booleans()):
        places = torch.rand(rows, heads, length, generator=gen).argsort(-1)[..., :4]
        within = options.get("ends", torch.full((rows,), length))[:, None, None]
        options["anchors"] = places.masked_fill(places >= within, selection.FREE)
    if draw(st.booleans()):
        options["slots"] = int(budget.max()) + 2
    return scores, budget, options


@PROPERTY
@given(choices())
def test_selection_is_that_of_the_definition(given: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    scores, budget, options = given
    assert native_selection.serves(scores, budget, **options)
    ours = native_selection.select(scores, budget, **options)
    theirs = selection.select(scores, budget, **options)
    assert torch.equal(ours.filled, theirs.filled)
    assert torch.equal(ours.positions, theirs.positions)


@pytest.mark.parametrize("kind", ["softmax", "uniform", "all equal"])
def test_selection_among_many(kind: str) -> None:
    gen = torch.Generator().manual_seed(0)
    scores = {
        "softmax": torch.randn(1, 2, 30_000, generator=gen).mul(4).softmax(-1),
        "uniform": torch.rand(1, 2, 30_000, generator=gen),
        "all equal": torch.full((1, 2, 30_000), 0.25),
    }[kind]
    for budget in (1, 17, 1024, 29_999, 30_000):
        ours = native_selection.select(scores, torch.tensor([budget]))
        assert torch.equal(ours.positions, selection.select(scores, torch.tensor([budget]))[0])


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_the_best_slots_are_those_of_the_definition(count: int) -> None:
    gen = torch.Generator().manual_seed(count)
    for slots in (1, 2, 8, 300):
        scores = (torch.rand(3, 2, slots, generator=gen) * 9).floor() / 9
        newest = torch.randint(0, slots, (3, 2), generator=gen)
        expected = reference.top_slots(scores, newest, count)
        assert torch.equal(native_selection.top_slots(scores, newest, count), expected)


# The build.


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build.library.cache_clear()


def test_the_library_is_compiled_once(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))
    monkeypatch.setenv(
        "CXX", f"{shutil.which('env')} c++"
    )  # a command with arguments, as with ccache
    path = build.build()
    assert path.parent == fresh_build / "refreshkv"
    assert list(path.parent.iterdir()) == [path]
    before = path.stat().st_mtime_ns
    assert build.build() == path
    assert path.stat().st_mtime_ns == before
    assert build.build(["-DOTHER"]) != path


@pytest.mark.parametrize(
    "reason", ["no compiler", "it fails", "it is not there", "no OpenMP", "no place to write"]
)
def test_without_a_library_one_warning_says_why(
    reason: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "no compiler":
        monkeypatch.setenv("PATH", str(fresh_build))
        said = "no C\\+\\+ compiler is on the path"
    elif reason == "it fails":
        monkeypatch.setenv("CXX", shutil.which("false") or "/bin/false")
        said = "false failed"
    elif reason == "it is not there":
        monkeypatch.setenv("CXX", "/nonexistent/c++")
        said = "does not run"
    elif reason == "no OpenMP":
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-fno-openmp"))
        said = "OpenMP is needed"
    else:
        monkeypatch.setattr(build.safe_folder, "kept", lambda: None)
        monkeypatch.setattr(build.safe_folder, "private", lambda: fresh_build / "gone")
        said = "No such file or directory"
    query, keys, values, options = replace(PLAIN, dtype=torch.bfloat16).inputs()
    with pytest.warns(RuntimeWarning, match=said) as warned:
        ours = [CPU.attend(query, keys, values, **options).output for _ in range(2)]
    assert len(warned) == 1
    assert "REFRESHKV_NATIVE=0" in str(warned[0].message)
    assert torch.equal(ours[1], CPU_TORCH.attend(query, keys, values, **options).output)
    assert not [path for path in fresh_build.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("error")
def test_it_can_be_switched_off(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRESHKV_NATIVE", "0")
    query, keys, values, options = replace(PLAIN, dtype=torch.bfloat16).inputs()
    assert not attention.serves(query, keys, values)
    CPU.attend(query, keys, values, **options)


def test_a_cache_that_cannot_be_written_is_done_without(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = fresh_build / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))
    assert build.build().exists()


def test_the_library_has_no_threads_of_its_own() -> None:
    """It runs on those of torch's OpenMP: a second runtime in the process would fight for the cores."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import torch; from refreshkv.kernels.native.build import library; library();"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


# From here on: what is wrong is noticed.

MUTANTS = [
    ("attention.cpp", "total *= kept;", ";"),
    ("attention.cpp", "store(mixed + d, load<Floats>(mixed + d) * kept);", ";"),
    ("attention.cpp", "to = std::clamp<int64_t>(last + 1 - place", "to = std::clamp<int64_t>(last - place"),
    ("attention.cpp", "last - job.window + 1 - place", "last - job.window - place"),
    ("attention.cpp", "std::fill(row + to, row + padded, -kInfinity);", ""),
    ("attention.cpp", "if (!visible[x]) row[x] = -kInfinity;", ";"),
    ("attention.cpp", "while (first < end && !visible[first]) ++first;", "++first;"),
    ("attention.cpp", "(job.mean ? job.group : 1)", "1"),
    ("attention.cpp", "t < part.voting", "t < job.queries"),
    ("attention.cpp", "share *= 1 / (1 + std::exp(job.sinks[head] - lse))", "share *= 1"),
    ("attention.cpp", "std::exp2(into.top[i] - top), added", "1.0f, added"),
    ("attention.cpp", "std::fill(scores + part.end, scores + job.length, 0.0f);", ""),
    ("attention.cpp", "put_in_order(low, high);", ""),
    ("attention.cpp", "(length + 31) / 32 * 32 + 32", "length / 32 * 32"),
    ("product.h", "r < n && (!visible || visible[r])", "!visible || visible[r]"),
    ("lanes.h", "p = p * f + 2.4015453e-1f;", "p = p * f + 1.4e-1f;"),
]  # fmt: skip


def mutant(
    file: str, old: str, new: str, compiled: str, folder: Path, patch: pytest.MonkeyPatch
) -> ctypes.CDLL:
    """A library of the source `compiled` alone, with one textual change to a file."""
    sources = Path(build.__file__).parent
    for path in [*sources.glob("*.cpp"), *sources.glob("*.h")]:
        text = path.read_text()
        if path.name == file:
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
            text = text.replace(old, new)
        (folder / path.name).write_text(text)
    patch.setenv("XDG_CACHE_HOME", str(folder))
    patch.setattr(build, "_SOURCES", [folder / compiled])
    patch.setattr(build, "_HEADERS", sorted(folder.glob("*.h")))
    return ctypes.CDLL(str(build.build(["-O1"])))


@pytest.mark.parametrize(("file", "old", "new"), MUTANTS, ids=[m[1] for m in MUTANTS])
def test_a_broken_kernel_is_noticed(
    file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutant(file, old, new, "attention.cpp", tmp_path, monkeypatch)
    check = partial(attention.verify, library=broken)
    with pytest.raises(AssertionError):  # noqa: PT012
        for case in (EVERY, *LONG, Case(rows=3, dtype=torch.bfloat16)):
            check_verify(check, case)
        ATTENTION_CHECKS["attend_and_score"](
            partial(attention.attend_and_score, library=broken), LONG[2]
        )
