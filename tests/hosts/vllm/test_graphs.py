"""Steps that a CUDA graph replays, by the Triton kernels: what a layer launches in them, and what comes out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import device  # isort: skip  # before any kernel
from refreshkv.config import RefreshConfig
from refreshkv.kernels.backend import triton_backend
from tests.helpers import Tokens, random_tokens
from tests.hosts.vllm.fakes import Row, Server, describe
from tests.kernels.launches import counting, run_triton

pytestmark = [
    pytest.mark.skipif(
        device().type == "cuda", reason="counted in the interpreter, over tensors of the CPU"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter, at log(0)
]


PROMPTS = [130, 70, 5]
# Of graphs for 2 and 4 rows: with and without padding, and between them a step with a prompt.
SCHEDULE = [
    [(0, 130), (1, 69)],
    [(0, 1), (1, 1)],  # of the second this is the last token of its prompt
    [(1, 1)],
    [(0, 1), (2, 5)],
    *[[(2, 1), (0, 1), (1, 1)], [(1, 1), (2, 1)]] * 4,
]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Tokens that complete a block on the way."""
    return random_tokens(rows=3, length=140, dim=16)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run the Triton kernels."""
    run_triton(monkeypatch)


REFRESH = {"mode": "refresh", "budget": 12, "stride": 3}


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "full"},
        {"mode": "mixed", "budget": 6},
        REFRESH | {"threshold": None},
        REFRESH | {"threshold": 0.9, "decide": "head"},
    ],
    ids=str,
)
def test_a_graph_of_triton_kernels(tokens: Tokens, settings: dict[str, Any]) -> None:
    config = RefreshConfig(**settings)
    plain = Server(config, tokens, PROMPTS, numbered=True)
    graph = Server(config, tokens, PROMPTS, numbered=True, graphs=(2, 4), slots=4)
    for scheduled in SCHEDULE:
        expected, found = plain.step(*scheduled), graph.step(*scheduled)
        assert expected.keys() == found.keys()
        for request, output in expected.items():
            torch.testing.assert_close(found[request], output, rtol=1e-4, atol=1e-5)
    assert graph.replayed == sum(all(n == 1 for _, n in step) for step in SCHEDULE)


def launched(**settings: Any) -> Counter[str]:
    """What the layer launches in a held step of two rows."""
    tokens = random_tokens(rows=2, length=140, dim=16)
    server = Server(RefreshConfig(**settings), tokens, [130, 70])
    server.step((0, 130), (1, 70))
    server.decoding.backend = triton_backend()
    rows = [
        Row(1, end + 1, blocks, request=row)
        for row, (end, blocks) in enumerate(zip(server.ends, server.blocks, strict=True))
    ]
    step = server.sorter.capture(describe(rows, server.page))
    query = tokens.queries[:, :, 130]
    with counting() as launches:
        server.decoding.learn(server.pages, step, query)
        server.decoding.attend(query, server.pages, step, server.tally[:2])
    return Counter(launches.names)


MIXED = Counter(["encode_kernel", "score_kernel", "count_kernel", "attend_kernel", "merge_kernel"])


def test_the_mixed_mode_is_five_launches() -> None:
    assert launched(mode="mixed", budget=8) == MIXED


def test_full_attention_is_two_and_what_it_counts() -> None:
    names = launched(mode="full")
    assert names["attend_kernel"] == names["merge_kernel"] == 1
    assert names.total() <= 5


@pytest.mark.parametrize("threshold, most", [(None, 10), (0.9, 18)])
def test_the_published_mode(threshold: float | None, most: int) -> None:
    """What the device decides is launched in any case, and leaves at once where it is not wanted."""
    names = launched(mode="refresh", budget=8, stride=4, threshold=threshold)
    once = "push_kernel", "score_kernel", "choose_kernel", "refresh_kernel"
    assert [names[name] for name in once] == [1] * 4
    assert names["attend_kernel"] == names["merge_kernel"] == 2  # partial, and over it full
    assert names["drift_kernel"] == (threshold is not None)
    assert names.total() <= most
