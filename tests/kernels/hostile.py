"""Numbers that no caller should send, for any backend: what comes out is what the reference says, and valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.backend import Backend
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy import selection
from refreshkv.policy.selection import FREE
from tests.kernels.cases import LAYOUTS, SPARE_ROWS, Case, empty_stores, in_float32, laid_out

NAN, INF = float("nan"), float("inf")
FARTHEST = (-(2**63), -(2**31), -7, -1, 2**31, 2**40, 2**63 - 1)
FLOATS = torch.tensor([NAN, -NAN, INF, -INF, -1.0, -0.0, 0.0, 0.25, 1.0])
PLAIN = Case()
# Rounding to a dtype, and the order of the sums.
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}


def integers(shape: tuple[int, ...], length: int, gen: torch.Generator) -> Tensor:
    """Some around 0 .. length, some far away."""
    near = torch.randint(-2, length + 3, shape, generator=gen)
    far = torch.tensor(FARTHEST)[torch.randint(len(FARTHEST), shape, generator=gen)]
    return torch.where(torch.rand(shape, generator=gen) < 0.6, near, far)


def indices(shape: tuple[int, ...], length: int, gen: torch.Generator) -> Tensor:
    """As `integers`, in 32 bits."""
    return integers(shape, length, gen).clamp(-(2**31), 2**31 - 1).int()


def any_scores(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Any bits that a float32 may have, weights, and special ones; or one kind of these alone."""
    bits = torch.randint(-(2**31), 2**31, shape, generator=gen).int().view(torch.float32)
    weights = torch.rand(shape, generator=gen)
    special = FLOATS[torch.randint(len(FLOATS), shape, generator=gen)]
    kinds = torch.stack([bits, weights, special])
    alone = int(torch.randint(6, (), generator=gen))
    chosen = torch.randint(3, shape, generator=gen) if alone > 2 else torch.full(shape, alone)
    return kinds.gather(0, chosen[None])[0]


def selections(count: int, longest: int = 70) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Scores, budgets and options of `select`."""
    for seed in range(count):
        gen = torch.Generator().manual_seed(seed)

        def one_of(*choices: Any, gen: torch.Generator = gen) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=gen))]

        length = one_of(1, 2, 9, longest)
        options = {
            "pool_kernel": one_of(1, 3, 7, 201),
            "visible": one_of(None, torch.rand(2, length, generator=gen) < one_of(0.7, 0.1)),
            "recent": one_of(0, 2, -1, 2**40, integers((2,), length, gen)),
            "anchors": one_of(None, indices((2, 2, 5), length, gen)[..., [0, 1, 2, 3, 4, 0, 1]]),
            "ends": one_of(None, integers((2,), length, gen)),
            "slots": one_of(None, None, None, length, length + 3, 1, 0, -1),
        }
        usual = torch.randint(1, length + 1, (2,), generator=gen)
        budget = one_of(usual, integers((2,), length, gen))
        yield any_scores((2, 2, length), gen), budget, options


def check_select(select: Callable[..., Any], count: int = 150) -> None:
    """Equal to the definition, which is valid: the rest of what it says is in tests/test_selection.py."""
    for scores, budget, options in selections(count):
        ours = select(scores, budget, **options)
        assert all(map(torch.equal, ours, selection.select(scores, budget, **options)))
        for row in range(2):
            shown = torch.ones(scores.shape[-1], dtype=torch.bool)
            if options["visible"] is not None:
                shown &= options["visible"][row]
            if options["ends"] is not None:
                shown[max(0, int(options["ends"][row])) :] = False
            filled = max(0, min(int(budget[row]), int(shown.sum()), ours.positions.shape[-1]))
            for head in range(2):
                found = ours.positions[row, head].tolist()
                assert ours.filled[row, head] == filled == len({*found[:filled]})
                assert shown[found[:filled]].all()
                assert found[filled:] == [FREE] * (len(found) - filled)


def check_top_slots(top_slots: Callable[..., Tensor]) -> None:
    for seed in range(30):
        gen = torch.Generator().manual_seed(seed)
        scores, newest = any_scores((2, 2, 9), gen), integers((2, 2), 9, gen)
        for count in (-1, 0, 1, 3, 9, 10):
            expected = reference.top_slots(scores, newest, count)
            assert expected.shape[-1] == max(0, min(count, 9))
            assert bool((expected.sort(-1).values.diff(dim=-1) > 0).all())
            assert torch.equal(top_slots(scores, newest, count), expected)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), equal_nan=True, **CLOSE[dtype])


def close_scores(actual: Tensor, expected: Tensor, seen: Tensor, dtype: torch.dtype) -> None:
    """Where no query sees an entry: 0, or NaN."""
    seen = seen.expand_as(expected)
    close(actual[seen], expected[seen], dtype)
    for scores in (actual, expected):
        assert not scores[~seen].nan_to_num(0).any()


def spoiled(case: Case, what: str, number: float) -> tuple[Tensor, Entries, AttendOptions, Tensor]:
    """Queries `[B, Hq, T, D]`, entries, options and starts, one of them with `number` for one head, entry or sink."""
    _, entries, options = case.dense()
    query, starts = case.several()
    keys, values, position = entries.keys, entries.values, case.length // 2
    if options.visible is not None:
        options.visible[..., position] = True
    if what == "query":
        query[0, 1, -1, 3] = number
    elif what == "keys":
        keys[0, 0, position, 3] = number
    elif what == "values":
        values[0, 0, position, 3] = number
    elif what == "sinks":
        options.sinks[1] = number
    elif what == "hidden":  # and what lies behind every entry that is seen
        options.visible[:, :, position] = False
        keys[:, :, position] = values[:, :, position] = number
    return query, laid_out(entries, case.layout), options, starts


def check_attention(backend: Backend, case: Case, what: str, number: float) -> None:
    """One number that is none: the operations of one query, then those of several."""
    query, entries, options, starts = spoiled(case, what, number)
    wide, seen = in_float32(entries), options.visible
    if seen is None:
        seen = torch.ones(1, 1, case.length, dtype=torch.bool)
    one = query[:, :, -1]
    newest = torch.zeros(case.rows, case.kv_heads, dtype=torch.int64)
    for reduction in ("max", "mean"):
        kind = replace(options, reduction=reduction)
        expected, scored = reference.attend_and_score(one.float(), wide, kind)
        broken = not (expected.output.isfinite().all() and scored.scores.isfinite().all())
        if what == "hidden" or number is NAN:
            assert broken == (what != "hidden")
        both = backend.attend_and_score(one, entries, kind)
        for attended in (
            backend.attend(one, entries, options),
            both[0],
            backend.attend_and_rank(one, entries, kind, newest=newest, count=2)[0],
        ):
            close(attended.output, expected.output, case.dtype)
            close(attended.lse, expected.lse, case.dtype)
        for found in (backend.score(one, entries, kind), both[1]):
            close_scores(found.scores, scored.scores, seen, case.dtype)
        cut = replace(kind, lengths=newest[:1, :1] + case.length - 2)
        best = backend.attend_and_rank(one, entries, cut, newest=newest, count=2)[1]
        assert bool(((best >= 0) & (best < case.length)).all())
        assert bool((best[..., 0] != best[..., 1]).all())
        lost = scored.scores.isnan().any(-1)  # there every rank is a tie
        theirs = reference.attend_and_rank(one.float(), wide, cut, newest=newest, count=2)[1]
        assert torch.equal(best[lost], theirs[lost])
        if entries.positions is None:
            expected, scored = reference.verify(query.float(), wide, kind, starts=starts)
            attended, voted = backend.verify(query, entries, kind, starts=starts)
            close(attended.output, expected.output, case.dtype)
            close(attended.lse, expected.lse, case.dtype)
            every = seen & reached(starts, case)[:, None]
            close_scores(voted.scores, scored.scores, every, case.dtype)
            voted = backend.vote(query, entries, kind, starts=starts)
            close_scores(voted.scores, scored.scores, every, case.dtype)


def reached(starts: Tensor, case: Case) -> Tensor:
    """`[B, L]` bool, the positions that any of the queries sees."""
    first = starts.clamp(-5, case.length)[:, None]
    return torch.arange(case.length) < first + 5


def check_one_query(
    backend: Backend, case: Case, query: Tensor, entries: Entries, options: AttendOptions, seed: int
) -> None:
    """The operations of one query, with newest ones and counts of any size."""
    wide = in_float32(entries)
    newest = integers(
        (case.rows, case.kv_heads), entries.count, torch.Generator().manual_seed(seed)
    )
    expected, scored = reference.attend_and_score(query.float(), wide, options)
    ours = backend.attend(query, entries, options)
    close(ours.output, expected.output, case.dtype)
    close(ours.lse, expected.lse, case.dtype)
    scores = backend.score(query, entries, options).scores
    close(scores, scored.scores, case.dtype)
    for count in (-1, 0, 3, entries.count + 1):
        _, best = backend.attend_and_rank(query, entries, options, newest=newest, count=count)
        assert best.shape[-1] == max(0, min(count, entries.count))
        assert bool((best.sort(-1).values.diff(dim=-1) > 0).all())
        assert bool(((best >= 0) & (best < entries.count)).all())
        if case.dtype == torch.float32:
            assert torch.equal(best, reference.top_slots(scores, newest, count))


def check_several(
    backend: Backend,
    case: Case,
    query: Tensor,
    entries: Entries,
    options: AttendOptions,
    **given: Any,
) -> None:
    """The operations of several queries; a row without votes may have any output and log-sum-exp."""
    wide = query.float(), in_float32(entries), options
    expected, scored = reference.verify(*wide, **given)
    attended, voted = backend.verify(query, entries, options, **given)
    counts = given.get("counts")
    voting = slice(None) if counts is None else counts > 0
    close(attended.output[voting], expected.output[voting], case.dtype)
    close(attended.lse[voting], expected.lse[voting], case.dtype)
    close(voted.scores, scored.scores, case.dtype)
    if given.pop("window", None) is None:
        voted = backend.vote(query, entries, options, **given)
        close(voted.scores, scored.scores, case.dtype)


def check_lengths(backend: Backend, case: Case) -> None:
    query, entries, options = case.inputs()
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)
        kind = replace(options, lengths=integers((case.rows, case.kv_heads), case.length, gen))
        check_one_query(backend, case, query, entries, kind, seed=seed)


def check_indices(backend: Backend, case: Case) -> None:
    """Positions, pages and rows of any size, in every layout."""
    query, dense, options = case.dense()
    several, starts = case.several()
    for seed, layout in enumerate(LAYOUTS[1:]):
        gen = torch.Generator().manual_seed(seed)
        made = laid_out(dense, layout)
        filled = [x.nan_to_num(0.5) for x in (made.keys, made.values)]
        positions, blocks, rows, visible = made.positions, made.blocks, made.rows, options.visible
        if positions is not None:
            positions = indices((*positions.shape[:2], 20), made.width, gen)
            visible = None if visible is None else visible[..., :20]
        if blocks is not None:
            blocks = indices(tuple(blocks.shape), len(made.keys), gen)
        if rows is not None:
            rows = indices(tuple(rows.shape), case.rows + SPARE_ROWS, gen)
        entries = Entries(*filled, blocks, positions, rows)
        kind = replace(options, visible=visible)
        check_one_query(backend, case, query, entries, kind, seed=seed)
        if positions is None:
            check_several(backend, case, several, entries, kind, starts=starts)


def check_causal(backend: Backend, case: Case) -> None:
    """Where queries start, how many of them vote, and how many positions count."""
    _, entries, options = case.inputs()
    query, _ = case.several()
    for seed in range(8):
        gen, kind = torch.Generator().manual_seed(seed), options
        given = {"starts": integers((case.rows,), case.length, gen)}
        given["counts"] = integers((case.rows,), 5, gen)
        if seed % 2:
            kind = replace(options, lengths=integers((case.rows, case.kv_heads), case.length, gen))
        for window in (None, 3, 2**62):
            check_several(backend, case, query, entries, kind, **given, window=window)
    for window in (0, -3):
        with pytest.raises(ValueError, match=f"window must be at least 1; got {window}"):
            backend.verify(query, entries, options, **given, window=window)
    with pytest.raises(ValueError, match="pool_kernel must be an odd integer >= 1; got 4"):
        backend.select(torch.rand(1, 1, 9), torch.tensor([3]), pool_kernel=4)


def check_nothing(backend: Backend, dtype: torch.dtype) -> None:
    """Shapes without a row, an entry or a slot."""
    for rows, entries in empty_stores(dtype):
        query = torch.randn(rows, 4, 64).to(dtype)
        none = torch.zeros(rows, 2, dtype=torch.int64)
        shape = rows, 2, entries.count
        for lengths in (None, none):
            options = AttendOptions(scale=0.1, lengths=lengths)
            attended, scored = backend.attend_and_score(query, entries, options)
            ranked, best = backend.attend_and_rank(query, entries, options, newest=none, count=2)
            for given in (attended, ranked, backend.attend(query, entries, options)):
                assert given.output.shape == query.shape and not given.output.any()
                assert bool(given.lse.isneginf().all())
            for given in (scored, backend.score(query, entries, options)):
                assert given.scores.shape == shape and not given.scores.any()
            assert best.shape == (rows, 2, min(2, entries.count))
            if entries.positions is None:
                several = query[:, :, None].expand(-1, -1, 3, -1)
                attended, _ = backend.verify(several, entries, options, starts=none[:, 0])
                assert attended.output.shape == several.shape and not attended.output.any()
                voted = backend.vote(several, entries, options, starts=none[:, 0])
                assert voted.scores.shape == shape and not voted.scores.any()
        if entries.positions is None and (rows == 0 or entries.width == 0):
            chosen = backend.select(torch.rand(shape), torch.full((rows,), 3))
            assert chosen.positions.numel() == 0 and not chosen.filled.any()
        for slots, count in ((0, 0), (4, 0), (4, 3)):
            check_rings_of_nothing(backend, entries, rows, slots, count)


def check_rings_of_nothing(
    backend: Backend, entries: Entries, rows: int, slots: int, count: int
) -> None:
    """Rings over a store without an entry: what is asked for is not there."""
    ring = {
        "ring_keys": None,
        "ring_values": None,
        "ring_positions": torch.zeros(3, 2, slots, dtype=torch.int32),
        "state": torch.ones(6, 3, 2, dtype=torch.int64),
        "budget": torch.full((3,), 3),
    }
    alike = {name: x if x is None else x.clone() for name, x in ring.items()}
    own_rows = None if entries.rows is None else torch.arange(rows).int()  # no ring is that of two
    entries, none = replace(entries, positions=None, rows=own_rows), torch.zeros(rows).long()
    best = torch.zeros(rows, 2, count, dtype=torch.int64)
    wanted, filled = best.int(), torch.full((rows, 2), count)
    for kernels, own in ((backend, ring), (reference, alike)):
        kernels.push(entries, none, **own)
        kernels.fetch(entries, best, ends=none + 9, **own)
        kernels.refresh(entries, wanted, filled, **own)
        if entries.values is not None:
            heads = entries.kv_heads
            new = torch.randn(rows, heads, 1, 64).to(entries.keys.dtype)
            if rows == 0 or not entries.width:
                kernels.write(entries, new, new, starts=none)
    for name in ("ring_positions", "state"):
        assert torch.equal(ring[name], alike[name])


EVERYTHING = replace(PLAIN, sinks=True, hidden="holes")
SPOILED = [
    (case, what, number)
    for case in (PLAIN, EVERYTHING)
    for what in ("query", "keys", "values", "sinks", "hidden")
    for number in (NAN, INF)
    if case is EVERYTHING or what in ("query", "keys", "values")
]
