"""One layer, step by step, against a slow definition of the method and against full attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.kernels import CPU, REFERENCE, Backend
from refreshkv.step import Attention
from tests.helpers import Decoder, Scripted, Step, random_tokens
from tests.slow import slow_head

NEVER = RefreshConfig(stride=None, budget=6)
FIXED = RefreshConfig(stride=4, threshold=None, budget=6)
CONFIGS = {
    "never": NEVER,
    "fixed": FIXED,
    "share": replace(FIXED, budget=0.3),
    "mean, no pooling": replace(FIXED, group_reduction="mean", pool_kernel=1),
    "drift of the layer": replace(FIXED, stride=2, threshold=0.1),
    "drift of a head": replace(FIXED, stride=2, threshold=0.1, decide="head"),
    "one slot": replace(FIXED, budget=1),
}
SHAPES: dict[str, dict[str, Any]] = {
    "one head": {"kv_heads": 1, "group": 1},
    "ragged": {"rows": 3, "group": 4, "pads": (0, 9, 4)},
    "multi-head": {"rows": 2, "kv_heads": 4, "group": 1, "dim": 32},
}
SINKS = torch.tensor([0.0, 7.0, 5.0, -2.0])  # strong enough to decide between the heads of a group
ATTENTIONS = {
    "softcap": Attention(0.5, softcap=1.5),
    "sinks": Attention(0.5, sinks=SINKS),
    "both": Attention(0.5, softcap=1.5, sinks=SINKS),
}


@pytest.fixture(params=[CPU, REFERENCE], ids=lambda backend: backend.name, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every test here runs on both backends."""
    use(monkeypatch, request.param)
    return request.param


def use(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr("refreshkv.cache.backend_for", lambda device: backend)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


def check_against_slow(decoder: Decoder, config: RefreshConfig, prompt: int, steps: int) -> None:
    tokens = decoder.tokens
    rows, heads = tokens.keys.shape[:2]
    taken = decoder.run(steps)
    for row, head in [(row, head) for row in range(rows) for head in range(heads)]:
        slow = slow_head(tokens, row, head, config, prompt, decoder.attention)
        members = slice(head * tokens.group, (head + 1) * tokens.group)
        for step, (positions, output) in zip(taken, slow, strict=False):
            assert step.held[row][head] == positions
            equal(step.output[row, members], output.float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_slow_method(name: str, shape: str) -> None:
    tokens = random_tokens(**SHAPES[shape], length=33)
    check_against_slow(Decoder(tokens, CONFIGS[name], 20), CONFIGS[name], 20, 13)


@pytest.mark.parametrize("config", [NEVER, FIXED], ids=["never", "fixed"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_softcap_and_sinks_count_in_attention_and_selection(
    name: str, config: RefreshConfig
) -> None:
    tokens = random_tokens(rows=2, pads=(0, 3), length=33)
    attention = ATTENTIONS[name]
    check_against_slow(Decoder(tokens, config, 20, attention=attention), config, 20, 9)
    plain = Decoder(tokens, config, 20, attention=Attention(0.5)).step()
    capped = Decoder(tokens, config, 20, attention=attention).step()
    assert plain.held != capped.held  # or the comparison above could not fail
    assert float((plain.output - capped.output).abs().max()) > 0.01


def outputs_equal_full(steps: list[Step]) -> None:
    for step in steps:
        equal(step.output, step.full)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_budget_for_every_token_is_full_attention(name: str, shape: str) -> None:
    tokens = random_tokens(**SHAPES[shape], length=33)
    outputs_equal_full(Decoder(tokens, replace(CONFIGS[name], budget=33), 20).run(13))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "config",
    [
        replace(FIXED, stride=1, budget=1),
        replace(FIXED, stride=1, threshold=1.0),
        replace(FIXED, stride=1, threshold=1.0, decide="head"),
        RefreshConfig(mode="full", stride=None),
    ],
    ids=["stride 1", "threshold 1", "threshold 1 per head", "mode full"],
)
def test_always_full_is_full_attention(config: RefreshConfig, shape: str) -> None:
    tokens = random_tokens(**SHAPES[shape], length=33)
    decoder = Decoder(tokens, config, 20)
    outputs_equal_full(decoder.run(13))
    assert decoder.cache.stats.full_share == decoder.cache.stats.kv_read_share == 1.0
    assert (decoder.cache.partial is None) is (config.mode == "full")
    assert decoder.cache.pending is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_equals_its_rows_alone(name: str) -> None:
    pads = (0, 9, 4)
    tokens = random_tokens(rows=3, pads=pads, length=33)
    batch = Decoder(tokens, CONFIGS[name], 20).run(13)
    for row, pad in enumerate(pads):
        for together, alone in zip(
            batch, Decoder(tokens.alone(row), CONFIGS[name], 20 - pad).run(13), strict=True
        ):
            shifted = [[position + pad for position in head] for head in alone.held[0]]
            assert together.held[row] == shifted
            equal(together.output[row], alone.output[0])


def test_the_backends_agree_on_outputs_and_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(rows=3, pads=(0, 9, 4), length=60, dim=64)
    config = replace(CONFIGS["drift of a head"], budget=0.25)
    runs = []
    for chosen in (CPU, REFERENCE):
        use(monkeypatch, chosen)
        runs.append(Decoder(tokens, config, 30).run(30))
    for cpu, plain in zip(*runs, strict=True):
        assert cpu.held == plain.held
        equal(cpu.output, plain.output)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("length", [15, 20])
def test_after_a_crop_the_next_step_is_full_and_the_ring_is_valid(
    steps_before: int, length: int
) -> None:
    tokens = random_tokens(rows=2, pads=(0, 5), length=33)
    decoder = Decoder(tokens, NEVER, 21)
    decoder.run(steps_before)
    decoder.cache.crop(length)
    after = decoder.step()
    outputs_equal_full([after])
    assert decoder.cache.stats.full_steps == 2  # one in each row
    expected = Decoder(
        tokens, NEVER, length + 1
    )  # selects from the same query over the same tokens
    following = expected.step()
    assert decoder.step().held == following.held
    assert {position for row in after.held for head in row for position in head} <= set(
        range(length + 1)
    )


@pytest.mark.parametrize("steps_before", [0, 5])
@pytest.mark.parametrize("name", ["share", "drift of a head"])
def test_rows_taken_in_mid_text_go_on_as_before(name: str, steps_before: int) -> None:
    tokens = random_tokens(rows=3, pads=(0, 9, 4), length=33)
    decoder, taken = Decoder(tokens, CONFIGS[name], 20), Decoder(tokens, CONFIGS[name], 20)
    decoder.run(steps_before)
    taken.run(steps_before)
    rows = torch.tensor([2, 1, 2, 2])
    taken.cache.take_rows(rows)
    taken.tokens = tokens.rows(rows)
    for before, after in zip(decoder.run(8), taken.run(8), strict=True):
        assert after.held == [before.held[row] for row in rows.tolist()]
        equal(after.output, before.output[rows])


def test_a_crop_that_removes_nothing_changes_nothing() -> None:
    decoder = Decoder(random_tokens(), NEVER, 20)
    decoder.step()
    partial = decoder.cache.partial
    decoder.cache.crop(21)
    assert decoder.cache.partial is partial


HEAD_0, HEAD_1, NOBODY = (torch.tensor([mask]) for mask in ([1, 0], [0, 1], [0, 0]))


@pytest.mark.parametrize(
    ("config", "script", "pads", "full", "read", "available"),
    [
        # One row: 11, 12, 13, 14 tokens in steps 1 to 4. Stride 2: partial, full, partial, full.
        (replace(FIXED, stride=2, budget=4), None, None, 4, 2 * (4 + 12 + 4 + 14), 2 * 50),
        (replace(NEVER, budget=4), None, None, 0, 2 * 4 * 4, 2 * 50),
        (RefreshConfig(mode="full"), None, None, 8, 2 * 50, 2 * 50),
        # Not yet 12 slots used in step 1: only what is there is read.
        (replace(NEVER, budget=12), None, None, 0, 2 * (11 + 12 + 12 + 12), 2 * 50),
        # The second row has 3 tokens less, in every step.
        (replace(FIXED, stride=2, budget=4), None, (0, 3), 8, 2 * (8 + 21 + 8 + 25), 2 * 88),
        # A share of 10 and of 7 tokens: K = 5 and 4.
        (replace(NEVER, budget=0.5), None, (0, 3), 0, 2 * 4 * 9, 2 * 88),
        # Decided before: the head reads the full cache only. After: it has read its partial cache too.
        (replace(NEVER, budget=4), {"before": [HEAD_0, NOBODY]}, None, 1, 11 + 7 * 4, 2 * 50),
        (replace(NEVER, budget=4), {"after": [NOBODY, HEAD_1]}, None, 1, 8 * 4 + 12, 2 * 50),
        (
            replace(NEVER, budget=4),
            {"before": [HEAD_0], "after": [HEAD_1]},
            None,
            2,
            11 + (4 + 11) + 6 * 4,
            2 * 50,
        ),
    ],
)
def test_the_statistics_equal_a_count_by_hand(
    config: RefreshConfig,
    script: dict[str, list[Tensor]] | None,
    pads: tuple[int, ...] | None,
    full: int,
    read: int,
    available: int,
) -> None:
    rows = 1 if pads is None else len(pads)
    masks = {when: [mask.bool() for mask in given] for when, given in (script or {}).items()}
    trigger = Scripted(**masks) if script else None
    decoder = Decoder(random_tokens(rows=rows, pads=pads), config, 10, trigger=trigger)
    decoder.run(4)
    counts = decoder.cache.stats.layers[0]
    assert (int(counts.full), int(counts.steps)) == (full, rows * 2 * 4)
    assert (int(counts.read), int(counts.available)) == (read, available)
    assert (counts.kv_heads, counts.entry_bytes) == (2, 2 * 16 * 4)


def test_a_row_whose_prompt_is_all_padding_decodes() -> None:
    tokens = random_tokens(rows=2, pads=(0, 10))
    steps = Decoder(tokens, replace(NEVER, budget=4), 10).run(6)
    outputs_equal_full([Step(s.output[1:], s.full[1:], s.held[1:]) for s in steps[:4]])
    assert [step.held[1][0] for step in steps[2:]] == [
        [10, 11, 12],
        [10, 11, 12, 13],
        [11, 12, 13, 14],
        [12, 13, 14, 15],
    ]
