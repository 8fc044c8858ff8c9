"""Where rows end: end tokens, stopping criteria, streamers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MaxTimeCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

import refreshkv
from refreshkv import RefreshConfig

from .driver import LARGE, ONE_ROW, RAGGED, SMALL, Collect, Record, ends_for, lengths_of, run, same


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_end_tokens(
    models: Callable[[str], PreTrainedModel],
    config: RefreshConfig,
    architecture: str,
    several: bool,
) -> None:
    model = models(architecture)
    ends = ends_for(model, RAGGED, 11)[: 2 if several else 1]
    stats = same(model, config, eos_token_id=ends)
    lengths = lengths_of(run(model, eos_token_id=ends)[:, 34:], ends)
    assert len(set(lengths)) > 1  # rows end at different times
    assert stats.drafts.yielded == sum(lengths) - 3


def test_one_row_ends_inside_a_draft(llama: PreTrainedModel) -> None:
    end = int(run(llama, ONE_ROW)[0, 30 + 3])
    stats = same(llama, LARGE, ONE_ROW, eos_token_id=end)
    assert stats.drafts.full == 1 and stats.drafts.yielded == 3


def test_an_end_token_criterion_of_the_caller_counts(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    ends = ends_for(llama, RAGGED, 11)
    criteria = StoppingCriteriaList([EosTokenCriteria(ends)])
    same(llama, config, stopping_criteria=criteria)


def test_no_end_before_the_shortest_length(llama: PreTrainedModel, config: RefreshConfig) -> None:
    ends = ends_for(llama, RAGGED, 11)
    same(llama, config, eos_token_id=ends, min_new_tokens=6)


def test_stop_strings() -> None:
    from refreshkv import demo
    from refreshkv.demo.prompts import make_prompt

    model, tokenizer = demo.load()
    prompts = [make_prompt("html-to-tsv", seed=seed, length=256).prompt for seed in range(2)]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    whole = run(model, inputs, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
    options = {"max_new_tokens": 24, "tokenizer": tokenizer}
    text = tokenizer.decode(whole[0])
    stop = [text[len(text) // 2 :][:3]]
    for config in (SMALL, LARGE):
        stats = same(model, config, inputs, stop_strings=stop, **options)
        assert stats.drafts.yielded < 2 * 23


@pytest.mark.parametrize("eos", [False, True], ids=["no end token", "end tokens"])
@pytest.mark.parametrize("lengths", [None, [3, 8, 5]], ids=["never", "by row"])
def test_stopping_criteria_see_what_they_see_without_us(
    llama: PreTrainedModel, config: RefreshConfig, lengths: list[int] | None, eos: bool
) -> None:
    """Without an end token, transformers goes on with rows that are done until all are."""
    options: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True}
    if eos:
        options["eos_token_id"] = ends_for(llama, RAGGED, 11)[1]
    shown = []
    for attached in (False, True):
        record = Record(34, lengths)
        if attached:
            with refreshkv.attach(llama, config):
                out = run(llama, stopping_criteria=StoppingCriteriaList([record]), **options)
        else:
            out = run(llama, stopping_criteria=StoppingCriteriaList([record]), **options)
        shown.append((record, out))
    (vanilla, expected), (ours, found) = shown
    assert torch.equal(found.sequences, expected.sequences)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    assert len(ours.seen) == len(vanilla.seen) and len(ours.scores) == len(ours.seen)
    for one, other in zip(ours.seen, vanilla.seen, strict=True):
        assert torch.equal(one, other)


def test_max_time(llama: PreTrainedModel, config: RefreshConfig) -> None:
    """At once, and never."""
    same(llama, config, max_time=1000.0)
    with refreshkv.attach(llama, config):
        criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=-1.0)])
        assert run(llama, stopping_criteria=criteria).shape[1] == 34 + 1


@pytest.mark.parametrize("inputs", [ONE_ROW, RAGGED], ids=["one row", "ragged"])
def test_streamers_see_the_same_tokens(
    llama: PreTrainedModel, config: RefreshConfig, inputs: dict[str, Any]
) -> None:
    expected, found = Collect(), Collect()
    end = int(run(llama, inputs)[0, -4])
    run(llama, inputs, streamer=expected, eos_token_id=end)
    with refreshkv.attach(llama, config):
        run(llama, inputs, streamer=found, eos_token_id=end)
    assert found.seen == expected.seen and found.ended == expected.ended == 1
