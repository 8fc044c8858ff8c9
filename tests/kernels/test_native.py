"""The C++ kernels equal the reference in every build, threads and batches change no bit, broken ones are noticed."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.backend import CPU
from refreshkv.kernels.native import attention, build
from refreshkv.kernels.native import selection as native_selection
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy import selection
from tests.helpers import PROPERTY, needs_compiler
from tests.kernels.cases import (
    CASES,
    EVERYTHING,
    LAYOUTS,
    PER_HEAD,
    PLAIN,
    WHOLE,
    Case,
    laid_out,
)
from tests.kernels.comparison import (
    ATTENTION_CHECKS,
    TOLERANCE,
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
CHUNK = 8192  # entries that share a softmax
# Head dims that fill no register of a narrow machine, and one beyond a register of any.
NARROW = [
    Case(dim=8, value_dim=8),
    Case(dim=24, value_dim=7, hidden="holes"),
    Case(dim=1),
    Case(dim=310),
]
EVERY = replace(EVERYTHING, value_dim=80, dtype=torch.bfloat16)
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
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


def with_build(op: str, library: ctypes.CDLL) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "compiled", lambda: library)
            return getattr(attention, op)(*given, **named)

    return run


@pytest.mark.parametrize("name", BUILDS)
@EVERY_DTYPE
@pytest.mark.parametrize("op", ATTENTION_CHECKS)
def test_every_build_equals_the_reference(op: str, dtype: torch.dtype, name: str) -> None:
    cases = [*CASES, *PER_HEAD, *NARROW, *LONG[:2]]
    for case in cases if name == "this machine" else [*CASES[::4], *NARROW, EVERY]:
        ATTENTION_CHECKS[op](with_build(op, library=built(name)), replace(case, dtype=dtype))


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("op", ["attend_and_score", "verify"])
def test_long_texts_are_worked_off_in_chunks(op: str, case: Case) -> None:
    ATTENTION_CHECKS[op](getattr(CPU, op), case)


@EVERY_DTYPE
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, *LONG], ids=str)
def test_lengths_hide_what_lies_beyond(case: Case, dtype: torch.dtype) -> None:
    check_lengths(CPU, replace(case, dtype=dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("case", LONG, ids=str)
def test_neither_threads_nor_other_rows_change_a_bit(case: Case, dtype: torch.dtype) -> None:
    """One row of two KV heads on more threads than heads is shared in chunks; two rows on one thread are not."""
    case = replace(case, dtype=dtype)
    _, entries, options = case.inputs()
    query, starts = case.several()
    visible = None if options.visible is None else options.visible[:1]
    together = [
        attention.run(query, entries, options, starts=starts, threads=n) for n in (1, 2, 3, 8)
    ]
    for other in together[1:]:
        assert all(map(torch.equal, together[0], other))
    for threads in (1, 3, 8):
        one = attention.run(
            query[:1],
            Entries(entries.keys[:1], entries.values[:1]),
            replace(options, visible=visible),
            starts=starts[:1],
            threads=threads,
        )
        assert all(map(torch.equal, one, (x[:1] for x in together[0])))


@EVERY_DTYPE
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, *LONG], ids=str)
def test_where_entries_lie_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype, value_dim=48)
    query, dense, options = case.inputs()
    several, starts = case.several()
    expected = attention.run(query[:, :, None], dense, options)
    expected_several = attention.run(several, dense, options, starts=starts)
    for layout in LAYOUTS[1:]:
        entries = laid_out(dense, layout)
        assert all(map(torch.equal, attention.run(query[:, :, None], entries, options), expected))
        if layout in WHOLE:
            ours = attention.run(several, entries, options, starts=starts)
            assert all(map(torch.equal, ours, expected_several))


@EVERY_DTYPE
def test_any_order_of_the_dimensions(dtype: torch.dtype) -> None:
    """As a store may keep them: tokens before heads, K beside V; and queries as a model makes them."""
    case = replace(EVERYTHING, dtype=dtype, dim=80)
    query, dense, options = case.inputs()
    both = torch.cat([dense.keys, dense.values], -1).transpose(1, 2).contiguous().transpose(1, 2)
    entries = Entries(both[..., :80], both[..., 80:])
    query = query[:, :, None].repeat(1, 1, 1, 2)[..., 80:]
    expected = attention.run(query.contiguous(), dense, options)
    assert all(map(torch.equal, attention.run(query, entries, options), expected))


def test_heads_that_nobody_wants_cost_nothing_and_harm_nothing() -> None:
    query, entries, options = replace(EVERYTHING, dtype=torch.bfloat16).inputs()
    heads = torch.tensor([[True, False], [False, True]])
    (output, lse), (scores, _) = CPU.attend_and_score(query, entries, replace(options, heads=heads))
    (full, full_lse), (full_scores, _) = CPU.attend_and_score(query, entries, options)
    wanted = heads.repeat_interleave(query.shape[1] // entries.kv_heads, 1)
    assert torch.equal(output[wanted], full[wanted]) and torch.equal(lse[wanted], full_lse[wanted])
    assert torch.equal(scores[heads], full_scores[heads]) and not scores[~heads].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x[..., ::2],
        lambda x: torch.cat([x] * 9, -1),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["float64", "every other number", "576 wide", "gradients"],
)
def test_what_they_do_not_take_goes_to_the_reference(change: Callable[[Tensor], Tensor]) -> None:
    query, entries, options = PLAIN.inputs()
    assert attention.serves(query, entries, options)
    query, entries = change(query), Entries(change(entries.keys), change(entries.values))
    assert not attention.serves(query, entries, options)
    expected = reference.attend(query, entries, options).output
    assert torch.equal(CPU.attend(query, entries, options).output, expected)


def test_dtypes_do_not_mix() -> None:
    query, entries, options = PLAIN.inputs()
    mixed = replace(entries, values=entries.values.half())
    assert not attention.serves(query, mixed, options)
    assert not attention.serves(query.half(), entries, options)


@pytest.mark.parametrize("name", BUILDS)
def test_every_number_of_16_bits_goes_in_and_out(name: str) -> None:
    """It is the value of all entries, NaN remains one; then a quarter of them has the next number."""
    values = torch.arange(2**16).short().view(torch.float16).view(1, 128, 1, 512)
    other = values.view(torch.int16).add(1).view(torch.float16)
    query, keys = torch.zeros(1, 128, 8).half(), torch.zeros(1, 128, 4, 8).half()
    attend = with_build("attend", built(name))
    for last in (values, other):
        entries = Entries(keys, torch.cat([values, values, values, last], 2))
        output = attend(query, entries, AttendOptions(scale=1.0)).output
        expected = (values.float() * 0.75 + last.float() * 0.25).half().squeeze(2)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


# Selected, for any dtype.


def test_select_equals_the_reference() -> None:
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
        anchors = torch.rand(rows, heads, length, generator=gen).argsort(-1)[..., :4]
        within = options.get("ends", torch.full((rows,), length))[:, None, None]
        options["anchors"] = anchors.masked_fill(anchors >= within, selection.FREE).int()
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


# From here on: what is wrong is noticed.

# Each leaves the kernel within its memory: without a bound it would not be there to be noticed.
MUTANTS = [
    ("chunk.h", "total *= kept;", ";"),
    ("chunk.h", "store(mixed + d, load<Floats>(mixed + d) * kept);", ";"),
    ("chunk.h", "to = std::clamp<int64_t>(last + 1 - entry", "to = std::clamp<int64_t>(last - entry"),
    ("chunk.h", "last - job.window + 1 - entry", "last - job.window - entry"),
    ("chunk.h", "std::fill(row + to, row + padded(n), -kInfinity);", ""),
    ("chunk.h", "if (!found.seen(x)) row[x] = -kInfinity;", ";"),
    ("attention.cpp", "(job.mean ? job.group : 1)", "1"),
    ("attention.cpp", "t < part.voting", "t < job.queries"),
    ("chunk.h", "share *= 1 / (1 + std::exp(job.sinks[head] - lse))", "share *= 1"),
    ("chunk.h", "std::exp2(into.top[i] - top), added", "1.0f, added"),
    ("attention.cpp", "std::fill(scores + part.end, scores + count, 0.0f);", ""),
    ("chunk.h", "v < 0 ? -tanh : tanh", "tanh"),
    ("chunk.h", "size < 0.25f ? v * series", "size < 0.0f ? v * series"),
    ("chunk.h", "2 / 15.0f", "0.0f"),
    ("job.h", "while (first < end && !visible[first]) ++first;", "++first;"),
    ("job.h", "start - job.window + 1", "start - job.window + 2"),
    ("pack.h", "put_in_order(low, high);", ";"),
    ("pack.h", "if (left > 0) std::copy_n(from, left, some);", ""),
    ("pack.h", "std::min<int64_t>(2 * kLanes, dim - d)", "std::min<int64_t>(2 * kLanes, dim - d) / 2"),
    ("product.h", "return c + (Floats)b * *a;", "return c + (Floats)b;"),
    ("product.h", "x.a + (i + r) * x.lda + p + kEach<A> * row", "x.a + i * x.lda + p + kEach<A> * row"),
    ("lanes.h", "p = p * f + 2.4015453e-1f;", "p = p * f + 1.4e-1f;"),
    ("lanes.h", "all(1.87623e-3f)", "all(1.8e-3f)"),
    ("entries.h", "position -= page * entries_.size;", "position = 0;"),
    ("entries.h", "row = blocks_[page];", "row = page;"),
    ("entries.h", "entries.blocks + row * entries.pages", "entries.blocks"),
    ("entries.h", "if (rows) row = rows[row];", ""),
    ("entries.h", "(of_list * entries.kv_heads + head)", "(of_list * entries.kv_heads)"),
    ("entries.h", "listed_ ? listed_[first + i]", "listed_ ? listed_[i]"),
    ("entries.h", "whole &= keys[i] != none;", ""),
    ("entries.h", "keys[i] = values[i] = none;", ""),
    ("entries.h", "value + i * next_value", "value"),
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


def check_everything(library: ctypes.CDLL) -> None:
    verify, both = (with_build(op, library) for op in ("verify", "attend_and_score"))
    for case in (EVERY, *LONG, Case(rows=3, dtype=torch.bfloat16), *NARROW[:2]):
        check_verify(verify, case)
    ATTENTION_CHECKS["attend_and_score"](both, LONG[2])
    near, far = Case(softcap=12.0), Case(softcap=300.0)
    padded = Case(length=9, hidden="left")
    for case in (near, far, padded, replace(EVERYTHING, dtype=torch.float16, length=300)):
        ATTENTION_CHECKS["attend_and_score"](both, case)
    for layout in LAYOUTS:
        for case in (Case(length=640, value_dim=48), Case(length=64, hidden="holes")):
            ATTENTION_CHECKS["attend_and_score"](both, replace(case, layout=layout))
    free = Case(length=64, hidden="free", layout="list")
    ATTENTION_CHECKS["attend_and_score"](both, free)


def test_the_checks_pass_unbroken() -> None:
    check_everything(build.compiled())


@pytest.mark.parametrize(("file", "old", "new"), MUTANTS, ids=[m[1] for m in MUTANTS])
def test_a_broken_kernel_is_noticed(
    file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = mutant(file, old, new, "attention.cpp", tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        check_everything(broken)
