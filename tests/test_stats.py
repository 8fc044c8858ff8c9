"""Counts add up, per layer and together; nothing is rounded away and nothing waits for a device."""

from __future__ import annotations

import json

import pytest
import torch

from refreshkv.stats import Stats

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
