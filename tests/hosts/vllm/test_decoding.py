"""Decode rows of a layer give what the same request gives alone, through the store of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.kernels import reference
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.stats import COUNTS
from tests.helpers import Decoder, Tokens, random_tokens
from tests.hosts.vllm.fakes import Server

PROMPTS = [150, 70, 5]
STEPS = 70
# Requests and token counts: prompts in pieces between the steps of others, and decode rows that are not the first.
SCHEDULE: list[list[tuple[int, int]]] = [
    [(1, 70)],
    [(0, 100), (1, 1)],
    [(1, 1), (0, 49), (2, 5)],
    [(0, 1), (1, 1), (2, 1)],  # of the first this is the last token of its prompt
    *[[(2, 1), (0, 1)], [(0, 1), (1, 1), (2, 1)], [(1, 1)]] * 22,
]


def served(
    config: RefreshConfig, tokens: Tokens, **given: Any
) -> tuple[list[list[Tensor]], Server]:
    """The outputs of each request, step by step, and who served them."""
    server = Server(config, tokens, PROMPTS, **given)
    outputs: list[list[Tensor]] = [[] for _ in PROMPTS]
    for scheduled in SCHEDULE:
        for request, output in server.step(*scheduled, padding=1).items():
            outputs[request].append(output)
    return outputs, server


def alone(
    config: RefreshConfig, tokens: Tokens, counts: list[int], *, full: bool = False
) -> list[list[Tensor]]:
    """The outputs of each request for itself; `full`: under full attention."""
    found = []
    for request, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True)):
        steps = Decoder(tokens.alone(request), config, prompt).run(count)
        found.append([(step.full if full else step.output)[0] for step in steps])
    return found


def compare(ours: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for own, other in zip(ours, expected, strict=True):
        assert len(own) > 20
        torch.testing.assert_close(torch.stack(own), torch.stack(other), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Queries of one request stay alike, so that not every due step is full."""
    made = random_tokens(rows=3, length=240)
    drift = made.queries.cumsum(2) / 4 + 2 * made.queries[:, :, :1]
    return Tokens(drift, made.keys, made.values, None)


def lengths(outputs: list[list[Tensor]]) -> list[int]:
    return [len(own) for own in outputs]


REFRESH = {"mode": "refresh", "budget": 12, "stride": 4}
CONFIGS = {
    "full": {"mode": "full"},
    "mixed": {"mode": "mixed", "budget": 6},
    "no skip": {"mode": "mixed", "budget": 20, "skip": 0.0, "key_bits": 3},
    "fixed stride": {**REFRESH, "threshold": None},
    "never again": {**REFRESH, "stride": None},
    "layers ask": {**REFRESH, "threshold": 0.9},
    "heads ask": {**REFRESH, "threshold": 0.9, "decide": "head"},
    "every step asks": {**REFRESH, "stride": 1, "threshold": 0.95},
    "means": {**REFRESH, "threshold": None, "group_reduction": "mean", "pool_kernel": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("page, layout", [(64, "LBNHC"), (128, "BLHNC")])
def test_a_batch_equals_its_requests_alone(
    tokens: Tokens, name: str, page: int, layout: str
) -> None:
    config = RefreshConfig(**CONFIGS[name])
    ours, _ = served(config, tokens, page=page, layout=layout)
    compare(ours, alone(config, tokens, lengths(ours)))


def test_numbered_requests_are_served_alike(tokens: Tokens) -> None:
    config = RefreshConfig(**CONFIGS["layers ask"])
    for one, other in zip(
        served(config, tokens)[0], served(config, tokens, numbered=True)[0], strict=True
    ):
        assert torch.equal(torch.stack(one), torch.stack(other))


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_that_a_graph_replays(tokens: Tokens, name: str, numbered: bool) -> None:
    """Recorded once, over rows that are nobody's; what the rows of a step do is told in tensors alone."""
    config = RefreshConfig(**CONFIGS[name])
    plain, one = served(config, tokens)
    ours, server = served(config, tokens, graphs=(2, 4), numbered=numbered)
    compare(ours, plain)
    assert server.replayed == sum(all(n == 1 for _, n in step) for step in SCHEDULE) > 40
    # The last token of a prompt by itself is a row of the graph, which reads everything.
    more = dict(zip(COUNTS, (server.tally - one.tally).sum((0, 1)).tolist(), strict=True))
    expected = 150 * server.tally.shape[1]
    if config.mode == "mixed":
        assert 0 < more["read"] <= expected and more["full"] == 0
    else:
        assert more["read"] == expected and more["full"] == server.tally.shape[1]


@pytest.mark.parametrize("graphs", [(), (2, 4)])
@pytest.mark.parametrize("name", ["mixed", "heads ask"])
def test_rows_that_there_is_no_room_for_at_once(
    tokens: Tokens, name: str, graphs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other they give the same, and count the same."""
    config = RefreshConfig(**CONFIGS[name])
    plain, one = served(config, tokens, graphs=graphs)
    monkeypatch.setattr("refreshkv.hosts.vllm.decoding.SCRATCH", 1)
    ours, server = served(config, tokens, graphs=graphs)
    compare(ours, plain)
    assert torch.equal(server.tally.sum((0, 1)), one.tally.sum((0, 1)))


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "mixed", "budget": 240},
        {"mode": "refresh", "budget": 240, "stride": None},
        {"mode": "refresh", "budget": 8, "stride": 1, "threshold": None},
        {"mode": "refresh", "budget": 8, "stride": 1, "threshold": 1.0},
    ],
    ids=str,
)
def test_a_budget_of_everything_or_every_step_full_is_full_attention(
    tokens: Tokens, settings: Any
) -> None:
    config = RefreshConfig(**settings)
    ours, _ = served(config, tokens)
    compare(ours, alone(config, tokens, lengths(ours), full=True))


def test_a_threshold_that_no_query_falls_below(tokens: Tokens) -> None:
    """Every due row asks, and none is full: as if none were due."""
    asks = RefreshConfig(mode="refresh", budget=12, stride=1, threshold=-1.0)
    never = RefreshConfig(mode="refresh", budget=12, stride=None)
    ours, server = served(asks, tokens)
    compare(ours, served(never, tokens)[0])
    assert not server.tally[..., COUNTS.index("full")].any()


def test_softcap_and_sinks(tokens: Tokens) -> None:
    options = AttendOptions(scale=0.4, softcap=3.0, sinks=torch.tensor([1.0, -1.0, 0.5, 2.0]))
    for name in ("full", "mixed", "fixed stride"):
        config = RefreshConfig(**{**CONFIGS[name], **({} if name == "full" else {"budget": 240})})
        server = Server(config, tokens, PROMPTS, options=options)
        server.step((0, 150))
        output = server.step((0, 1))[0]
        entries = Entries(tokens.keys[:1, :, :151], tokens.values[:1, :, :151])
        expected = reference.attend(tokens.queries[:1, :, 150], entries, options).output[0]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_staggered_requests_are_full_at_unlike_times(tokens: Tokens) -> None:
    """All other steps are partial; which are full shows in what is read."""
    config = RefreshConfig(mode="refresh", budget=12, stride=4, threshold=None)
    server = Server(config, tokens, PROMPTS, stagger=True)
    server.step((0, 150), (1, 70))
    full = COUNTS.index("full")
    for step in range(1, 9):
        before = server.tally[..., full].sum(1)
        server.step((0, 1), (1, 1))
        due = (server.tally[..., full].sum(1) - before)[:2].bool().tolist()
        assert due == [(150 + step) % 4 == 0, (70 + step) % 4 == 0]


def test_what_is_counted(tokens: Tokens) -> None:
    mixed, full = (COUNTS.index(name) for name in ("rounded", "full"))
    read = COUNTS.index("read")
    server = Server(RefreshConfig(mode="full"), tokens, PROMPTS)
    server.step((0, 150), (1, 70))
    server.step((0, 1), (1, 1))
    assert server.tally[:2, :, read].tolist() == [[151, 151], [71, 71]]
    assert server.tally[:2, :, full].tolist() == [[1, 1], [1, 1]]
    server = Server(RefreshConfig(mode="mixed", budget=6), tokens, PROMPTS)
    server.step((0, 150))
    server.step((0, 1))
    newest = 151 - 128
    assert (server.tally[0, :, read] <= newest + 6).all() and (
        server.tally[0, :, read] >= newest
    ).all()
    assert (server.tally[0, :, mixed] > 0).all() and not server.tally[0, :, full].any()


@pytest.mark.parametrize("name", ["mixed", "layers ask"])
def test_pages_of_an_aborted_request_are_used_again(tokens: Tokens, name: str) -> None:
    """In the middle of its generation; nothing of its codes and selections is left."""
    config = RefreshConfig(**CONFIGS[name])
    server = Server(config, tokens, PROMPTS, slots=1)
    server.step((0, 150))
    for _ in range(40):
        server.step((0, 1))
    server.blocks[1] = server.blocks[0]
    server.step((1, 70))
    ours = [server.step((1, 1))[1] for _ in range(60)]
    compare([ours], alone(config, tokens, [0, 60, 0])[1:2])


def test_a_shared_prefix_brings_its_codes(tokens: Tokens) -> None:
    """The second request begins behind a page that the first one filled."""
    config = RefreshConfig(**CONFIGS["mixed"])
    keys, values = tokens.keys.clone(), tokens.values.clone()
    keys[1, :, :128], values[1, :, :128] = keys[0, :, :128], values[0, :, :128]
    both = Tokens(tokens.queries, keys, values, None)
    server = Server(config, both, [150, 140, 5])
    server.step((0, 150))
    server.blocks[1][:2], server.ends[1] = server.blocks[0][:2], 128
    server.step((0, 1), (1, 12))
    ours = [server.step((1, 1), (0, 1))[1] for _ in range(60)]
    steps = Decoder(both.alone(1), config, 140).run(60)
    compare([ours], [[step.output[0] for step in steps]])


def test_rejected_drafts_leave_no_codes(tokens: Tokens) -> None:
    """Wrong tokens complete a block; the right ones are written over them, and so are its codes."""
    config = RefreshConfig(**CONFIGS["mixed"])
    server = Server(config, tokens, PROMPTS)
    server.step((0, 188))
    right = server.tokens
    server.tokens = Tokens(right.queries, right.keys * -3, right.values * -3, None)
    server.step((0, 6))
    server.tokens, server.ends[0] = right, 190
    for wrong in range(188, 190):
        page, inside = server.blocks[0][wrong // 64], wrong % 64
        server.pages.keys[page, :, inside] = right.keys[0, :, wrong]
        server.pages.values[page, :, inside] = right.values[0, :, wrong]
    server.step((0, 4))
    ours = [server.step((0, 1))[0] for _ in range(30)]
    steps = Decoder(tokens.alone(0), config, 194).run(30)
    compare([ours], [[step.output[0] for step in steps]])


def test_a_lost_row_takes_its_share_anew(tokens: Tokens) -> None:
    """One row of state for two requests in turn: every step is lost, and K is that of its own row."""
    config = RefreshConfig(mode="refresh", budget=0.5, stride=None)
    server = Server(config, tokens, PROMPTS, slots=1)
    server.step((0, 150))
    server.step((1, 70))
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(25):
        for request in (0, 1):
            outputs[request].append(server.step((request, 1))[request])
            room = server.sorter._room
            assert room is not None
            assert room.tolist() == [config.resolve_budget(server.ends[request]), 0]
    compare(outputs, alone(config, tokens, [25, 25, 0], full=True)[:2])
