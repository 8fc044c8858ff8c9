"""Caches that outlive a call: turns, prefixes, loops of one's own, interruptions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList

import refreshkv
from refreshkv import RefreshConfig

from ..prompts import PAD, greedy, tokens
from .driver import ONE_ROW, OPTIONS, RAGGED, SMALL, Collect, Record, ends_for, run


def chat(model: PreTrainedModel, cache: Any, masked: bool, ends: list[int]) -> list[Tensor]:
    """Two turns; rows end at different times. `masked`: what follows an end is hidden."""
    first, out = RAGGED, []
    ids, mask = first["input_ids"], first["attention_mask"]
    for turn in range(2):
        text = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=ends,
        )
        out.append(text[:, ids.shape[1] :])
        seen = torch.ones_like(out[-1]) if not masked else (out[-1] != PAD).long()
        ids = torch.cat([text, tokens(3, 5, seed=turn + 7)], 1)
        mask = torch.cat([mask, seen, torch.ones(3, 5, dtype=torch.long)], 1)
    return out


@pytest.mark.filterwarnings("ignore:.*no full-attention layer")
@pytest.mark.parametrize("masked", [False, True], ids=["pads seen", "pads masked"])
def test_several_turns_on_one_cache(model: PreTrainedModel, masked: bool) -> None:
    ends = ends_for(model, RAGGED, 9)
    vanilla_cache = DynamicCache(config=model.config)
    vanilla = chat(model, vanilla_cache, masked, ends)
    with refreshkv.attach(model, OPTIONS) as session:
        cache = session.new_cache()
        ours = chat(model, cache, masked, ends)
        assert cache.get_seq_length() == vanilla_cache.get_seq_length()
    for one, other in zip(ours, vanilla, strict=True):
        assert torch.equal(one, other)
    assert session.stats.drafts.drafted > 0


def test_turns_of_rows_that_stopped_early(llama: PreTrainedModel, config: RefreshConfig) -> None:
    """A row that a criterion ends has run ahead; its cache must hold the padding that transformers puts there."""

    def two_turns(cache: Any) -> Tensor:
        record = StoppingCriteriaList([Record(34, [3, 9, 5])])
        out = run(llama, past_key_values=cache, stopping_criteria=record, eos_token_id=96)
        ids = torch.cat([out, tokens(3, 5, seed=7)], 1)
        mask = torch.nn.functional.pad(RAGGED["attention_mask"], (0, ids.shape[1] - 34), value=1)
        return run(llama, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)

    vanilla = two_turns(DynamicCache(config=llama.config))
    with refreshkv.attach(llama, config) as session:
        assert torch.equal(two_turns(session.new_cache()), vanilla)


def test_a_prefix_is_reused_by_copying_its_cache(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    prefix = ONE_ROW["input_ids"]
    questions = [torch.cat([prefix, tokens(1, 6, seed=seed)], 1) for seed in (1, 2)]
    vanilla = [greedy(llama, ids, 9) for ids in questions]
    with torch.no_grad(), refreshkv.attach(llama, config) as session:
        cache = session.new_cache()
        llama(prefix, past_key_values=cache)
        for ids, expected in zip(questions, vanilla, strict=True):
            assert torch.equal(
                greedy(llama, ids, 9, past_key_values=copy.deepcopy(cache)), expected
            )
        assert cache.get_seq_length() == 30
    assert session.stats.drafts.drafted > 0


def test_only_the_new_tokens_of_a_turn(llama: PreTrainedModel, config: RefreshConfig) -> None:
    """`input_ids` may leave out what the cache holds, if the mask does not."""
    more = {"input_ids": tokens(3, 6, seed=4)}
    mask = torch.cat([RAGGED["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)

    def second_turn(cache: Any) -> Tensor:
        with torch.no_grad():
            llama(**RAGGED, past_key_values=cache)
        return run(llama, {**more, "attention_mask": mask}, past_key_values=cache)

    vanilla = second_turn(DynamicCache(config=llama.config))
    with refreshkv.attach(llama, config) as session:
        cache = session.new_cache()
        assert torch.equal(second_turn(cache), vanilla)
        assert cache.get_seq_length() == 34 + 6 + 10


@pytest.mark.filterwarnings("ignore:.*no full-attention layer")
def test_a_loop_of_ones_own_is_full_attention(model: PreTrainedModel) -> None:
    vanilla = run(model, ONE_ROW)[:, 30:]
    with torch.no_grad(), refreshkv.attach(model, SMALL) as session:
        cache, token, found = session.new_cache(), ONE_ROW["input_ids"], []
        for _ in range(11):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(token)
        assert torch.equal(torch.cat(found, 1), vanilla)
    assert session.stats.full_share in (1.0, None) and session.stats.drafts.full == 0


def test_a_loop_of_ones_own_after_generate(llama: PreTrainedModel, config: RefreshConfig) -> None:
    vanilla = run(llama, max_new_tokens=15)
    with torch.no_grad(), refreshkv.attach(llama, config) as session:
        cache = session.new_cache()
        text = run(llama, past_key_values=cache)
        for _ in range(4):
            ones = torch.ones(3, text.shape[1] - 34, dtype=torch.long)
            mask = torch.cat([RAGGED["attention_mask"], ones], 1)
            positions = mask.sum(1, keepdim=True) - 1
            token = llama(
                text[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits[:, -1:]
            text = torch.cat([text, token.argmax(-1)], 1)
    assert torch.equal(text, vanilla)


class Break(Collect):
    def put(self, value: Tensor) -> None:
        super().put(value)
        if len(self.seen) == 6:
            raise KeyboardInterrupt


def test_a_cache_survives_an_interruption(llama: PreTrainedModel, config: RefreshConfig) -> None:
    expected = run(llama)
    with refreshkv.attach(llama, config) as session:
        cache, streamer = session.new_cache(), Break()
        with pytest.raises(KeyboardInterrupt):
            run(llama, past_key_values=cache, streamer=streamer)
        assert 34 <= cache.get_seq_length() < 34 + 11
        cache.crop(33 - cache.get_seq_length())
        assert torch.equal(run(llama, past_key_values=cache), expected)
