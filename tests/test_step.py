"""One layer, step by step, against a slow definition of the method and against full attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.kernels.backend import CPU, REFERENCE, Backend
from refreshkv.kernels.options import AttendOptions
from refreshkv.policy.selection import FREE
from tests.helpers import PROPERTY, Decoder, Scripted, Step, Tokens, random_tokens
from tests.slow import first_visible, slow_head, slow_logits, slow_select, slow_weights

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
DROP = replace(NEVER, trigger="lse-drop", drop=1.0)
EVERY_OPTION = replace(
    DROP, budget=0.4, stride=6, recent=2, successor=2, window=8, anchor=0.34, group_reduction="mean"
)
BY_STRIDE: dict[str, Any] = {"trigger": "query", "drop": RefreshConfig().drop, "threshold": None}
# Ours, past the paper.
OPTIONS = {
    "recent": replace(FIXED, budget=14, recent=3),
    "recent beyond its share": replace(FIXED, budget=9, recent=10),
    "anchor": replace(FIXED, anchor=0.5),
    "anchor is everything": replace(FIXED, anchor=1.0),
    "recent and anchor": replace(FIXED, budget=8, recent=2, anchor=0.5),
    "window": replace(FIXED, window=8),
    "window beyond the prompt": replace(NEVER, window=32),
    "successor": replace(NEVER, successor=2),
    "successor, refreshed": replace(FIXED, budget=10, successor=1),
    "successor, free slots": replace(NEVER, budget=25, successor=2),
    **{f"successor, {k} slots": replace(FIXED, budget=k, successor=3) for k in (1, 2, 3)},
    "drop": DROP,
    "drop, capped": replace(DROP, drop=1.5, stride=4),
    "every option": EVERY_OPTION,
    "every option, fixed stride": replace(EVERY_OPTION, **BY_STRIDE, stride=4),
}
ALL = CONFIGS | OPTIONS
SHAPES: dict[str, dict[str, Any]] = {
    "one head": {"kv_heads": 1, "group": 1},
    "ragged": {"rows": 3, "group": 4, "pads": (0, 9, 4)},
    "multi-head": {"rows": 2, "kv_heads": 4, "group": 1, "dim": 32},
}
SINKS = torch.tensor([0.0, 7.0, 5.0, -2.0])  # strong enough to decide between the heads of a group
ATTENTIONS = {
    "softcap": AttendOptions(scale=0.5, softcap=1.5),
    "sinks": AttendOptions(scale=0.5, sinks=SINKS),
    "both": AttendOptions(scale=0.5, softcap=1.5, sinks=SINKS),
}


@pytest.fixture(params=[CPU, REFERENCE], ids=lambda backend: backend.name, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every test here runs on both backends."""
    use(monkeypatch, request.param)
    return request.param


def use(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr("refreshkv.cache.store.backend_for", lambda device: backend)


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


def slow_ours(
    tokens: Tokens,
    row: int,
    head: int,
    config: RefreshConfig,
    prompt: int,
    attention: AttendOptions,
) -> Iterator[tuple[list[int], Tensor]]:
    """As `slow_head`, for what the paper does not have; full steps by stride alone or by a drop."""
    pad = first_visible(tokens, row)
    budget = config.resolve_budget(prompt - pad)
    members = list(range(head * tokens.group, (head + 1) * tokens.group))

    def weights(now: int, over: list[int]) -> Tensor:
        queries, keys = tokens.queries[row, members, now], tokens.keys[row, head, over]
        return slow_weights(queries, keys, attention, members)

    def received(now: int, over: list[int]) -> Tensor:
        each = weights(now, over)
        return each.amax(0) if config.group_reduction == "max" else each.mean(0)

    def lse(now: int, over: list[int]) -> Tensor:
        queries, keys = tokens.queries[row, members, now], tokens.keys[row, head, over]
        return slow_logits(queries, keys, attention).logsumexp(-1)

    def best(scores: Tensor, anchors: list[int]) -> list[int]:
        """Of the places `pad` .. `pad + len(scores) - 1`."""
        end = pad + len(scores)
        shown = [True] * len(scores)
        order = slow_select(scores.tolist(), len(scores), config.pool_kernel, shown)
        newest = range(max(pad, end - min(config.recent, budget // 4)), end)
        kept = [pad + p for p in order if pad + p in anchors and pad + p not in newest]
        others = [pad + p for p in order if pad + p not in {*kept, *newest}]
        return [*others, *kept, *newest][-budget:]

    votes = torch.zeros(prompt - pad, dtype=torch.float64)
    for now in range(max(pad, prompt - config.window), prompt):
        votes[: now + 1 - pad] += received(now, list(range(pad, now + 1)))
    ring, anchors = best(votes, []), []
    count = int(budget * config.anchor + 1e-9)
    if count:
        anchors = ring[-count:]
    reference, since = lse(prompt - 1, list(range(pad, prompt))), 0
    for now in range(prompt, tokens.keys.shape[2]):
        since += 1
        ring = [*ring, now][-budget:]
        full = config.stride is not None and since % config.stride == 0
        if config.trigger == "lse-drop":
            full = full or bool((reference - lse(now, ring) > config.drop).any())
        over = list(range(pad, now + 1))
        output = (
            weights(now, over if full else ring)
            @ tokens.values[row, head, over if full else ring].double()
        )
        if full:
            ring, reference, since = best(received(now, over), anchors), lse(now, over), 0
        elif config.successor:
            scores = received(now, ring).tolist()
            ranked = sorted(zip(scores, ring, strict=True), reverse=True)
            attended = [place for _, place in ranked if place != now][: config.successor]
            missing = [place + 1 for place in attended if place + 1 not in ring]
            ring = [*ring, *missing][-budget:]
        yield sorted(ring), output


DEFINITIONS = (slow_head, slow_ours)


def check_against_slow(
    decoder: Decoder,
    config: RefreshConfig,
    prompt: int,
    steps: int,
    definition: Callable[..., Iterator[tuple[list[int], Tensor]]] = slow_head,
) -> None:
    tokens = decoder.tokens
    rows, heads = tokens.keys.shape[:2]
    taken = decoder.run(steps)
    for row, head in [(row, head) for row in range(rows) for head in range(heads)]:
        slow = definition(tokens, row, head, config, prompt, decoder.options)
        members = slice(head * tokens.group, (head + 1) * tokens.group)
        for step, (positions, output) in zip(taken, slow, strict=False):
            assert step.held[row][head] == positions
            equal(step.output[row, members], output.float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_equals_the_slow_method(name: str, shape: str) -> None:
    tokens, definition = random_tokens(**SHAPES[shape], length=33), DEFINITIONS[name in OPTIONS]
    check_against_slow(Decoder(tokens, ALL[name], 20), ALL[name], 20, 13, definition)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_what_is_held(name: str) -> None:
    """Or the comparison above could not fail."""
    tokens, options = random_tokens(length=60), OPTIONS[name]
    plain = replace(FIXED if options.threshold is None else NEVER, budget=options.budget)
    ours, theirs = (Decoder(tokens, config, 20).run(40) for config in (options, plain))
    changed = any(our.held != their.held for our, their in zip(ours, theirs, strict=True))
    assert changed or options.budget == 1  # a ring of one slot holds the newest token


@pytest.mark.parametrize(
    "config", [NEVER, FIXED, EVERY_OPTION], ids=["never", "fixed", "every option"]
)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_softcap_and_sinks_count_in_attention_and_selection(
    name: str, config: RefreshConfig
) -> None:
    tokens = random_tokens(rows=2, pads=(0, 3), length=33)
    attention = ATTENTIONS[name]
    definition = DEFINITIONS[config == EVERY_OPTION]
    decoder = Decoder(tokens, config, 20, options=attention)
    check_against_slow(decoder, config, 20, 9, definition)
    plain = Decoder(tokens, config, 20, options=AttendOptions(scale=0.5)).step()
    capped = Decoder(tokens, config, 20, options=attention).step()
    assert plain.held != capped.held  # or the comparison above could not fail
    assert float((plain.output - capped.output).abs().max()) > 0.01


def test_a_window_of_32_votes_on_the_first_selection() -> None:
    """The third row is shorter than the window."""
    config = replace(NEVER, budget=12, window=32)
    tokens = random_tokens(rows=3, pads=(0, 9, 30), length=58)
    check_against_slow(Decoder(tokens, config, 50), config, 50, 8, slow_ours)


triggers = st.one_of(
    st.just({"stride": None}),
    st.fixed_dictionaries({"stride": st.integers(1, 6), "threshold": st.none()}),
    st.fixed_dictionaries(
        {
            "trigger": st.just("lse-drop"),
            "drop": st.sampled_from([0.25, 1.0, 2.0]),
            "stride": st.none() | st.integers(1, 6),
        }
    ),
)
ours = st.builds(
    lambda by, **settings: RefreshConfig(**settings, **by),
    by=triggers,
    budget=st.integers(1, 14),
    pool_kernel=st.sampled_from([1, 3, 7]),
    recent=st.integers(0, 8),
    successor=st.integers(0, 4),
    window=st.integers(1, 20),
    anchor=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)


@settings(PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=ours, prompt=st.integers(10, 18), pad=st.integers(0, 9), seed=st.integers(0, 99))
def test_what_every_ring_holds_under_any_options(
    config: RefreshConfig, prompt: int, pad: int, seed: int
) -> None:
    pads = (0, pad)
    tokens = random_tokens(rows=2, pads=pads, length=30, dim=8, seed=seed)
    decoder = Decoder(tokens, config, prompt)
    cache = decoder.cache
    for now in range(prompt, 30):
        decoder.step()
        assert cache.ring is not None
        counts = torch.stack([cache.ring.used, cache.ring.steps], -1).tolist()
        for row, head in [(row, head) for row in range(2) for head in range(2)]:
            positions, (used, since) = cache.ring.positions[row, head], counts[row][head]
            slots = (positions != FREE).nonzero()[:, 0]
            entries = positions[slots]
            # No token twice, no padding, as many as fit; the newest always; copies of the store.
            assert len(set(entries.tolist())) == len(entries) == used
            assert used == min(config.budget, now + 1 - pads[row])
            assert pads[row] <= int(entries.min()) and int(entries.max()) <= now
            assert torch.equal(
                cache.ring.keys[row, head, slots], cache.store.dense()[0][row, head, entries]
            )
            assert torch.equal(
                cache.ring.values[row, head, slots], cache.store.dense()[1][row, head, entries]
            )
            if since == 0:  # just refreshed: by rule the newest, then the anchors
                recent = min(config.recent, config.budget // 4)
                newest = list(range(now, max(now - recent, pads[row] - 1), -1))
                assert set(newest) <= set(entries.tolist())
                anchors = [] if cache.anchors is None else cache.anchors[row, head].tolist()
                ruled, held = {*newest, *anchors} - {FREE}, set(entries.tolist())
                assert ruled <= held if len(ruled) <= config.budget else held <= ruled
            elif config.successor < config.budget:
                assert now in entries


def test_successors_replace_the_lowest_scored() -> None:
    """Keys of their own axis each, so that a query names the token it attends to."""
    tokens = random_tokens(kv_heads=2, group=1, length=16, dim=16)
    tokens.keys[:] = torch.eye(16) * 4
    ahead = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]) / 4
    tokens.queries.zero_()
    tokens.queries[:, :, 9, :5] = ahead  # the selection: 4, 3, 2, 1, 0, lowest first
    tokens.queries[:, 0, 10, 2] = 9.0  # one head looks at token 2, which 3 follows: it is there
    tokens.queries[:, 1, 10, 0] = 9.0  # the other at token 0, which 1 follows: there too
    tokens.queries[:, 0, 11, 0], tokens.queries[:, 1, 11, 2] = 9.0, 9.0
    tokens.queries[:, 0, 12, 12] = 9.0  # at itself: the next best counts
    tokens.queries[:, 0, 12, 11] = 8.0  # ... which the new token follows
    tokens.queries[:, 1, 12, 3] = 9.0
    config = RefreshConfig(budget=5, stride=None, pool_kernel=1, successor=1)
    steps = Decoder(tokens, config, 10, options=AttendOptions(scale=1.0)).run(3)
    assert [step.held[0] for step in steps] == [
        [[0, 1, 2, 3, 10], [0, 1, 2, 3, 10]],  # 10 over 4
        [[0, 1, 2, 10, 11], [0, 1, 3, 10, 11]],  # 11 over 3, which comes back, over 2
        [[0, 1, 10, 11, 12], [3, 4, 10, 11, 12]],  # 12 over 2 and over 1, then 4 over 0
    ]


def test_successors_of_the_newest_and_of_the_one_before_do_not_exist() -> None:
    tokens = random_tokens(length=12)
    config = RefreshConfig(budget=2, stride=None, successor=8)
    for step, now in zip(Decoder(tokens, config, 4).run(8), range(4, 12), strict=True):
        for ring in step.held[0]:
            assert now in ring and len(set(ring)) == 2


@pytest.mark.parametrize(("budget", "anchor", "expected"), [(900, 0.13, 117), (10, 0.19, 1)])
def test_the_anchors_are_a_share_rounded_down(budget: int, anchor: float, expected: int) -> None:
    config = RefreshConfig(budget=budget, anchor=anchor)
    decoder = Decoder(random_tokens(length=1001, kv_heads=1, group=1, dim=4), config, 1000)
    decoder.step()
    assert decoder.cache.anchors is not None
    assert decoder.cache.anchors.shape == (1, 1, expected)


def test_the_anchors_of_a_row_are_a_share_of_its_own_budget() -> None:
    config = RefreshConfig(budget=0.5, anchor=0.5, stride=None)
    decoder = Decoder(random_tokens(rows=3, pads=(0, 8, 19)), config, 20)
    decoder.step()  # K of 20, 12 and 1 tokens: 10, 6 and 1
    assert decoder.cache.anchors is not None
    assert (decoder.cache.anchors != FREE).sum(-1).tolist() == [[5, 5], [3, 3], [0, 0]]


def test_anchors_outlast_a_crop_as_far_as_they_are_left() -> None:
    config = replace(FIXED, anchor=1.0, stride=2)
    decoder = Decoder(random_tokens(rows=2, pads=(0, 5)), config, 20)
    decoder.run(3)
    anchors = decoder.cache.anchors
    assert anchors is not None
    decoder.cache.crop(14)
    after = decoder.step()
    outputs_equal_full([after])
    assert anchors.ge(14).any() and anchors.lt(14).any()
    for row in range(2):
        for head in range(2):
            left = {place for place in anchors[row, head].tolist() if place < 14}
            assert left <= set(after.held[row][head])


def outputs_equal_full(steps: list[Step]) -> None:
    for step in steps:
        equal(step.output, step.full)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_a_budget_for_every_token_is_full_attention(name: str, shape: str) -> None:
    tokens = random_tokens(**SHAPES[shape], length=33)
    outputs_equal_full(Decoder(tokens, replace(ALL[name], budget=33), 20).run(13))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "config",
    [
        replace(FIXED, stride=1, budget=1),
        replace(FIXED, stride=1, threshold=1.0),
        replace(FIXED, stride=1, threshold=1.0, decide="head"),
        replace(EVERY_OPTION, stride=1),
        replace(EVERY_OPTION, **BY_STRIDE | {"stride": 1, "threshold": 1.0}),
        RefreshConfig(mode="full"),
    ],
    ids=[
        "stride 1",
        "threshold 1",
        "threshold 1 per head",
        "every option",
        "every option, threshold 1",
        "mode full",
    ],
)
def test_always_full_is_full_attention(config: RefreshConfig, shape: str) -> None:
    tokens = random_tokens(**SHAPES[shape], length=33)
    decoder = Decoder(tokens, config, 20)
    outputs_equal_full(decoder.run(13))
    assert decoder.cache.stats.full_share == decoder.cache.stats.kv_read_share == 1.0
    assert (decoder.cache.ring is None) is (config.mode == "full")
    assert decoder.cache.waiting is None


@pytest.mark.parametrize("name", ALL)
def test_a_batch_equals_its_rows_alone(name: str) -> None:
    pads = (0, 9, 4)
    tokens = random_tokens(rows=3, pads=pads, length=33)
    batch = Decoder(tokens, ALL[name], 20).run(13)
    for row, pad in enumerate(pads):
        for together, alone in zip(
            batch, Decoder(tokens.alone(row), ALL[name], 20 - pad).run(13), strict=True
        ):
            shifted = [[position + pad for position in head] for head in alone.held[0]]
            assert together.held[row] == shifted
            equal(together.output[row], alone.output[0])


@pytest.mark.parametrize("name", ["drift of a head", "every option"])
def test_the_backends_agree_on_outputs_and_positions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(rows=3, pads=(0, 9, 4), length=60, dim=64)
    config = replace(ALL[name], budget=0.25)
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
@pytest.mark.parametrize("name", ["share", "drift of a head", "every option"])
def test_rows_taken_in_mid_text_go_on_as_before(name: str, steps_before: int) -> None:
    tokens = random_tokens(rows=3, pads=(0, 9, 4), length=33)
    decoder, taken = Decoder(tokens, ALL[name], 20), Decoder(tokens, ALL[name], 20)
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
    ring = decoder.cache.ring
    decoder.cache.crop(21)
    assert decoder.cache.ring is ring


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
