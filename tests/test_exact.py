"""The exact mode of one layer: full passes are full attention whatever was drafted, and drafts leave no trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import RefreshConfig
from refreshkv.exact import Cycle, ExactLayer, ExactWindowLayer
from refreshkv.kernels import reference
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.stats import RowStats, Stats
from refreshkv.step import decode_step

from .helpers import Tokens, random_tokens

PROMPT, WINDOW = 24, 7
PADS = [5, 0, 11]
# Drafts and tokens kept of each row: all, none, some; a row that sits out; a cycle without drafts.
CYCLES: list[tuple[list[int], list[int]]] = [
    ([3, 3, 3], [4, 1, 2]),
    ([3, 1, 2], [2, 2, 1]),
    ([2, 2, -1], [1, 3, 0]),
    ([0, 0, 0], [1, 1, 1]),
    ([5, 2, 4], [6, 1, 3]),
    ([1, 2, 3], [1, 1, 1]),
]
CONFIGS = {
    "plain": RefreshConfig(mode="exact", budget=6, pool_kernel=3),
    "share": RefreshConfig(mode="exact", budget=0.5),
    "everything": RefreshConfig(mode="exact", budget=1000),
    "options": RefreshConfig(
        mode="exact", budget=16, recent=4, successor=2, anchor=0.25, window=8, pool_kernel=3
    ),
}
ATTENTION = {
    "plain": AttendOptions(scale=0.25),
    "softcap": AttendOptions(scale=0.25, softcap=2.0),
    "sinks": AttendOptions(scale=0.25, sinks=torch.tensor([0.5, 2.0, -1.0, 1.0])),
}


def texts(rows: Sequence[int] = (0, 1, 2)) -> Tokens:
    """Three padded texts, or some of them."""
    return random_tokens(rows=3, length=PROMPT + 40, pads=PADS, seed=3).rows(torch.tensor(rows))


class Run:
    """Drives one layer as a decoding loop would; drafts have keys of their own."""

    def __init__(
        self,
        tokens: Tokens,
        config: RefreshConfig = CONFIGS["plain"],
        options: AttendOptions = ATTENTION["plain"],
        window: int | None = None,
        stats: Stats | None = None,
    ) -> None:
        self.tokens, self.options = tokens, options
        cache = LayerCache(config, stats=stats)
        cache.append(tokens.keys[:, :, :PROMPT], tokens.values[:, :, :PROMPT])
        given, cycle = (cache, options, tokens.seen(PROMPT)), Cycle(cache.store.lengths)
        if window is None:
            cache.await_selection(tokens.queries[:, :, :PROMPT])
            self.layer = ExactLayer(*given, cycle)
        else:
            self.layer = ExactWindowLayer(*given, window, cycle)

    def at(self, what: Tensor, places: Tensor) -> Tensor:
        """`[B, H, T, D]`: of each row the `places` `[B, T]`."""
        index = places[:, None, :, None].expand(-1, what.shape[1], -1, what.shape[3])
        return what.gather(2, index)

    def draft(self) -> Tensor:
        if not self.layer.cycle.ahead:
            self.layer.select()
        places = (self.layer.ends + self.layer.cycle.ahead)[:, None]
        query, key, value = (
            self.at(what, places)[:, :, 0] + shift
            for what, shift in (
                (self.tokens.queries, 0.0),
                (self.tokens.keys, 0.3),
                (self.tokens.values, 0.3),
            )
        )
        self.layer.cycle.begin_draft(grows=True)
        output = self.layer.draft(query, key, value)
        self.layer.cycle.end_draft()
        return output

    def verify(self, counts: Tensor) -> Tensor:
        places = self.layer.ends[:, None] + torch.arange(int(counts.max()))
        new = (
            self.at(what, places)
            for what in (self.tokens.queries, self.tokens.keys, self.tokens.values)
        )
        self.layer.cycle.counts.copy_(counts)
        return self.layer.verify(*new)

    def commit(self, kept: Sequence[int]) -> None:
        self.layer.commit(torch.tensor(kept))
        self.layer.cycle.advance(torch.tensor(kept))

    def cycle(self, drafted: Sequence[int], kept: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        outputs = []
        for step in range(max(drafted)):
            self.layer.cycle.counted.copy_(torch.tensor(drafted) > step)
            outputs.append(self.draft())
        verified = self.verify(torch.tensor(drafted) + 1)
        self.commit(kept)
        return outputs, verified

    def full(self, row: int, place: int, window: int | None = None) -> Tensor:
        """`[Hq, D]`: full attention of the token at `place` of a row."""
        first = PADS[row] if len(self.tokens.keys) == 3 else 0
        if window is not None:
            first = max(first, place - window + 1)
        seen = slice(first, place + 1)
        return reference.attend(
            self.tokens.queries[row : row + 1, :, place],
            Entries(
                self.tokens.keys[row : row + 1, :, seen],
                self.tokens.values[row : row + 1, :, seen],
            ),
            self.options,
        ).output[0]


def the_text_is_there(run: Run) -> bool:
    """Every row's store holds its text, bit by bit, up to its end."""
    (keys, values), ends = run.layer.cache.store.dense(), run.layer.ends.tolist()
    return all(
        torch.equal(keys[row, :, :end], run.tokens.keys[row, :, :end])
        and torch.equal(values[row, :, :end], run.tokens.values[row, :, :end])
        for row, end in enumerate(ends)
    )


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_full_pass_is_full_attention(attention: str, config: str, window: int | None) -> None:
    run = Run(texts(), CONFIGS[config], ATTENTION[attention], window)
    for drafted, kept in CYCLES:
        ends = run.layer.ends.tolist()
        _, verified = run.cycle(drafted, kept)
        for row, count in enumerate(drafted):
            for step in range(count + 1):
                expected = run.full(row, ends[row] + step, window)
                torch.testing.assert_close(verified[row, :, step], expected, atol=2e-6, rtol=1e-5)
        assert run.layer.ends.tolist() == [end + n for end, n in zip(ends, kept, strict=True)]
        assert the_text_is_there(run)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_drafts_touch_nothing_before_the_end(window: int | None) -> None:
    run = Run(texts(), window=window)
    for drafted, kept in CYCLES:
        for _ in range(max(drafted)):
            run.draft()
            assert the_text_is_there(run)
        run.verify(torch.tensor(drafted) + 1)
        run.commit(kept)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_left_after_the_ends_is_never_looked_at(config: str, window: int | None) -> None:
    clean, dirty = (Run(texts(), CONFIGS[config], window=window) for _ in range(2))
    for drafted, kept in CYCLES:
        results = [run.cycle(drafted, kept) for run in (clean, dirty)]
        for one, other in zip(*(drafts for drafts, _ in results), strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
        for row, count in enumerate(drafted):
            of_row = [verified[row, :, : count + 1] for _, verified in results]
            torch.testing.assert_close(*of_row, atol=0, rtol=0)
        keys, values = dirty.layer.cache.store.dense()
        for row, end in enumerate(dirty.layer.ends.tolist()):
            keys[row, :, end:] = 50.0
            values[row, :, end:] = 1e9


@pytest.mark.parametrize("config", CONFIGS)
def test_a_selection_holds_tokens_before_the_end_of_its_row(config: str) -> None:
    run = Run(texts(), CONFIGS[config])
    for drafted, kept in CYCLES:
        if max(drafted):
            run.draft()
            ring, ends = run.layer.cache.ring, run.layer.ends
            for row, end in enumerate(ends.tolist()):
                for head in ring.positions[row].tolist():
                    found = sorted(p for p in head if p >= 0)
                    assert found[-1] == end  # the token just drafted
                    assert found[0] >= PADS[row] and len(set(found)) == len(found)
                    assert found[-2] < end
                    assert set(range(end - run.layer.cache.config.recent + 2, end)) <= set(found)
        run.cycle([max(n - 1, 0) if n > 0 else n for n in drafted], [min(n, 1) for n in kept])


def test_a_row_that_sits_out_is_left_as_it_was() -> None:
    stats = RowStats()
    run = Run(texts(), stats=stats)
    run.cycle([2, 2, 2], [2, 3, 1])
    row, end = stats.row(1).as_dict(), int(run.layer.ends[1])
    before = run.layer.cache.store.dense()[0][1, :, :end].clone()
    run.cycle([2, -1, 3], [1, 0, 4])
    assert int(run.layer.ends[1]) == end
    assert torch.equal(run.layer.cache.store.dense()[0][1, :, :end], before)
    assert stats.row(1).as_dict() == row


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_batch_is_its_rows_alone(config: str, window: int | None) -> None:
    stats = RowStats()
    batch = Run(texts(), CONFIGS[config], window=window, stats=stats)
    alone = [Run(texts([row]), CONFIGS[config], window=window, stats=Stats()) for row in range(3)]
    for drafted, kept in CYCLES:
        drafts, verified = batch.cycle(drafted, kept)
        for row, run in enumerate(alone):
            if drafted[row] < 0:
                continue
            own_drafts, own = run.cycle([drafted[row]], [kept[row]])
            torch.testing.assert_close(
                own[0], verified[row, :, : drafted[row] + 1], atol=2e-6, rtol=1e-5
            )
            for one, other in zip(own_drafts, drafts, strict=False):
                torch.testing.assert_close(one[0], other[row], atol=2e-6, rtol=1e-5)
    assert batch.layer.ends.tolist() == [int(run.layer.ends) for run in alone]
    if window is None and config == "everything":  # else it is charged for the drafts of the others
        for row, run in enumerate(alone):
            found, expected = stats.row(row).layers[0], run.layer.cache.stats.layers[0]
            for name in ("full", "steps", "available"):
                assert int(getattr(found, name)) == int(getattr(expected, name))


def test_drafts_attend_to_the_partial_cache_and_to_themselves() -> None:
    run = Run(texts(), RefreshConfig(mode="exact", budget=4, pool_kernel=1))
    run.cycle([1, 1, 1], [2, 1, 1])
    for drafted in range(1, 4):
        output = run.draft()
        ring = run.layer.cache.ring
        assert (ring.positions >= 0).sum(-1).eq(4).all()
        own = run.layer.ends[:, None, None] + torch.arange(drafted)
        assert (ring.positions[..., None] == own[:, :, None]).any(2).all()
        places = (run.layer.ends + drafted - 1)[:, None]
        expected = reference.attend(
            run.at(run.tokens.queries, places)[:, :, 0],
            Entries(ring.keys, ring.values),
            run.options.over(lengths=ring.used),
        ).output
        torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)


def test_with_everything_in_the_partial_cache_a_draft_is_full_attention() -> None:
    run = Run(texts(), CONFIGS["everything"])
    for drafted, kept in CYCLES:
        ends = run.layer.ends.tolist()
        outputs, _ = run.cycle(drafted, kept)
        for row, end in enumerate(ends):  # a first draft's own key is the only one that differs
            for output in outputs[:1]:
                place = end
                keys = run.tokens.keys[row : row + 1, :, PADS[row] : place + 1].clone()
                values = run.tokens.values[row : row + 1, :, PADS[row] : place + 1].clone()
                keys[:, :, -1] += 0.3
                values[:, :, -1] += 0.3
                query = run.tokens.queries[row : row + 1, :, place]
                full = reference.attend(query, Entries(keys, values), run.options)
                torch.testing.assert_close(output[row], full.output[0], atol=2e-6, rtol=1e-5)


def test_the_budget_is_that_of_the_prompt_without_a_draft_too() -> None:
    with_draft, without = (Run(texts(), CONFIGS["share"]) for _ in range(2))
    with_draft.cycle([1, 1, 1], [1, 1, 1])
    without.cycle([0, 0, 0], [1, 1, 1])
    expected = [-(-(PROMPT - pad) // 2) for pad in PADS]
    assert with_draft.layer.cache.budget.tolist() == expected
    assert without.layer.cache.budget.tolist() == expected
    assert without.layer.cache.ring is None
    without.cycle([2, 2, 2], [1, 1, 1])
    assert without.layer.cache.ring.used[:, 0].tolist() == expected


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_rows_are_taken_back_and_the_layer_is_closed(window: int | None) -> None:
    run = Run(texts(), window=window)
    run.cycle([3, 3, 3], [4, 1, 2])
    run.layer.take_back(torch.tensor([PROMPT + 2, PROMPT + 9, PROMPT + 1]))
    assert run.layer.ends.tolist() == [PROMPT + 2, PROMPT + 1, PROMPT + 1]
    run.layer.close(PROMPT + 1)
    cache = run.layer.cache
    assert cache.length == PROMPT + 1 and cache.waiting is None
    assert torch.equal(cache.store.dense()[0], run.tokens.keys[:, :, : PROMPT + 1])
    if window is None:  # and a step of a loop of one's own is full attention
        now = slice(PROMPT + 1, PROMPT + 2)
        cache.append(run.tokens.keys[:, :, now], run.tokens.values[:, :, now])
        output = decode_step(
            cache,
            run.tokens.queries[:, :, PROMPT + 1],
            run.options,
            run.tokens.seen(PROMPT + 2),
        )
        for row in range(3):
            expected = run.full(row, PROMPT + 1)
            torch.testing.assert_close(output[row], expected, atol=2e-6, rtol=1e-5)


def test_a_loop_of_ones_own_is_full_attention() -> None:
    tokens, config = texts(), CONFIGS["plain"]
    run = Run(tokens, config)
    run.layer.close(PROMPT)
    cache = run.layer.cache
    for place in range(PROMPT, PROMPT + 4):
        now = slice(place, place + 1)
        cache.append(tokens.keys[:, :, now], tokens.values[:, :, now])
        query, seen = tokens.queries[:, :, place], tokens.seen(place + 1)
        output = decode_step(cache, query, run.options, seen)
        for row in range(3):
            torch.testing.assert_close(output[row], run.full(row, place), atol=2e-6, rtol=1e-5)
    assert cache.stats.full_share == cache.stats.kv_read_share == 1.0


def counts_of(stats: Stats) -> dict[str, Any]:
    counts = stats.layers[0]
    return {name: int(getattr(counts, name)) for name in ("full", "steps", "read", "available")}


def test_what_a_cycle_reads() -> None:
    """One row, a prompt of 24, K = 6, two KV heads; two cycles by hand."""
    tokens = random_tokens(length=PROMPT + 20, seed=1)
    run = Run(tokens, RefreshConfig(mode="exact", budget=6))
    run.cycle([3], [2])
    # Three drafts read K each; the full pass reads the prompt and its own four. Full attention would read 25 and 26.
    first = {"full": 2, "steps": 4, "read": 2 * (3 * 6 + 28), "available": 2 * (25 + 26)}
    assert counts_of(run.layer.cache.stats) == first
    run.cycle([1], [2])
    second = {"full": 2, "steps": 4, "read": 2 * (6 + 28), "available": 2 * (27 + 28)}
    expected = {name: first[name] + second[name] for name in first}
    assert counts_of(run.layer.cache.stats) == expected
    share = expected["read"] / expected["available"]
    assert run.layer.cache.stats.kv_read_share == share


def test_rows_are_charged_for_what_they_take() -> None:
    stats = RowStats()
    run = Run(texts(), RefreshConfig(mode="exact", budget=6), stats=stats)
    run.cycle([2, 2, -1], [3, 1, 0])
    rows = [counts_of(stats.row(row)) for row in range(3)]
    assert rows[0] == {
        "full": 2,
        "steps": 6,
        "read": 2 * (2 * 6 + 19 + 3),
        "available": 2 * (20 + 21 + 22),
    }
    assert rows[1] == {"full": 2, "steps": 2, "read": 2 * (2 * 6 + 24 + 3), "available": 2 * 25}
    assert set(rows[2].values()) == {0}
    total = counts_of(stats)
    assert {name: sum(row[name] for row in rows) for name in total} == total
