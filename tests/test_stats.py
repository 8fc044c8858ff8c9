"""Counts add up, per layer and together; nothing is rounded away and nothing waits for a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from refreshkv.stats import KV_READ_NOTE, DraftCounts, RowStats, Stats

ONE_STEP = {"kv_heads": 2, "entry_bytes": 64, "full": 0, "steps": 2, "read": 8, "available": 200}
FULL_STEP = ONE_STEP | {"full": 2, "read": 200}


def two_layers() -> Stats:
    """Layer 3: three steps, one of them full. Layer 1: one partial step, in which one head of two was full."""
    stats = Stats()
    for counts in (ONE_STEP, FULL_STEP, ONE_STEP):
        stats.record(3, **counts)
    stats.record(1, **(ONE_STEP | {"full": 1, "read": 108, "entry_bytes": 32}))
    return stats


def test_before_the_first_step_there_are_no_shares() -> None:
    stats = Stats()
    assert stats.full_share is stats.kv_read_share is stats.effective_stride is None
    assert stats.full_steps == stats.partial_steps == stats.kv_bytes_read == 0
    assert stats.effective_strides() == {}
    assert str(stats) == "no decode step yet"


def test_steps_and_bytes_add_up_over_layers() -> None:
    stats = two_layers()
    assert stats.full_steps == 1.5
    assert stats.partial_steps == 2.5
    assert stats.full_share == 1.5 / 4
    assert stats.effective_stride == 4 / 1.5
    assert stats.kv_bytes_read == 216 * 64 + 108 * 32
    assert stats.kv_bytes_full == 600 * 64 + 200 * 32
    assert stats.kv_read_share == stats.kv_bytes_read / stats.kv_bytes_full


def test_a_layer_that_was_never_full_has_no_stride() -> None:
    stats = two_layers()
    stats.record(0, **ONE_STEP)
    assert list(stats.effective_strides().items()) == [(0, None), (1, 2.0), (3, 3.0)]


def test_as_dict_is_json_and_whole_counts_are_ints() -> None:
    found = two_layers().as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["full_steps"] == 1.5
    assert found["layers"] == {
        "1": {"full_steps": 0.5, "steps": 1},
        "3": {"full_steps": 1, "steps": 3},
    }
    assert [type(layer["steps"]) for layer in found["layers"].values()] == [int, int]
    scalars = {name: getattr(two_layers(), name) for name in found if name != "layers"}
    assert {name: found[name] for name in scalars} == scalars


def test_the_line_for_people() -> None:
    line = str(two_layers())
    assert "37.5% of 4 layer steps" in line
    assert "effective stride 2.7" in line
    assert "\n" not in line
    never_full = Stats()
    never_full.record(0, **ONE_STEP)
    assert "effective stride -" in str(never_full)
    assert "KV read 4.0% of full attention" in str(never_full)


def test_a_tensor_count_stays_a_tensor_until_it_is_asked_for() -> None:
    stats = Stats()
    for _ in range(2):
        stats.record(0, **(ONE_STEP | {"full": torch.tensor(1), "read": torch.tensor(104)}))
    counts = stats.layers[0]
    assert isinstance(counts.full, torch.Tensor)
    assert isinstance(counts.read, torch.Tensor)
    assert (stats.full_steps, stats.kv_bytes_read) == (1, 2 * 104 * 64)
    assert json.loads(json.dumps(stats.as_dict()))["full_steps"] == 1


@pytest.mark.parametrize("again", [False, True])
def test_reset_forgets_everything(again: bool) -> None:
    stats = two_layers()
    stats.reset()
    assert stats.as_dict() == Stats().as_dict()
    if again:
        stats.record(3, **ONE_STEP)
        assert stats.partial_steps == 1


def three_rows(full: list[int], read: list[int]) -> dict[str, object]:
    """A step of three rows and two KV heads; 100 tokens in the first row, 50 and 10 in the others."""
    return {
        "kv_heads": 2,
        "entry_bytes": 64,
        "full": torch.tensor(full),
        "steps": 6,
        "read": torch.tensor(read),
        "available": torch.tensor([200, 100, 20]),
    }


STEPS = [([0, 0, 0], [8, 8, 8]), ([2, 1, 0], [200, 54, 8]), ([0, 2, 0], [8, 100, 8])]


def row_stats() -> RowStats:
    stats = RowStats()
    for full, read in STEPS:
        stats.record(0, **three_rows(full, read))
        stats.record(2, **three_rows(read[::-1], full[::-1]))
    return stats


def test_counts_of_rows_are_summed_in_the_totals() -> None:
    stats, plain = row_stats(), Stats()
    for full, read in STEPS:
        plain.record(0, **three_rows(full, read))
        plain.record(2, **three_rows(read[::-1], full[::-1]))
        assert plain.layers[0].full.dim() == 0  # whatever the number of rows
    assert stats.as_dict() == plain.as_dict()
    counts = stats.layers[0]
    assert (int(counts.full), counts.steps) == (5, 18)
    assert (int(counts.read), int(counts.available)) == (402, 3 * 320)


def test_a_row_is_what_it_would_be_alone() -> None:
    stats = row_stats()
    first, second = (stats.row(i).layers[0] for i in (0, 1))
    assert (first.full, first.steps, first.read, first.available) == (2, 6, 216, 600)
    assert (second.full, second.steps, second.read, second.available) == (3, 6, 162, 300)
    assert type(stats.row(0)) is Stats
    assert json.loads(json.dumps(stats.row(1).as_dict()))["full_share"] is not None
    stats.record(0, **three_rows([0, 0, 2], [0, 0, 20]))  # reading is not the end
    assert stats.row(2).layers[0].read == 44


def test_a_row_that_ended_early_is_not_charged_for_the_rest() -> None:
    stats = row_stats()
    early = stats.row(1, steps=2)
    assert early.full_steps == (1 + 8 + 54) / 2
    assert (early.layers[0].read, early.layers[0].steps) == (62, 4)
    assert stats.row(1, steps=0).kv_read_share is None
    assert stats.row(1, steps=99).as_dict() == stats.row(1).as_dict()


def test_a_row_without_steps_has_no_layers_whoever_decoded_beside_it() -> None:
    beside, alone = RowStats(), RowStats()
    beside.record(0, **{**ONE_STEP, "full": torch.zeros(2), "steps": torch.full((2,), 2)})
    assert beside.row(1, 0).as_dict() == alone.row(0, 0).as_dict()
    assert beside.row(1, 0).as_dict()["layers"] == {}


def test_the_rows_add_up_to_the_total() -> None:
    stats = row_stats()
    rows = [stats.row(i) for i in range(3)]
    for layer, counts in stats.layers.items():
        for name in ("full", "steps", "read", "available"):
            assert sum(getattr(row.layers[layer], name) for row in rows) == int(
                getattr(counts, name)
            )


def test_another_number_of_rows_asks_for_a_reset() -> None:
    stats = row_stats()
    one_row = {name: 2 if name == "steps" else torch.tensor([2]) for name in three_rows([], [])}
    with pytest.raises(RuntimeError, match="reset\\(\\) between batches"):
        stats.record(0, **(one_row | {"kv_heads": 2, "entry_bytes": 64}))
    assert stats.as_dict() == row_stats().as_dict()
    stats.reset()
    assert stats.row(0).as_dict() == Stats().as_dict()
    stats.record(0, **(one_row | {"kv_heads": 2, "entry_bytes": 64}))
    assert stats.row(0).as_dict() == stats.as_dict()


def test_counts_without_rows_are_those_of_one_row() -> None:
    stats = RowStats()
    for counts in (ONE_STEP, FULL_STEP):
        stats.record(0, **counts)
    assert stats.row(0).as_dict() == stats.as_dict()


CYCLES = [
    [DraftCounts(4, 4, 5, 1, 5), DraftCounts(4, 1, 2, 1, 5), DraftCounts(0, 0, 0, 0, 0)],
    [DraftCounts(2, 0, 1, 1, 3), DraftCounts(0, 0, 1, 1, 1), DraftCounts(3, 3, 2, 1, 4)],
]


def test_cycles_of_the_lossless_mode_add_up() -> None:
    stats = Stats()
    assert stats.acceptance is stats.tokens_per_full_pass is stats.passes_per_token is None
    for rows in CYCLES:
        stats.record_drafts(rows)
    assert vars(stats.drafts) == {"drafted": 13, "accepted": 8, "yielded": 11, "full": 5, "all": 18}
    assert stats.acceptance == 8 / 13
    assert stats.tokens_per_full_pass == 11 / 5
    assert stats.passes_per_token == 18 / 11
    found = stats.as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["acceptance"] == stats.acceptance
    stats.reset()
    assert stats.as_dict() == Stats().as_dict()


def test_rows_of_the_lossless_mode_add_up() -> None:
    stats = RowStats()
    for rows in CYCLES:
        stats.record_drafts(rows)
    rows = [stats.row(row).drafts for row in range(3)]
    assert vars(rows[1]) == {"drafted": 4, "accepted": 1, "yielded": 3, "full": 2, "all": 6}
    for name, count in vars(stats.drafts).items():
        assert sum(getattr(row, name) for row in rows) == count
    assert vars(CYCLES[0][0]) == vars(DraftCounts(4, 4, 5, 1, 5))  # what was given is left alone
    stats.reset()
    assert vars(stats.row(0).drafts) == vars(DraftCounts())


def test_the_line_for_people_in_the_lossless_mode() -> None:
    stats = two_layers()
    for rows in CYCLES:
        stats.record_drafts(rows)
    line = str(stats)
    assert "2.2 tokens per full pass" in line and "1.64 passes per token" in line
    assert "61.5% of the drafts" in line and "\n" not in line


@pytest.mark.parametrize(
    "page", ["README.md", "docs/cli.md", "docs/evaluation.md", "docs/fidelity.md"]
)
def test_what_kv_read_leaves_out_stands_beside_the_figures(page: str) -> None:
    text = (Path(__file__).parents[1] / page).read_text("utf-8")
    assert KV_READ_NOTE in " ".join(text.split())


def test_what_kv_read_leaves_out_stands_in_the_docstring() -> None:
    assert KV_READ_NOTE in " ".join((Stats.__doc__ or "").split())
