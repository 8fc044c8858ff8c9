"""Every kernel against the reference, for any backend: the tolerances and the comparisons.

A kernel reads what a case lays out; it is compared with the reference over the dense entries in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.options import Attended, Scored
from refreshkv.policy.selection import FREE
from tests.helpers import relative_rms
from tests.kernels.cases import QUERIES, SPARE_ROWS, WHOLE, Case

# Relative RMS error against float32 on the same inputs: twice the worst that was measured over `CASES`, which was
# (output, scores, lse) float32 7.7e-7, 7.2e-7, 2.0e-7: the order of the sums; bfloat16 7.3e-3, 6.7e-3, 2.2e-3 and
# float16 8.0e-4, 7.5e-4, 3.1e-4: the rounding of scaled query, logits, weights and output to 8 and 11 bits.
TOLERANCE = {
    torch.float32: {"output": 1.5e-6, "scores": 1.5e-6, "lse": 4e-7},
    torch.bfloat16: {"output": 1.5e-2, "scores": 1.4e-2, "lse": 4.5e-3},
    torch.float16: {"output": 1.6e-3, "scores": 1.5e-3, "lse": 6e-4},
}


def close(actual: Tensor, expected: Tensor, case: Case, what: str) -> None:
    """Within the tolerance of the dtype, and -inf where it should be."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].float(), expected[~finite].float()), f"{what} is off"
    if expected[finite].any():
        error = relative_rms(actual[finite], expected[finite])
        assert error <= TOLERANCE[case.dtype][what], f"{what} is off by {error:.1e}"
    else:
        assert not actual[finite].any(), f"{what} is off by more than nothing"


def check_attended(actual: Attended, expected: Attended, case: Case) -> None:
    assert actual.output.dtype == case.dtype
    assert actual.lse.dtype == torch.float32
    close(actual.output, expected.output, case, "output")
    close(actual.lse, expected.lse, case, "lse")


def check_scored(actual: Scored, expected: Scored, case: Case) -> None:
    assert actual.scores.dtype == actual.lse.dtype == torch.float32
    close(actual.scores, expected.scores, case, "scores")
    close(actual.lse, expected.lse, case, "lse")


def check_attend(attend: Callable[..., Any], case: Case) -> None:
    check_attended(attend(*case.inputs()), reference.attend(*case.wide()), case)


def check_score(score: Callable[..., Any], case: Case) -> None:
    query, entries, options = case.inputs()
    wide, dense, shown = case.wide()
    for reduction, given in (("max", entries), ("mean", replace(entries, values=None))):
        actual = score(query, given, replace(options, reduction=reduction))
        expected = reference.score(wide, dense, replace(shown, reduction=reduction))
        check_scored(actual, expected, case)


def check_attend_and_score(attend_and_score: Callable[..., Any], case: Case) -> None:
    query, entries, options = case.inputs()
    wide, dense, shown = case.wide()
    for reduction in ("max", "mean"):
        attended, scored = attend_and_score(query, entries, replace(options, reduction=reduction))
        expected = reference.attend_and_score(wide, dense, replace(shown, reduction=reduction))
        assert torch.equal(attended.lse, scored.lse)
        check_attended(attended, expected[0], case)
        check_scored(scored, expected[1], case)


def check_attend_and_rank(attend_and_rank: Callable[..., Any], case: Case) -> None:
    """The most attended entry is the newest. In 16 bits a rank may swap with one that is nearly as good."""
    query, entries, options = case.inputs()
    wide, dense, shown = case.wide()
    attended = reference.attend(wide, dense, shown)
    for reduction in ("max", "mean"):
        scores = reference.score(wide, dense, replace(shown, reduction=reduction)).scores
        newest = scores.argmax(-1)
        count = max(1, min(8, case.length - 1))
        kind = replace(options, reduction=reduction)
        actual, best = attend_and_rank(query, entries, kind, newest=newest, count=count)
        check_attended(actual, attended, case)
        check_best(best, scores, newest, count, case)


def check_best(best: Tensor, scores: Tensor, newest: Tensor, count: int, case: Case) -> None:
    assert best.dtype == torch.int64 and best.shape == (*newest.shape, count)
    assert bool((best.sort(-1).values.diff(dim=-1) > 0).all())
    if case.length == 1:
        assert bool((best == 0).all())
        return
    left = scores.scatter(-1, newest[..., None], -1.0)
    close(left.gather(-1, best), left.topk(count).values, case, "scores")


def textbook(
    case: Case, counts: Tensor, reduction: str, window: int | None
) -> tuple[Attended, Scored]:
    """`verify` one query after the other: each attends to what lies before it, and to itself."""
    query, starts = case.several()
    _, entries, options = case.wide()
    positions = torch.arange(case.length)
    shape = (case.rows, case.kv_heads, case.length)
    shown = torch.ones(shape, dtype=torch.bool)
    if options.visible is not None:
        shown = options.visible.expand(shape)
    outputs, lses, votes = [], [], torch.zeros(shape)
    for index in range(query.shape[2]):
        own = (starts + index)[:, None, None]
        seen = shown & (positions <= own)
        if window is not None:
            seen = seen & (positions > own - window)
        kind = replace(options, visible=seen, reduction=reduction)
        attended, scored = reference.attend_and_score(query[:, :, index].float(), entries, kind)
        votes += torch.where((index < counts)[:, None, None], scored.scores, 0.0)
        outputs.append(attended.output)
        lses.append(attended.lse)
    votes /= counts.clamp(min=1)[:, None, None]
    lse = torch.stack(lses, 2)
    return Attended(torch.stack(outputs, 2), lse), Scored(votes, lse)


def check_votes(actual: Scored, expected: Scored, case: Case, counts: Tensor) -> None:
    """As `check_scored`, but that a row without votes may have any log-sum-exp."""
    voting = counts > 0
    assert not actual.scores[~voting].any(), "scores of a row without votes are off"
    of_voting = [Scored(x.scores[voting], x.lse[voting]) for x in (actual, expected)]
    check_scored(*of_voting, case)


def counted(case: Case) -> tuple[Tensor, Tensor]:
    """Every query votes, and some do: in one row none."""
    everyone = torch.full((case.rows,), min(QUERIES, case.length))
    return everyone, torch.tensor([3, 0, 1])[: case.rows].clamp(max=int(everyone[0]))


def check_vote(vote: Callable[..., Any], case: Case) -> None:
    _, entries, options = case.inputs()
    query, starts = case.several()
    if entries.positions is not None:
        with pytest.raises(ValueError, match="without a list"):
            vote(query, entries, options, starts=starts)
        return
    everyone, some = counted(case)
    for reduction, counts in (("max", everyone), ("mean", some)):
        given = {"starts": starts, "counts": None if counts is everyone else counts}
        actual = vote(query, entries, replace(options, reduction=reduction), **given)
        check_votes(actual, textbook(case, counts, reduction, None)[1], case, counts)


def check_verify(verify: Callable[..., Any], case: Case) -> None:
    _, entries, options = case.inputs()
    query, starts = case.several()
    if entries.positions is not None:
        with pytest.raises(ValueError, match="without a list"):
            verify(query, entries, options, starts=starts)
        return
    everyone, some = counted(case)
    for reduction, counts, window in (
        ("max", everyone, None),
        ("mean", some, None),
        ("max", some, 7),
        ("mean", everyone, 1),
    ):
        kind = replace(options, reduction=reduction)
        given = {"starts": starts, "counts": None if counts is everyone else counts}
        attended, scored = verify(query, entries, kind, **given, window=window)
        expected, expected_scored = textbook(case, counts, reduction, window)
        assert torch.equal(attended.lse, scored.lse)
        voting = counts > 0
        close(attended.output[voting], expected.output[voting], case, "output")
        assert attended.output.dtype == case.dtype
        check_votes(scored, expected_scored, case, counts)


ATTENTION_CHECKS = {
    "attend": check_attend,
    "score": check_score,
    "attend_and_score": check_attend_and_score,
    "attend_and_rank": check_attend_and_rank,
    "vote": check_vote,
    "verify": check_verify,
}


def check_lengths(backend: Any, case: Case) -> None:
    """Entries beyond a length count for nothing: the same as hiding them. One row is empty, one whole."""
    query, entries, options = case.inputs()
    wide, dense, shown = case.wide()
    gen = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, case.length + 1, (case.rows, case.kv_heads), generator=gen)
    lengths[0, 0], lengths[-1, -1] = 0, case.length
    newest = torch.zeros(case.rows, case.kv_heads, dtype=torch.int64)
    count = max(1, min(3, case.length - 1))
    for given in (lengths, lengths[:1], lengths[:, :1], lengths[-1:, -1:]):
        within = torch.arange(case.length) < given[..., None]
        visible = within if shown.visible is None else within & shown.visible
        kind, hidden = replace(options, lengths=given), replace(shown, visible=visible)
        attended, scored = reference.attend_and_score(wide, dense, hidden)
        both = backend.attend_and_score(query, entries, kind)
        rank = backend.attend_and_rank(query, entries, kind, newest=newest, count=count)
        for actual in (backend.attend(query, entries, kind), both[0], rank[0]):
            check_attended(actual, attended, case)
        for actual in (backend.score(query, entries, kind), both[1]):
            check_scored(actual, scored, case)
        check_best(rank[1], scored.scores, newest, count, case)
        if entries.positions is None:
            several, starts = case.several()
            expected = reference.verify(several.float(), dense, hidden, starts=starts)
            check_attended(
                backend.verify(several, entries, kind, starts=starts)[0], expected[0], case
            )
            check_scored(backend.vote(several, entries, kind, starts=starts), expected[1], case)


def check_refresh(refresh: Callable[..., None]) -> None:
    """What a refresh leaves in the rings that it is given, wherever the store keeps its entries."""
    wanted = torch.tensor([[[3, 29, 0], [7, 7, FREE]], [[1, FREE, FREE], [FREE] * 3]]).int()
    filled = (wanted != FREE).sum(-1)
    for layout in WHOLE:
        case = Case(length=30, dim=8, value_dim=16, layout=layout)
        _, dense, _ = case.dense()
        _, entries, _ = case.inputs()
        rows = [0, 1] if entries.rows is None else entries.rows.tolist()
        count = 2 + SPARE_ROWS * (entries.rows is not None)
        for heads in (None, torch.tensor([[True, False], [True, True]])):
            assert dense.values is not None
            copies = [
                torch.full((count, 2, 5, x.shape[-1]), 7.0) for x in (dense.keys, dense.values)
            ]
            positions = torch.full((count, 2, 5), 9, dtype=torch.int32)
            state, tally = torch.full((6, count, 2), 4), torch.zeros(2, 2, 5, dtype=torch.int64)
            refresh(
                entries,
                wanted,
                filled,
                ring_keys=copies[0],
                ring_values=copies[1],
                ring_positions=positions,
                state=state,
                budget=torch.full((count,), 2),
                heads=heads,
                ends=torch.tensor([30, 20]),
                hidden=torch.tensor([0, 3]),
                tally=tally,
            )
            for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
                own, held = rows[row], copies[0][rows[row], head]
                if heads is not None and not heads[row, head]:
                    assert bool((held == 7).all()) and bool((positions[own, head] == 9).all())
                    assert state[:, own, head].tolist() == [4] * 6 and not tally[row, head].any()
                    continue
                assert positions[own, head].tolist() == [*wanted[row, head].tolist(), FREE, FREE]
                many = int(filled[row, head])
                assert state[:, own, head].tolist() == [many, 0, 0, 4, min(many, 2), 0]
                assert tally[row, head].tolist() == [1, 0, (30, 17)[row], 0, 0]
                for copied, source in zip(copies, (dense.keys, dense.values), strict=True):
                    expected = torch.full_like(copied[own, head], 7.0)
                    for slot, position in enumerate(wanted[row, head].tolist()):
                        if position != FREE:
                            expected[slot] = source[row, head, position]
                    assert torch.equal(copied[own, head], expected)


def check_select(select: Callable[..., Any]) -> None:
    """One plateau over a hole: slow and exhaustive is tests/test_selection.py."""
    scores = torch.tensor([[[0.1, 0.5, 0.5, 0.9, 0.5, 0.2, 0.7]]])
    visible = torch.tensor([[True, True, True, False, True, True, True]])
    chosen = select(scores, torch.tensor([4]), pool_kernel=1, visible=visible)
    assert chosen.positions.dtype == torch.int32 and chosen.filled.dtype == torch.int64
    assert chosen.positions.tolist() == [[[1, 2, 4, 6]]]
    chosen = select(scores, torch.tensor([4]), pool_kernel=3, visible=visible)
    assert chosen.positions.tolist() == [[[2, 4, 5, 6]]]
    anchors = torch.tensor([[[2, FREE]]]).int()
    rules = {"recent": 1, "anchors": anchors, "ends": torch.tensor([6])}
    chosen = select(scores, torch.tensor([4]), pool_kernel=1, visible=visible, **rules)
    assert chosen.positions.tolist() == [[[1, 4, 2, 5]]]
