"""What `generate` takes and returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import WatermarkingConfig

import refreshkv
from refreshkv import RefreshConfig

from ..prompts import PAD
from .driver import LARGE, ONE_ROW, OPTIONS, RAGGED, ends_for, run, same


class Steer(LogitsProcessor):
    """A caller's own, which says that it has no state: every row of the batch prefers tokens of its own."""

    stateless = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row in range(len(scores)):
            scores[row, (input_ids[row, -1] + row + 1) % scores.shape[1]] += 4.0
        return scores


CALLS: dict[str, dict[str, Any]] = {
    "chunked prefill": {"prefill_chunk_size": 16},
    "chunks and a last token": {"prefill_chunk_size": 33},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [7, 9], [11]]},
    "suppressed tokens": {"suppress_tokens": list(range(1, 40))},
    "a last token": {"forced_eos_token_id": 3},
    "a sequence bias": {"sequence_bias": [[[17], 4.0], [[23, 29], 6.0]]},
    "a watermark": {"watermarking_config": WatermarkingConfig()},
    "a logits processor": {"logits_processor": [Steer()]},
    "many at once": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
    "a generation config": {"generation_config": GenerationConfig(max_length=41, pad_token_id=PAD)},
    "no loop of the caller": {"custom_generate": None},
}


@pytest.mark.parametrize("name", CALLS)
def test_what_generate_takes(llama: PreTrainedModel, name: str) -> None:
    options = dict(CALLS[name])
    if "logits_processor" in options:
        options["logits_processor"] = LogitsProcessorList(options["logits_processor"])
    if "generation_config" in options:
        options["max_new_tokens"] = None
    same(llama, OPTIONS, **options)
    same(llama, LARGE, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_repetition_penalty": 1.3},
        {"encoder_no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [2 + row, 50 + row, 90]},
    ],
    ids=["penalty", "n-grams", "prefix"],
)
def test_processors_of_a_whole_batch(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    same(llama, OPTIONS, ONE_ROW, **options)
    vanilla = run(llama, **options)
    with refreshkv.attach(llama, OPTIONS), pytest.warns(UserWarning, match="all rows of the batch"):
        assert torch.equal(run(llama, **options), vanilla)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_embeddings_as_input(llama: PreTrainedModel, config: RefreshConfig) -> None:
    embeddings = llama.get_input_embeddings()(RAGGED["input_ids"])
    inputs = {"inputs_embeds": embeddings, "attention_mask": RAGGED["attention_mask"]}
    same(llama, config, inputs)
    same(llama, config, inputs, min_new_tokens=5, eos_token_id=3, repetition_penalty=1.2)
    vanilla = run(llama, inputs, return_dict_in_generate=True)
    with refreshkv.attach(llama, config):
        ours = run(llama, inputs, return_dict_in_generate=True)
    assert ours.past_key_values.get_seq_length() == vanilla.past_key_values.get_seq_length()


def test_embeddings_and_tokens_as_input(llama: PreTrainedModel, config: RefreshConfig) -> None:
    embeddings = llama.get_input_embeddings()(RAGGED["input_ids"])
    same(llama, config, {**RAGGED, "inputs_embeds": embeddings})


def test_positions_of_the_caller_count(llama: PreTrainedModel, config: RefreshConfig) -> None:
    positions = torch.arange(30)[None] * 2 + 5
    assert not torch.equal(run(llama, ONE_ROW), run(llama, {**ONE_ROW, "position_ids": positions}))
    same(llama, config, {**ONE_ROW, "position_ids": positions})


@pytest.mark.parametrize("eos", [False, True], ids=["to the end", "ended rows"])
def test_scores_and_logits(llama: PreTrainedModel, config: RefreshConfig, eos: bool) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.2, "return_dict_in_generate": True}
    if eos:
        options["eos_token_id"] = int(run(llama, repetition_penalty=1.2)[1, 34 + 4])
    options |= {"output_scores": True, "output_logits": True}
    vanilla = run(llama, **options)
    with refreshkv.attach(llama, config):
        ours = run(llama, **options)
    assert torch.equal(ours.sequences, vanilla.sequences)
    new = ours.sequences[:, 34:]
    assert len(ours.scores) == len(ours.logits) == new.shape[1]
    for name in ("scores", "logits"):
        for place, (one, other) in enumerate(
            zip(getattr(ours, name), getattr(vanilla, name), strict=True)
        ):
            going = (new[:, :place] != options.get("eos_token_id", -1)).all(1)
            torch.testing.assert_close(one[going], other[going], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*no full-attention layer")
def test_the_cache_that_is_returned(model: PreTrainedModel) -> None:
    options = {"return_dict_in_generate": True, "eos_token_id": ends_for(model, RAGGED, 11)}
    vanilla = run(model, **options).past_key_values
    with refreshkv.attach(model, LARGE):
        ours = run(model, **options).past_key_values
    assert ours.get_seq_length() == vanilla.get_seq_length()
    visible = torch.nn.functional.pad(
        RAGGED["attention_mask"], (0, ours.get_seq_length() - 34), value=1
    ).bool()
    for one, other in zip(ours.layers, vanilla.layers, strict=True):
        kept = other.keys.shape[2]  # a window keeps no more
        seen = visible[:, -kept:]
        for found, expected in ((one.keys, other.keys), (one.values, other.values)):
            found, expected = found[:, :, -kept:].mT, expected.mT
            torch.testing.assert_close(
                found.permute(0, 3, 1, 2)[seen],
                expected.permute(0, 3, 1, 2)[seen],
                atol=2e-4,
                rtol=1e-3,
            )
