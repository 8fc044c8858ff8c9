"""What the rows of a step do, by what vLLM tells of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refreshkv.config import RefreshConfig
from refreshkv.hosts.vllm.planner import Kind, Planner
from refreshkv.hosts.vllm.steps import Rows, Sorter, Where, place
from tests.hosts.vllm.fakes import CPU, Row, describe

MIXED = RefreshConfig(mode="mixed", budget=8)
REFRESH = RefreshConfig(mode="refresh", budget=8, stride=4, threshold=None)


def numbers(where: Where) -> list[int]:
    """The indices that an index means."""
    return torch.arange(1000)[where].tolist()


def sorter_of(config: RefreshConfig, planner: Planner | None = None, page: int = 64) -> Sorter:
    return Sorter(page, config, planner, rows=8, device=CPU)


def rows_of(rows: Rows | None) -> Rows:
    assert rows is not None
    return rows


def test_a_ragged_batch() -> None:
    """Decode rows stand anywhere; a prompt of one token is none of them, nor the last token of a prompt in chunks."""
    step = sorter_of(MIXED).sort(
        describe(
            [
                Row(5, 5, [3], prefilling=True),
                Row(1, 130, [1, 2, 9]),
                Row(1, 1, [4], prefilling=True),
                Row(1, 64, [5]),
                Row(1, 70, [6, 7], prefilling=True),
                Row(3, 90, [8, 10]),
            ],
            64,
        )
    )
    decodes, prompts = rows_of(step.decodes), rows_of(step.prompts)
    assert numbers(decodes.tokens) == [5, 7] and numbers(prompts.tokens) == [4, 6, 8, 11]
    assert decodes.ends.tolist() == [130, 64] and prompts.ends.tolist() == [5, 1, 70, 90]
    assert decodes.blocks.tolist() == [[1, 2, 9], [5, 0, 0]]
    assert prompts.blocks.tolist() == [[3, 0], [4, 0], [6, 7], [8, 10]]
    assert decodes.finished.tolist() == [
        2,
        0,
    ]  # the newest token is exact, and the block that it completes
    assert step.prompt_rows.tolist() == [0, 2, 4, 5]
    assert step.count == 2 and step.entries == 194 and step.begins
    assert decodes.budget.tolist() == [8, 8] and decodes.states is None


def test_a_step_without_decode_rows_and_one_without_prompts() -> None:
    sorter = sorter_of(MIXED)
    assert sorter.sort(describe([Row(7, 7, prefilling=True)], 64)).decodes is None
    step = sorter.sort(describe([Row(1, 7), Row(1, 9)], 64))
    assert step.prompts is None and step.prompt_rows.tolist() == []
    assert isinstance(rows_of(step.decodes).tokens, slice)


@pytest.mark.parametrize("request_", [None, 5])
def test_padding_rows_do_nothing(request_: int | None) -> None:
    """vLLM tells neither whether they are prompts nor a request of them."""
    planner = Planner(8, 4, asks=False, stagger=True)
    sorter = sorter_of(REFRESH, planner)
    sorter.sort(describe([Row(7, 7, prefilling=True, request=request_)], 64, padding=2))
    step = sorter.sort(describe([Row(1, 8, request=request_)], 64, padding=3))
    assert len(rows_of(step.decodes)) == 1 and step.prompts is None
    assert step.kinds is not None and step.kinds.tolist() == [Kind.FULL]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_a_share_of_the_context_is_taken_of_each_row(share: float) -> None:
    config = RefreshConfig(mode="mixed", budget=share)
    rows = [Row(1, end, [1] * 8) for end in range(1, 400)]
    step = sorter_of(config).sort(describe(rows, 64))
    expected = [config.resolve_budget(row.end) for row in rows]
    assert rows_of(step.decodes).budget.tolist() == expected


@pytest.mark.parametrize(
    "queries, end, begin, finish",
    [
        (1, 64, 0, 1),  # a decode step completes a block
        (64, 128, 1, 2),
        (200, 200, 0, 3),
        (5, 130, 1, 2),
        (2, 65, 0, 1),  # rejected drafts are written anew: of a block that was complete once
        (130, 195, 1, 3),
    ],
)
@pytest.mark.parametrize("page", [64, 128])
def test_fresh_blocks(queries: int, end: int, begin: int, finish: int, page: int) -> None:
    """Those that a token of the step lies in, and that are complete after it."""
    rows = [Row(1, 63, [9]), Row(queries, end, [1, 2, 3, 4]), Row(10, 60, [5])]
    fresh = sorter_of(MIXED, page=page).sort(describe(rows, page)).fresh
    assert fresh is not None
    assert fresh.begin.tolist() == [begin] and fresh.end.tolist() == [finish]
    assert fresh.most == finish - begin
    assert fresh.blocks[0].tolist() == [1, 2, 3, 4][: -(-end // page)]


def test_no_block_is_fresh_where_none_is_complete_or_none_is_rounded() -> None:
    assert sorter_of(MIXED).sort(describe([Row(1, 63), Row(1, 66, [1, 2])], 64)).fresh is None
    full = RefreshConfig(mode="full")
    assert sorter_of(full, page=16).sort(describe([Row(64, 64, [1] * 4)], 16)).fresh is None


def test_the_planner_knows_a_row_by_the_place_of_its_last_token() -> None:
    """Across a page, and after a draft of which a token was rejected: that is a doubt, and so a full step."""
    sorter = sorter_of(REFRESH, Planner(8, None, asks=False, stagger=True), page=4)
    sorter.sort(describe([Row(8, 8, [7, 3], prefilling=True)], 4))
    seen = []
    for row in (
        Row(1, 9, [7, 3, 5]),
        Row(1, 10, [7, 3, 5]),
        Row(3, 13, [7, 3, 5, 6]),
        Row(1, 12, [7, 3, 5]),
    ):
        step = sorter.sort(describe([row], 4))
        seen.append(None if step.kinds is None else step.kinds.tolist())
    assert seen == [[Kind.PARTIAL], [Kind.PARTIAL], [], [Kind.LOST]]


def test_place() -> None:
    assert place(np.array([3, 4, 5]), CPU) == slice(3, 6)
    assert numbers(place(np.array([3, 5]), CPU)) == [3, 5]
    assert numbers(place(np.array([], dtype=np.int64), CPU)) == []
