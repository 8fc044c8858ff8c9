"""Numbers that no caller should send, for any backend: what comes out is what the reference says, and valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.kernels.backend import Backend, reference
from refreshkv.policy import selection
from refreshkv.policy.selection import FREE
from tests.kernels.comparison import Case

NAN, INF = float("nan"), float("inf")
FARTHEST = (-(2**63), -(2**31), -7, -1, 2**31, 2**40, 2**63 - 1)
FLOATS = torch.tensor([NAN, -NAN, INF, -INF, -1.0, -0.0, 0.0, 0.25, 1.0])
PLAIN = Case()
# Rounding to a dtype, and the order of the sums.
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}


def integers(shape: tuple[int, ...], length: int, gen: torch.Generator) -> Tensor:
    """Some around 0 .. length, some far away."""
    near = torch.randint(-2, length + 3, shape, generator=gen)
    far = torch.tensor(FARTHEST)[torch.randint(len(FARTHEST), shape, generator=gen)]
    return torch.where(torch.rand(shape, generator=gen) < 0.6, near, far)


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
            "anchors": one_of(None, integers((2, 2, 5), length, gen)[..., [0, 1, 2, 3, 4, 0, 1]]),
            "ends": one_of(None, integers((2,), length, gen)),
            "slots": one_of(None, None, None, length, length + 3, 1, 0, -1),
        }
        usual, budget = (
            torch.randint(1, length + 1, (2,), generator=gen),
            integers((2,), length, gen),
        )
        yield any_scores((2, 2, length), gen), one_of(usual, budget), options


def check_select(select: Callable[..., Any], count: int = 150) -> None:
    """Equal to the definition, which is valid: the rest of what it says is in tests/test_selection.py."""
    for scores, budget, options in selections(count):
        ours, theirs = (
            select(scores, budget, **options),
            selection.select(scores, budget, **options),
        )
        assert torch.equal(ours.filled, theirs.filled) and torch.equal(
            ours.positions, theirs.positions
        )
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
                assert shown[found[:filled]].all() and found[filled:] == [FREE] * (
                    len(found) - filled
                )


def check_top_slots(top_slots: Callable[..., Tensor]) -> None:
    for seed in range(30):
        gen = torch.Generator().manual_seed(seed)
        scores, newest = any_scores((2, 2, 9), gen), integers((2, 2), 9, gen)
        for count in (-1, 0, 1, 3, 9, 10):
            expected = reference.top_slots(scores, newest, count)
            assert expected.shape[-1] == max(0, min(count, 9))
            assert bool((expected.sort(-1).values.diff(dim=-1) > 0).all())
            assert torch.equal(top_slots(scores, newest, count), expected)


def check_gather(gather: Callable[..., None]) -> None:
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)
        source = PLAIN.with_spare(torch.randn(2, 2, 30, 8, generator=gen))
        positions = integers((2, 2, 12), 30, gen)
        ours, theirs = (torch.full((2, 2, 15, 8), 7.0) for _ in range(2))
        gather(source, positions, ours)
        reference.gather(source, positions, theirs)
        assert torch.equal(ours, theirs)
        stored = (positions >= 0) & (positions < 30)
        assert bool((theirs[:, :, :12] == 7.0).all(-1).eq(~stored).all())


def rings(seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A store of 40 and rings of 9 slots, with numbers of any size."""
    gen = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, 2, 40, 8, generator=gen)
    # Distinct ones: the far ones, and others that are there.
    near = torch.rand(3, 2, 44, generator=gen).argsort(-1)[..., :3] - 2
    far = torch.tensor(FARTHEST)[torch.rand(3, 2, 7, generator=gen).argsort(-1)[..., :2]]
    ring = {
        "ring_keys": torch.randn(3, 2, 9, 8, generator=gen),
        "ring_values": torch.randn(3, 2, 9, 8, generator=gen),
        "ring_positions": integers((3, 2, 9), 40, gen),
        "filled": integers((3, 2), 9, gen),
        "pushed": integers((3, 2), 9, gen),
        "budget": integers((3,), 9, gen),
    }
    return [keys, values, torch.cat([near, far], -1)], ring


def check_insert(insert: Callable[..., Tensor], count: int = 25) -> None:
    """`insert(store, ring)` writes into the ring."""
    entered = 0
    for seed in range(count):
        store, theirs = rings(seed)
        ours = {name: tensor.clone() for name, tensor in theirs.items()}
        expected = reference.insert(*store, **theirs)
        entered += int(expected.sum())
        assert torch.equal(insert(store, ours), expected)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
    assert entered


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), equal_nan=True, **CLOSE[dtype])


def close_scores(actual: Tensor, expected: Tensor, seen: Tensor, dtype: torch.dtype) -> None:
    """Where no query sees a place: 0, or NaN."""
    seen = seen.expand_as(expected)
    close(actual[seen], expected[seen], dtype)
    for scores in (actual, expected):
        assert not scores[~seen].nan_to_num(0).any()


def spoiled(case: Case, what: str, number: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The inputs of `case.several`, one of them with `number` for one query head, token or sink."""
    query, keys, values, options = case.several()
    place = case.length // 2
    if options["visible"] is not None:
        options["visible"][..., place] = True
    if what == "query":
        query[0, 1, -1, 3] = number
    elif what == "keys":
        keys[0, 0, place, 3] = number
    elif what == "values":
        values[0, 0, place, 3] = number
    elif what == "sinks":
        options["sinks"][1] = number
    elif what == "hidden":  # and what lies behind every place that is seen
        options["visible"][:, :, place] = False
        keys[:, :, place] = values[:, :, place] = number
    return query, keys, values, options


def check_attention(backend: Backend, case: Case, what: str, number: float) -> None:
    """One number that is none: the operations of one query, then those of several."""
    query, keys, values, options = spoiled(case, what, number)
    wide = [x.float() for x in (query, keys, values)]
    starts = options.pop("starts")
    seen = torch.ones(1, 1, case.length, dtype=torch.bool)
    if options["visible"] is not None:
        seen = options["visible"]
    one, one_wide = query[:, :, -1], wide[0][:, :, -1]
    newest = torch.zeros(case.rows, case.kv_heads, dtype=torch.int64)
    for reduction in ("max", "mean"):
        kind = {**options, "reduction": reduction}
        expected, scored = reference.attend_and_score(one_wide, *wide[1:], **kind)
        broken = not (expected.output.isfinite().all() and scored.scores.isfinite().all())
        if what == "hidden" or number is NAN:
            assert broken == (what != "hidden")
        for attended in (
            backend.attend(one, keys, values, **options),
            backend.attend_and_score(one, keys, values, **kind)[0],
            backend.attend_and_rank(one, keys, values, **kind, newest=newest, count=2)[0],
        ):
            close(attended.output, expected.output, case.dtype)
            close(attended.lse, expected.lse, case.dtype)
        for found in (
            backend.score(one, keys, **kind),
            backend.attend_and_score(one, keys, values, **kind)[1],
        ):
            close_scores(found.scores, scored.scores, seen, case.dtype)
        rank = {**kind, "newest": newest, "count": 2, "lengths": newest[:1, :1] + case.length - 2}
        best = backend.attend_and_rank(one, keys, values, **rank)[1]
        assert bool(((best >= 0) & (best < case.length)).all())
        assert bool((best[..., 0] != best[..., 1]).all())
        lost = scored.scores.isnan().any(-1)  # there every rank is a tie
        expected_best = reference.attend_and_rank(one_wide, *wide[1:], **rank)[1]
        assert torch.equal(best[lost], expected_best[lost])
        kind["starts"] = starts
        expected, scored = reference.verify(*wide, **kind)
        attended, voted = backend.verify(query, keys, values, **kind)
        close(attended.output, expected.output, case.dtype)
        close(attended.lse, expected.lse, case.dtype)
        every = seen & reached(starts, case)[:, None]
        close_scores(voted.scores, scored.scores, every, case.dtype)
        close_scores(backend.vote(query, keys, **kind).scores, scored.scores, every, case.dtype)


def reached(starts: Tensor, case: Case, window: int | None = None) -> Tensor:
    """`[B, L]` bool, the places that any of the queries sees."""
    first = starts.clamp(-5, case.length)[:, None]
    places = torch.arange(case.length)
    seen = places < first + 5
    return seen if window is None else seen & (places > first - window)


def check_lengths(backend: Backend, case: Case) -> None:
    query, keys, values, options = case.inputs()
    wide = [x.float() for x in (query, keys, values)]
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)
        lengths = integers((case.rows, case.kv_heads), case.length, gen)
        newest = integers((case.rows, case.kv_heads), case.length, gen)
        kind = {**options, "lengths": lengths}
        expected, scored = reference.attend_and_score(*wide, **kind)
        ours = backend.attend(query, keys, values, **kind)
        close(ours.output, expected.output, case.dtype)
        close(ours.lse, expected.lse, case.dtype)
        scores = backend.score(query, keys, **kind).scores
        close(scores, scored.scores, case.dtype)
        for count in (-1, 0, 3, case.length + 1):
            best = backend.attend_and_rank(query, keys, values, **kind, newest=newest, count=count)[
                1
            ]
            assert best.shape[-1] == max(0, min(count, case.length))
            left = best.sort(-1).values
            assert bool((left.diff(dim=-1) > 0).all())
            assert bool(((best >= 0) & (best < case.length)).all())
            if case.dtype == torch.float32:
                assert torch.equal(best, reference.top_slots(scored.scores, newest, count))


def check_places(backend: Backend, case: Case) -> None:
    """`attend_at` with places, pages and newest slots of any size."""
    query, keys, values, options = case.inputs()
    del options["visible"]
    wide = [x.float() for x in (query, keys, values)]
    pages = [x.unflatten(2, (-1, 5)).transpose(1, 2).flatten(0, 1) for x in (keys, values)]
    for seed in range(6):
        gen = torch.Generator().manual_seed(seed)
        positions = integers((case.rows, case.kv_heads, 20), case.length, gen)
        newest = integers((case.rows, case.kv_heads), 20, gen)
        blocks = integers((case.rows, 6), len(pages[0]), gen).clamp(-(2**31), 2**31 - 1).int()
        for given, stored in ((None, (keys, values)), (blocks, pages)):
            kind = {**options, "blocks": given, "newest": newest, "count": 2}
            expected, _ = reference.attend_at(
                wide[0], *(x.float() for x in stored), positions, **kind
            )
            ours, best = backend.attend_at(query, *stored, positions, **kind)
            close(ours.output, expected.output, case.dtype)
            close(ours.lse, expected.lse, case.dtype)
            assert bool(((best >= 0) & (best < 20)).all())


def check_causal(backend: Backend, case: Case) -> None:
    """Where queries start, and how many of them vote."""
    query, keys, values, options = case.several()
    wide = [x.float() for x in (query, keys, values)]
    for seed in range(8):
        gen = torch.Generator().manual_seed(seed)
        kind = {
            **options,
            "starts": integers((case.rows,), case.length, gen),
            "counts": integers((case.rows,), 5, gen),
        }
        for window in (None, 3, 2**62):
            expected, scored = reference.verify(*wide, **kind, window=window)
            attended, voted = backend.verify(query, keys, values, **kind, window=window)
            voting = kind["counts"] > 0
            close(attended.output[voting], expected.output[voting], case.dtype)
            close(attended.lse[voting], expected.lse[voting], case.dtype)
            close(voted.scores, scored.scores, case.dtype)
            if window is None:
                close(backend.vote(query, keys, **kind).scores, scored.scores, case.dtype)
    for window in (0, -3):
        with pytest.raises(ValueError, match=f"window must be at least 1; got {window}"):
            backend.verify(query, keys, values, **kind, window=window)
    with pytest.raises(ValueError, match="pool_kernel must be an odd integer >= 1; got 4"):
        backend.select(torch.rand(1, 1, 9), torch.tensor([3]), pool_kernel=4)


def check_nothing(backend: Backend, dtype: torch.dtype) -> None:
    """Shapes without a row, a token or a slot."""
    for rows, length in ((0, 7), (2, 0)):
        query = torch.randn(rows, 4, 64).to(dtype)
        keys = torch.randn(rows, 2, length, 64).to(dtype)
        none = torch.zeros(rows, 2, dtype=torch.int64)
        for lengths in (None, none):
            kind: dict[str, Any] = {"scale": 0.1, "lengths": lengths}
            attended, scored = backend.attend_and_score(query, keys, keys, **kind)
            assert attended.output.shape == query.shape and not attended.output.any()
            assert bool(attended.lse.isneginf().all())
            assert scored.scores.shape == (rows, 2, length)
            assert backend.attend(query, keys, keys, **kind).output.shape == query.shape
            rank = {**kind, "newest": none, "count": 2}
            best = backend.attend_and_rank(query, keys, keys, **rank)[1]
            assert best.shape == (rows, 2, min(2, length))
        starts = none[:, 0]
        several = query[:, :, None].expand(-1, -1, 3, -1)
        attended, scored = backend.verify(several, keys, keys, scale=0.1, starts=starts)
        assert attended.output.shape == several.shape and not attended.output.any()
        assert backend.vote(several, keys, scale=0.1, starts=starts).scores.shape[-1] == length
        for slots in (0, 3):
            positions = torch.zeros(rows, 2, slots, dtype=torch.int64)
            attended, _ = backend.attend_at(query, keys, keys, positions, scale=0.1)
            assert not attended.output.any()
            pages = {"blocks": torch.zeros(rows, 4, dtype=torch.int32), "scale": 0.1}
            for stored in (keys, keys.new_empty(0, 2, 16, 64)):
                assert not backend.attend_at(query, stored, stored, positions, **pages)[
                    0
                ].output.any()
            out = torch.ones(rows, 2, 4, 64).to(dtype)
            backend.gather(keys, positions, out)
            assert bool((out == 1).all())
        for slots in (None, 3):
            budget = torch.full((rows,), 3)
            chosen = backend.select(torch.rand(rows, 2, length), budget, slots=slots)
            assert chosen.positions.numel() == 0 and not chosen.filled.any()
        store, ring = rings(0)
        for wanted in (store[2][..., :0], store[2]):
            empty = {k: v[:rows] for k, v in ring.items()}
            given = [x[:rows, :, :length] for x in store[:2]]
            if rows and not wanted.numel():
                given = [x[:rows] for x in store[:2]]
            assert not backend.insert(*given, wanted[:rows], **empty).any()


EVERYTHING = replace(PLAIN, sinks=True, hidden="holes")
SPOILED = [
    (case, what, number)
    for case in (PLAIN, EVERYTHING)
    for what in ("query", "keys", "values", "sinks", "hidden")
    for number in (NAN, INF)
    if case is EVERYTHING or what in ("query", "keys", "values")
]
