"""Drafts by codes, over prompts of more than a block: what the other files here show of drafts over a partial cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.stats import RowStats

from ...conftest import build
from ..prompts import left_padded, tokens
from .driver import Collect, Record, ends_for, lengths_of, run, same
from .test_sampling import SAMPLING, distribution

LONGEST = 140
INPUTS = left_padded([LONGEST, 96, 70])
REFUSED = RefreshConfig(
    mode="exact", drafter="mixed", budget=1, draft=5, key_bits=1, value_bits=1, skip=0.5
)
STANDS = replace(REFUSED, budget=1000)  # every entry is exact, and so every draft right
CONFIGS = {"refused": REFUSED, "stands": STANDS}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> RefreshConfig:
    return CONFIGS[request.param]


def test_some_drafts_are_refused_and_others_are_not(llama: PreTrainedModel) -> None:
    """Or the tests below would show little."""
    refused, stands = (same(llama, one, INPUTS) for one in (REFUSED, STANDS))
    assert 0 < refused.acceptance < 0.7
    assert stands.acceptance == 1.0


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
def test_end_tokens(models: Any, config: RefreshConfig, architecture: str) -> None:
    model = models(architecture)
    ends = ends_for(model, INPUTS, 11)
    stats = same(model, config, INPUTS, eos_token_id=ends)
    lengths = lengths_of(run(model, INPUTS, eos_token_id=ends)[:, LONGEST:], ends)
    assert len(set(lengths)) > 1  # rows end at different times
    assert stats.drafts.yielded == sum(lengths) - 3


def test_rows_that_a_criterion_ends_and_their_second_turn(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    """What a row drafted past its end is taken back, and the block it completed there is made again."""

    def two_turns(cache: Any) -> Tensor:
        criteria = StoppingCriteriaList([Record(LONGEST, [3, 70, 5])])
        options = {"past_key_values": cache, "stopping_criteria": criteria, "max_new_tokens": 70}
        out = run(llama, INPUTS, eos_token_id=96, **options)
        ids = torch.cat([out, tokens(3, 5, seed=7)], 1)
        new = ids.shape[1] - LONGEST
        mask = torch.nn.functional.pad(INPUTS["attention_mask"], (0, new), value=1)
        return run(llama, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)

    vanilla = two_turns(DynamicCache(config=llama.config))
    with refreshkv.attach(llama, config) as session:
        assert torch.equal(two_turns(session.new_cache()), vanilla)
    assert session.stats.drafts.drafted > 0


def test_a_cropped_cache(llama: PreTrainedModel, config: RefreshConfig) -> None:
    expected = run(llama, INPUTS)
    with refreshkv.attach(llama, config) as session:
        cache = session.new_cache()
        run(llama, INPUTS, past_key_values=cache, max_new_tokens=60)
        cache.crop(LONGEST - 1)
        assert torch.equal(run(llama, INPUTS, past_key_values=cache), expected)


def test_streamers_see_the_same_tokens(llama: PreTrainedModel, config: RefreshConfig) -> None:
    expected, found = Collect(), Collect()
    end = int(run(llama, INPUTS)[0, -4])
    run(llama, INPUTS, streamer=expected, eos_token_id=end)
    with refreshkv.attach(llama, config):
        run(llama, INPUTS, streamer=found, eos_token_id=end)
    assert found.seen == expected.seen and found.ended == expected.ended == 1


@pytest.mark.parametrize("name", SAMPLING)
def test_sampled_text_has_the_distribution_of_full_attention(name: str) -> None:
    """As in `test_sampling`, whose seed and bound these are."""
    sizes = {"vocab_size": 7, "num_hidden_layers": 1, "num_key_value_heads": 1}
    model = build("llama", num_attention_heads=2, hidden_size=16, **sizes)
    ids, options, rows = tokens(1, 80, vocab=7), SAMPLING[name], 1000
    expected = distribution(model, ids, 2, **options) * rows
    with refreshkv.attach(model, replace(REFUSED, draft=3)) as session:
        torch.manual_seed(1)
        text = model.generate(
            ids, do_sample=True, max_new_tokens=4, num_return_sequences=rows, **options
        )
    assert 0.1 < session.stats.acceptance < 1.0
    observed = torch.bincount(text[:, 80] * 7 + text[:, 81], minlength=49).double()
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected)]
    cells = [cell[cells[1] > 0] for cell in cells]
    assert chisquare(*cells).pvalue > 1e-4


def test_rows_add_up_and_an_ended_row_is_not_charged(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    options = {"eos_token_id": int(run(llama, INPUTS)[0, LONGEST + 2])}
    lengths = lengths_of(run(llama, INPUTS, **options)[:, LONGEST:], [options["eos_token_id"]])
    assert lengths[0] == 3 < max(lengths)
    stats = RowStats()
    with refreshkv.attach(llama, config, stats=stats):
        run(llama, INPUTS, **options)
    rows = [stats.row(row) for row in range(3)]
    assert [row.drafts.yielded for row in rows] == [length - 1 for length in lengths]
    for index, layer in stats.layers.items():
        assert all(int(row.layers[index].rounded) > 0 for row in rows)
        for name in ("full", "steps", "read", "rounded", "available"):
            parts = [int(getattr(row.layers[index], name)) for row in rows]
            assert sum(parts) == int(getattr(layer, name))
