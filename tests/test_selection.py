"""Every selection on a CPU equals a slow definition: sort the visible tokens by (pooled score, position)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refreshkv.kernels.native import selection as native_selection
from refreshkv.policy import selection
from refreshkv.policy.selection import FREE, Selected
from tests.helpers import PROPERTY, left_padding, needs_compiler
from tests.slow import slow_select

Select = Callable[..., Selected]
implementations = pytest.mark.parametrize(
    "select",
    [selection.select, pytest.param(native_selection.select, marks=needs_compiler)],
    ids=["torch", "native"],
)


@dataclass
class Scores:
    values: list[list[list[float]]]  # [row][head][token]
    visible: list[list[bool]]
    budget: list[int]
    kernel: int

    def run(self, select: Select, *, masked: bool = True, **options: Any) -> Selected:
        visible = torch.tensor(self.visible) if masked else None
        return select(
            torch.tensor(self.values),
            torch.tensor(self.budget),
            pool_kernel=self.kernel,
            visible=visible,
            **options,
        )


few_values = st.sampled_from([0.0, 0.125, 0.25, 0.5])  # ties and plateaus
any_weight = st.floats(0, 1, width=32).map(abs)  # no -0.0: an attention weight never is


@st.composite
def scores(draw: st.DrawFn) -> Scores:
    rows, heads, length = (draw(st.integers(1, top)) for top in (3, 3, 24))
    weight = draw(st.sampled_from([few_values, any_weight, st.just(0.0)]))
    head = st.lists(weight, min_size=length, max_size=length)
    mask = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    return Scores(
        [[draw(head) for _ in range(heads)] for _ in range(rows)],
        [draw(mask) for _ in range(rows)],
        [draw(st.integers(1, length + 3)) for _ in range(rows)],
        draw(st.sampled_from([1, 3, 7])),
    )


def check(chosen: Selected, case: Scores, visible: list[list[bool]], wanted: torch.Tensor) -> None:
    length = len(case.visible[0])
    assert chosen.positions.shape[-1] == min(max(case.budget), length)
    assert chosen.positions.dtype == torch.int32 and chosen.filled.dtype == torch.int64
    for row, head in wanted.nonzero().tolist():
        expected = slow_select(case.values[row][head], case.budget[row], case.kernel, visible[row])
        free = [FREE] * (chosen.positions.shape[-1] - len(expected))
        assert chosen.positions[row, head].tolist() == expected + free
        assert chosen.filled[row, head] == len(expected)


@implementations
@PROPERTY
@given(case=scores())
def test_equals_the_slow_definition(select: Select, case: Scores) -> None:
    everyone = torch.ones(len(case.values), len(case.values[0]), dtype=torch.bool)
    check(case.run(select), case, case.visible, everyone)
    nothing_hidden = [[True] * len(case.visible[0])] * len(case.visible)
    check(case.run(select, masked=False), case, nothing_hidden, everyone)


@implementations
@PROPERTY
@given(case=scores(), data=st.data())
def test_the_heads_asked_for_are_right(select: Select, case: Scores, data: st.DataObject) -> None:
    heads = torch.tensor([[data.draw(st.booleans()) for _ in row] for row in case.values])
    check(case.run(select, heads=heads), case, case.visible, heads)


@implementations
@PROPERTY
@given(case=scores(), data=st.data())
def test_a_row_of_a_batch_equals_the_row_alone(
    select: Select, case: Scores, data: st.DataObject
) -> None:
    length = len(case.visible[0])
    pads = [data.draw(st.integers(0, length - 1)) for _ in case.values]
    case.visible = left_padding(pads, length).tolist()
    batch = case.run(select)
    for row, pad in enumerate(pads):
        stripped = [[head[pad:] for head in case.values[row]]]
        alone = Scores(stripped, [[True] * (length - pad)], [case.budget[row]], case.kernel)
        chosen = alone.run(select, masked=False)
        width = chosen.positions.shape[-1]
        assert torch.equal(batch.filled[row], chosen.filled[0])
        assert torch.equal(batch.positions[row, :, :width], chosen.positions[0] + pad)
        assert bool((batch.positions[row, :, width:] == FREE).all())


@implementations
def test_the_later_token_wins_a_tie(select: Select) -> None:
    flat = torch.full((1, 1, 5), 0.2)
    assert select(flat, torch.tensor([2]), pool_kernel=1).positions.tolist() == [[[3, 4]]]


@implementations
def test_pooling_lets_neighbours_of_a_peak_in(select: Select) -> None:
    peak = torch.tensor([[[0.1, 0.0, 0.9, 0.0, 0.0, 0.3]]])
    assert select(peak, torch.tensor([3]), pool_kernel=1).positions.tolist() == [[[0, 5, 2]]]
    assert select(peak, torch.tensor([3]), pool_kernel=3).positions.tolist() == [[[1, 2, 3]]]


@implementations
def test_a_row_without_a_visible_token_gets_nothing(select: Select) -> None:
    visible = torch.tensor([[True, True, True], [False, False, False]])
    chosen = select(torch.ones(2, 1, 3), torch.tensor([2, 2]), visible=visible)
    assert chosen.positions.tolist() == [[[1, 2]], [[FREE, FREE]]]
    assert chosen.filled.tolist() == [[2], [0]]


# Every bit pattern of a float32, the special ones more often than by chance.
SPECIAL = [
    0x7FC00000,
    -1,
    0x7F800001,
    0x7F800000,
    -0x800000,
    -0x80000000,
    -0x40800000,
    0,
    0x3F000000,
]
bits = st.sampled_from(SPECIAL) | st.integers(-(2**31), 2**31 - 1)
any_integer = st.integers(-3, 12) | st.integers(-(2**63), 2**63 - 1)


@implementations
@PROPERTY
@given(patterns=st.lists(bits, min_size=1, max_size=12), data=st.data())
def test_a_selection_is_valid_whatever_the_bits(
    select: Select, patterns: list[int], data: st.DataObject
) -> None:
    """NaN and negative scores count as 0, a number of tokens or slots is cut to what there is."""
    scores, length = torch.tensor(patterns, dtype=torch.int32).view(torch.float32), len(patterns)
    budget, end = data.draw(any_integer, "budget"), data.draw(any_integer, "end")
    slots = data.draw(st.none() | st.integers(-2, 14), "slots")
    shown = data.draw(st.lists(st.booleans(), min_size=length, max_size=length), "visible")
    kernel = data.draw(st.sampled_from([1, 3, 7, 101]), "kernel")
    chosen = select(
        scores.view(1, 1, -1),
        torch.tensor([budget]),
        pool_kernel=kernel,
        visible=torch.tensor([shown]),
        ends=torch.tensor([end]),
        slots=slots,
    )
    most = max(0, min(budget if slots is None else slots, length))
    shown = [seen and place < end for place, seen in enumerate(shown)]
    counted = [score if score > 0 else 0.0 for score in scores.tolist()]
    filled = max(0, min(budget, most, sum(shown)))
    expected = slow_select(counted, filled, kernel, shown) if filled else []
    assert chosen.filled.tolist() == [[filled]]
    assert chosen.positions.tolist() == [[expected + [FREE] * (most - filled)]]


@implementations
@pytest.mark.parametrize("pool_kernel", [4, 0, -1])
def test_a_width_without_a_middle_is_refused(select: Select, pool_kernel: int) -> None:
    with pytest.raises(ValueError, match=f"odd integer >= 1; got {pool_kernel}"):
        select(torch.ones(1, 1, 5), torch.tensor([2]), pool_kernel=pool_kernel)


@implementations
def test_rules_are_cut_to_what_there_is(select: Select) -> None:
    few = {"pool_kernel": 1, "anchors": torch.tensor([[[6, 6, 8, 2**31 - 1, -5]]]).int()}
    for recent, expected in (
        (-3, [1, 0, 6]),
        (1, [0, 6, 7]),
        (2**40, [5, 6, 7]),
        (torch.tensor([-(2**63)]), [1, 0, 6]),
        (torch.tensor([2**63 - 1]), [5, 6, 7]),
    ):
        chosen = select(FALLING, torch.tensor([3]), recent=recent, **few)
        assert chosen.positions.tolist() == [[expected]]


def test_a_hidden_token_does_not_lift_its_neighbours() -> None:
    loud = torch.tensor([[[9.0, 0.1, 0.0, 0.2, 0.3]]])
    visible = torch.tensor([[False, True, True, True, True]])
    chosen = selection.select(loud, torch.tensor([2]), pool_kernel=3, visible=visible)
    assert chosen.positions.tolist() == [[[3, 4]]]


@pytest.mark.parametrize(("reduction", "expected"), [("max", [0.6, 0.5]), ("mean", [0.4, 0.3])])
def test_a_group_agrees_on_one_score(reduction: str, expected: list[float]) -> None:
    weights = torch.tensor([[[0.2], [0.6], [0.1], [0.5]]])  # two KV heads of two query heads
    reduced = selection.reduce_group(weights, 2, reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(reduced, torch.tensor(expected).view(1, 2, 1))


def slow_ruled(
    case: Scores, row: int, head: int, *, recent: int, anchors: list[int], end: int
) -> list[int]:
    """As `slow_select`, with the newest tokens before `end` above all and anchors above the rest."""
    shown = [seen and place < end for place, seen in enumerate(case.visible[row])]
    scores = case.values[row][head]
    unruled = slow_select(scores, len(scores), case.kernel, shown)  # every visible token, in order
    anchored = [place for place in unruled if place in anchors and place < end - recent]
    newest = [place for place in range(end) if place >= end - recent and shown[place]]
    others = [place for place in unruled if place not in anchored + newest]
    return [*others, *anchored, *newest][-case.budget[row] :]


@implementations
@PROPERTY
@given(case=scores(), data=st.data())
def test_rules_rank_above_scores_as_in_the_slow_definition(
    select: Select, case: Scores, data: st.DataObject
) -> None:
    rows, heads, length = torch.tensor(case.values).shape
    # Float32 keeps ten bits of a score that is lifted by a rule.
    case.values = [[[round(v * 1024) / 1024 for v in head] for head in row] for row in case.values]
    counts = st.integers(0, length + 2)
    recent = data.draw(st.lists(counts, min_size=rows, max_size=rows), "recent")
    some = st.lists(st.integers(0, length - 1), unique=True, min_size=2, max_size=length)
    none = st.just([])
    anchors = [
        [data.draw(none if length < 2 else some | none) for _ in range(heads)] for _ in range(rows)
    ]
    ends = data.draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows), "ends")
    ragged = data.draw(st.booleans(), "ragged")
    padded = [[[*head, *[FREE] * (length - len(head))] for head in row] for row in anchors]
    chosen = case.run(
        select,
        recent=recent[0] if len({*recent}) == 1 else torch.tensor(recent),
        anchors=torch.tensor(padded),
        ends=torch.tensor(ends) if ragged else None,
    )
    for row in range(rows):
        for head in range(heads):
            end = ends[row] if ragged else length
            expected = slow_ruled(
                case, row, head, recent=recent[row], anchors=anchors[row][head], end=end
            )
            found = chosen.positions[row, head]
            assert found[found != FREE].tolist() == expected
            assert found.tolist()[: len(expected)] == expected
            assert chosen.filled[row, head] == len(expected)


@implementations
@PROPERTY
@given(case=scores())
def test_no_rule_changes_nothing(select: Select, case: Scores) -> None:
    rows, heads, length = torch.tensor(case.values).shape
    plain, idle = (
        case.run(select),
        case.run(
            select,
            recent=0,
            anchors=torch.full((rows, heads, 2), FREE),
            ends=torch.full((rows,), length),
        ),
    )
    assert torch.equal(plain.positions, idle.positions)
    assert torch.equal(plain.filled, idle.filled)


FALLING = torch.tensor([[[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]]])


@implementations
@pytest.mark.parametrize(
    ("budget", "recent", "anchors", "end", "expected"),
    [
        (4, 2, [], 8, [1, 0, 6, 7]),
        (4, 4, [], 8, [4, 5, 6, 7]),
        (4, 6, [], 8, [4, 5, 6, 7]),  # more than fit: the newest
        (4, 0, [5, 6], 8, [1, 0, 6, 5]),  # anchors in the order of their scores
        (4, 1, [5, 6], 8, [0, 6, 5, 7]),
        (4, 3, [5, 6], 8, [0, 5, 6, 7]),  # an anchor may be recent
        (2, 1, [5, 6], 8, [5, 7]),  # recent tokens come first, then the better anchor
        (2, 2, [5, 6], 8, [6, 7]),
        (4, 2, [6], 5, [1, 0, 3, 4]),  # a row that ends earlier; what follows is not there
    ],
)
def test_worked_examples_of_the_rules(
    select: Select, budget: int, recent: int, anchors: list[int], end: int, expected: list[int]
) -> None:
    chosen = select(
        FALLING,
        torch.tensor([budget]),
        pool_kernel=1,
        recent=recent,
        anchors=torch.tensor([[[*anchors, FREE]]]),
        ends=torch.tensor([end]),
    )
    assert chosen.positions.tolist() == [[expected]]


def test_the_newest_tokens_take_at_most_a_quarter_of_the_budget() -> None:
    budget = torch.tensor([1, 3, 4, 32, 63, 64, 1000])
    share = selection.recent_share(budget, 16)
    assert isinstance(share, torch.Tensor) and share.tolist() == [0, 0, 1, 8, 15, 16, 16]
    assert selection.recent_share(budget, 0) == 0


@implementations
def test_a_small_budget_still_selects_beside_what_is_kept_by_rule(select: Select) -> None:
    """K = 32 with the default's settings: half anchors, a quarter newest, a quarter by score."""
    scores = torch.zeros(1, 1, 200)
    scores[..., 60:70] = 0.5
    budget = torch.tensor([32])
    chosen = select(
        scores,
        budget,
        pool_kernel=1,
        recent=selection.recent_share(budget, 16),
        anchors=torch.arange(16).view(1, 1, 16),
    )
    wanted = {*range(16), *range(62, 70), *range(192, 200)}
    assert set(chosen.positions.flatten().tolist()) == wanted


@implementations
def test_padding_stays_out_whatever_the_rules_say(select: Select) -> None:
    visible = left_padding([6], 8)
    chosen = select(
        FALLING,
        torch.tensor([4]),
        visible=visible,
        recent=5,
        anchors=torch.tensor([[[0, 1]]]),
    )
    assert chosen.positions.tolist() == [[[6, 7, FREE, FREE]]]
    assert chosen.filled.tolist() == [[2]]
