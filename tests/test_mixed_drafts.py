"""The exact mode with mixed drafts: full passes are full attention, drafts are mixed steps and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.cache.rounded import RoundedCopy
from refreshkv.cache.store import DenseStore
from refreshkv.config import RefreshConfig
from refreshkv.exact import Cycle, ExactMixedLayer
from refreshkv.kernels.options import AttendOptions
from refreshkv.policy.rounding import BLOCK
from refreshkv.stats import RowStats, Stats
from refreshkv.step import decode_step
from tests.helpers import Tokens, random_tokens, relative_rms
from tests.test_exact import ATTENTION, CYCLES, PADS, Run, the_text_is_there

PROMPT = 187  # the first row completes a block
CONFIG = RefreshConfig(mode="exact", drafter="mixed", budget=6)


def texts(rows: tuple[int, ...] = (0, 1, 2)) -> Tokens:
    tokens = random_tokens(rows=3, length=PROMPT + 40, pads=PADS, seed=3).rows(torch.tensor(rows))
    tokens.queries *= 4.0
    return tokens


class MixedRun(Run):
    """As `Run`, with these drafts."""

    def __init__(
        self,
        tokens: Tokens | None = None,
        options: AttendOptions = ATTENTION["plain"],
        stats: Stats | None = None,
    ) -> None:
        self.tokens, self.options = tokens or texts(), options
        cache = LayerCache(CONFIG, stats=stats)
        cache.append(self.tokens.keys[:, :, :PROMPT], self.tokens.values[:, :, :PROMPT])
        cache.await_selection(self.tokens.queries[:, :, :PROMPT])
        cycle = Cycle(cache.store.lengths)
        self.layer = ExactMixedLayer(cache, options, self.tokens.seen(PROMPT), cycle)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_full_pass_is_full_attention(attention: str) -> None:
    run = MixedRun(options=ATTENTION[attention])
    for drafted, kept in CYCLES:
        ends = run.layer.ends.tolist()
        _, verified = run.cycle(drafted, kept)
        for row, count in enumerate(drafted):
            for step in range(count + 1):
                expected = run.full(row, ends[row] + step)
                torch.testing.assert_close(verified[row, :, step], expected, atol=2e-6, rtol=1e-5)
        assert the_text_is_there(run)


def mixed(run: MixedRun, row: int, end: int, drafted: int) -> Tensor:
    """`[Hq, D]`: a mixed step over the text of a row up to `end` and so many drafts, the last one its query."""
    seen = slice(PADS[row], end)
    new = slice(end, end + drafted)
    cache = LayerCache(RefreshConfig(mode="mixed", budget=6))
    for part, shift in ((seen, 0.0), (new, 0.3)):
        tokens = (x[row : row + 1, :, part] + shift for x in (run.tokens.keys, run.tokens.values))
        cache.append(*tokens)
    query = run.tokens.queries[row : row + 1, :, end + drafted - 1]
    return decode_step(cache, query, run.options)[0]


@pytest.mark.parametrize("attention", ATTENTION)
def test_drafts_are_mixed_steps(attention: str) -> None:
    run, errors = MixedRun(options=ATTENTION[attention]), []
    for drafted, kept in CYCLES:
        ends = run.layer.ends.tolist()
        outputs, _ = run.cycle(drafted, kept)
        for row, end in enumerate(ends):
            for step, output in enumerate(outputs):
                if (end - PADS[row]) // BLOCK == (end + step - PADS[row]) // BLOCK:
                    expected = mixed(run, row, end, step + 1)
                    torch.testing.assert_close(output[row], expected, atol=2e-6, rtol=1e-5)
                    errors.append(relative_rms(output[row], run.full(row, end + step)))
    assert len(errors) > 30 and min(errors) > 0.01


def test_codes_are_those_of_what_stands() -> None:
    """Whatever was drafted and refused, taken back or closed."""
    run = MixedRun()
    for drafted, kept in [*CYCLES, *CYCLES[:1]]:
        run.cycle(drafted, kept)
    run.layer.select()
    check_codes(run, run.layer.ends)
    assert run.layer.cache.copy.finished.tolist() == [3, 3, 2]
    run.layer.take_back(torch.tensor([PROMPT + 2, PROMPT + 3, PROMPT + 1]))
    run.layer.select()
    check_codes(run, run.layer.ends)
    assert run.layer.cache.copy.finished.tolist() == [2, 2, 2]
    run.layer.close(140)
    assert run.layer.cache.copy.finished.tolist() == [2, 2, 2]
    run.layer.close(130)
    assert run.layer.cache.copy.finished.tolist() == [1, 2, 1]


def check_codes(run: MixedRun, ends: Tensor) -> None:
    store = DenseStore()
    store.append(run.tokens.keys, run.tokens.values)
    expected = RoundedCopy(2, 2, store)
    expected.begin_at(store, torch.tensor(PADS))
    expected.follow(store, ends, run.tokens.visible)
    found = run.layer.cache.copy
    assert torch.equal(found.finished, expected.finished)
    for ours, theirs in zip(found.codes.tensors, expected.codes.tensors, strict=True):
        for row, blocks in enumerate(found.finished.tolist()):
            assert torch.equal(ours[row, :, :blocks], theirs[row, :, :blocks])


def test_what_is_left_after_the_ends_is_never_looked_at() -> None:
    clean, dirty = MixedRun(), MixedRun()
    for drafted, kept in CYCLES:
        results = [run.cycle(drafted, kept) for run in (clean, dirty)]
        for one, other in zip(*(drafts for drafts, _ in results), strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
        keys, values = dirty.layer.cache.store.dense()
        for row, end in enumerate(dirty.layer.ends.tolist()):
            keys[row, :, end:] = 50.0
            values[row, :, end:] = 1e9


def test_a_batch_is_its_rows_alone() -> None:
    stats = RowStats()
    batch = MixedRun(stats=stats)
    alone = [MixedRun(texts((row,)), stats=Stats()) for row in range(3)]
    for drafted, kept in CYCLES:
        drafts, verified = batch.cycle(drafted, kept)
        for row, run in enumerate(alone):
            if drafted[row] < 0:
                continue
            own_drafts, own = run.cycle([drafted[row]], [kept[row]])
            ours = verified[row, :, : drafted[row] + 1]
            torch.testing.assert_close(own[0], ours, atol=2e-6, rtol=1e-5)
            for one, other in zip(own_drafts, drafts, strict=False):
                torch.testing.assert_close(one[0], other[row], atol=2e-6, rtol=1e-5)
    for row, run in enumerate(alone):
        assert stats.row(row).as_dict() == run.layer.cache.stats.as_dict()


def test_what_a_cycle_reads() -> None:
    """One row, a prompt of 187 and a budget of everything in two KV heads; a cycle by hand."""
    run = MixedRun(texts((1,)))
    run.layer.cache.config = RefreshConfig(mode="exact", drafter="mixed", budget=1000)
    run.cycle([3], [2])
    counts = run.layer.cache.stats.layers[0]
    assert (int(counts.full), int(counts.steps)) == (2, 4)
    # Drafts read the text and themselves; the full pass the text and its own four.
    assert int(counts.read) == 2 * (188 + 189 + 190 + 191)
    # Of codes the keys alone, in both blocks: no value is worth it beside the exact ones.
    assert int(counts.rounded) == 3 * 2 * 2 * (64 * 32 * 2 // 8 + 16 * 2)
    assert int(counts.available) == 2 * (188 + 189)
