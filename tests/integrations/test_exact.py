"""`mode="exact"`: `generate` gives what it gives without us, however many drafts are refused.

Greedy text is compared token by token in float32, sampled text by its distribution.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria, WatermarkingConfig
from transformers.generation.configuration_utils import SynthIDTextWatermarkingConfig
from transformers.generation.streamers import BaseStreamer

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.integrations.transformers.support import exact_reason, rope_reason
from refreshkv.stats import RowStats

from ..conftest import build
from .prompts import PAD, greedy, left_padded, tokens
from .test_kv_sharing import sharing  # noqa: F401

RAGGED = left_padded([34, 21, 27])
ONE_ROW = {"input_ids": tokens(1, 30), "attention_mask": torch.ones(1, 30, dtype=torch.long)}
SMALL = RefreshConfig(mode="exact", budget=6, draft=5)  # nearly every draft is refused
LARGE = RefreshConfig(mode="exact", budget=1000, draft=5)  # every draft stands
OPTIONS = RefreshConfig(
    mode="exact", budget=8, draft=4, recent=4, successor=2, anchor=0.25, window=8
)
CONFIGS = {"options": OPTIONS, "large": LARGE}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> RefreshConfig:
    return CONFIGS[request.param]


def run(model: PreTrainedModel, inputs: dict[str, Any] = RAGGED, **options: Any) -> Any:
    """`generate`, greedy unless told otherwise."""
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 11, **options})


def same(
    model: PreTrainedModel,
    config: RefreshConfig,
    inputs: dict[str, Any] = RAGGED,
    **options: Any,
) -> refreshkv.Stats:
    """The same sequences with and without us; the statistics."""
    vanilla = run(model, inputs, **options)
    with warnings.catch_warnings(), refreshkv.attach(model, config) as session:
        warnings.filterwarnings("error", message="mode='exact'")
        assert torch.equal(run(model, inputs, **options), vanilla)
    assert session.stats.drafts.full > 0
    return session.stats


# -- the text


@pytest.mark.filterwarnings("ignore:.*no full-attention layer")
@pytest.mark.parametrize("rows", ["one row", "ragged"])
def test_every_architecture(model: PreTrainedModel, rows: str) -> None:
    inputs = ONE_ROW if rows == "one row" else RAGGED
    vanilla = run(model, inputs)
    for config in (OPTIONS, SMALL) if rows == "ragged" else (OPTIONS,):
        with refreshkv.attach(model, config) as session:
            assert torch.equal(run(model, inputs), vanilla)
        assert session.stats.drafts.full > 0


@pytest.mark.parametrize("draft", [1, 2, 8, 33])
def test_any_number_of_drafts(llama: PreTrainedModel, draft: int) -> None:
    refused = same(llama, RefreshConfig(mode="exact", budget=6, draft=draft), max_new_tokens=37)
    assert refused.acceptance < 0.2
    right = same(llama, RefreshConfig(mode="exact", budget=1000, draft=draft), max_new_tokens=37)
    assert right.acceptance == 1.0
    assert right.drafts.full == 3 * -(-36 // (draft + 1))


def test_drafts_that_end_where_the_model_is_unsure(llama: PreTrainedModel) -> None:
    sure, unsure = (
        same(llama, RefreshConfig(mode="exact", budget=1000, confidence=confidence)).drafts
        for confidence in (0.0, 0.3)
    )
    assert 0 < unsure.drafted < sure.drafted
    assert unsure.accepted == unsure.drafted


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_few_new_tokens(llama: PreTrainedModel, config: RefreshConfig, new: int) -> None:
    vanilla = run(llama, max_new_tokens=new)
    with refreshkv.attach(llama, config) as session:
        assert torch.equal(run(llama, max_new_tokens=new), vanilla)
    assert session.stats.drafts.yielded == 3 * (new - 1)


def test_a_prompt_of_one_token(llama: PreTrainedModel, config: RefreshConfig) -> None:
    same(llama, config, {"input_ids": tokens(1, 1)})


def test_a_text_to_the_last_learned_position(config: RefreshConfig) -> None:
    """Rows that draft ahead must not ask for positions that the model does not have."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 34 + 10, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    same(model, config)


# -- ends


def ends_for(model: PreTrainedModel, inputs: dict[str, Any], new: int) -> list[int]:
    """Tokens of the vanilla output at which rows end at different times, all but one of them."""
    text = run(model, inputs, max_new_tokens=new)[:, inputs["input_ids"].shape[1] :]
    return [int(text[0, 2]), int(text[1, 5])]


def lengths_of(text: Tensor, ends: list[int]) -> list[int]:
    """New tokens of each row, its end token included."""
    found = [[token in ends for token in row] for row in text.tolist()]
    return [row.index(True) + 1 if True in row else len(row) for row in found]


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


class Record(StoppingCriteria):
    """What a stopping criterion is shown; row i is done after `lengths[i]` new tokens."""

    def __init__(self, prompt: int, lengths: list[int] | None = None) -> None:
        self.prompt, self.lengths = prompt, lengths
        self.seen: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.clone())
        if scores is not None:
            assert len(scores) == input_ids.shape[1] - self.prompt
            self.scores.append(scores[-1])
        new = input_ids.shape[1] - self.prompt
        lengths = self.lengths or [10**9] * len(input_ids)
        return torch.tensor([new >= length for length in lengths])


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


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


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


# -- what `generate` takes


class Steer(LogitsProcessor):
    """A caller's own: every row of the batch prefers tokens of its own."""

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


# -- caches


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


# -- what does not draft


def test_beams_run_as_full_attention(llama: PreTrainedModel) -> None:
    vanilla = run(llama, num_beams=3)
    message = "full attention: beam search does not draft"
    with refreshkv.attach(llama, SMALL) as session, pytest.warns(UserWarning, match=message):
        assert torch.equal(run(llama, num_beams=3), vanilla)
    assert session.stats.full_share == 1.0 and session.stats.acceptance is None


def test_prompt_lookup_runs_as_full_attention(llama: PreTrainedModel) -> None:
    inputs = {"input_ids": ONE_ROW["input_ids"] % 7 + 1}
    vanilla = run(llama, inputs, prompt_lookup_num_tokens=3)
    with refreshkv.attach(llama, SMALL), pytest.warns(UserWarning, match="does not draft"):
        assert torch.equal(run(llama, inputs, prompt_lookup_num_tokens=3), vanilla)


def test_a_draft_model(llama: PreTrainedModel) -> None:
    draft = build("llama", num_hidden_layers=1)
    vanilla = run(llama, ONE_ROW)
    with refreshkv.attach(llama, SMALL):
        assert torch.equal(run(llama, ONE_ROW, assistant_model=draft), vanilla)
    with refreshkv.attach(draft, SMALL):
        assert torch.equal(run(llama, ONE_ROW, assistant_model=draft), vanilla)


def test_a_loop_of_the_caller(llama: PreTrainedModel) -> None:
    called = []

    def loop(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        called.append(type(kwargs["past_key_values"]).__name__)
        return type(model)._sample(model, input_ids, **kwargs)

    vanilla = run(llama)
    with refreshkv.attach(llama, SMALL) as session:
        assert torch.equal(run(llama, custom_generate=loop), vanilla)
    assert called == ["RefreshCache"] and session.stats.full_share == 1.0


def test_shared_keys_run_as_full_attention(sharing: PreTrainedModel) -> None:  # noqa: F811
    vanilla = run(sharing)
    assert "another layer's keys" in exact_reason(sharing.config)
    with refreshkv.attach(sharing, SMALL), pytest.warns(UserWarning, match="full attention"):
        assert torch.equal(run(sharing), vanilla)


def test_a_stateful_watermark_runs_as_full_attention(llama: PreTrainedModel) -> None:
    options = {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3),
        "do_sample": True,
    }
    torch.manual_seed(0)
    vanilla = run(llama, **options)
    torch.manual_seed(0)
    with refreshkv.attach(llama, SMALL), pytest.warns(UserWarning, match="SynthID"):
        assert torch.equal(run(llama, **options), vanilla)


ROPES: dict[str, tuple[dict[str, Any], int, int, bool]] = {
    "plain": ({"rope_type": "default"}, 30, 900, False),
    "dynamic, short": ({"rope_type": "dynamic", "factor": 2.0}, 30, 40, False),
    "dynamic, long": ({"rope_type": "dynamic", "factor": 2.0}, 30, 900, True),
}


@pytest.mark.parametrize("parameters, first, last, changes", ROPES.values(), ids=ROPES)
def test_rope_that_changes_with_the_length(
    parameters: dict[str, Any], first: int, last: int, changes: bool
) -> None:
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **parameters})
    assert (rope_reason(model.config, first, last) is not None) == changes


@pytest.mark.parametrize("border, drafts", [(20, True), (34, False), (38, False), (100, True)])
def test_a_long_rope(border: int, drafts: bool) -> None:
    """Before its border and beyond it there are drafts; a text that crosses it would not be the same."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": border,
        "factor": 4.0,
    }
    model = build("llama", rope_parameters=rope)
    if drafts:
        same(model, OPTIONS)
        return
    vanilla = run(model)
    with refreshkv.attach(model, OPTIONS), pytest.warns(UserWarning, match="RoPE changes at"):
        assert torch.equal(run(model), vanilla)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attentions": (
        {"output_attentions": True, "return_dict_in_generate": True},
        "no output_attentions",
    ),
    "hidden states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "no output_hidden_states",
    ),
    "guidance": ({"guidance_scale": 1.5}, "no classifier-free guidance"),
    "processes": ({"synced_gpus": True}, "cannot keep processes in step"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_given_is_refused_in_one_line(
    llama: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    with refreshkv.attach(llama, SMALL), pytest.raises(ValueError, match=message) as error:
        run(llama, **options)
    assert "\n" not in str(error.value) and "mode='full'" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 2, "num_beam_groups": 2}],
    ids=["contrastive", "groups"],
)
def test_code_of_the_hub_is_refused(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    with refreshkv.attach(llama, SMALL), pytest.raises(ValueError, match=r"hub|trust_remote_code"):
        run(llama, **options)


def test_a_cache_of_other_settings_goes_its_own_way(llama: PreTrainedModel) -> None:
    """The cache's own settings count, here those of the method without verification."""
    other = RefreshConfig(mode="refresh", budget=6, stride=None)
    with refreshkv.attach(llama, other) as session:
        expected = run(llama)
    with warnings.catch_warnings(), refreshkv.attach(llama, SMALL):
        warnings.simplefilter("error")
        cache = refreshkv.RefreshCache(llama.config, other)
        assert torch.equal(run(llama, past_key_values=cache), expected)
    assert cache.stats.full_share == session.stats.full_share == 0


# -- sampling


def distribution(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> Tensor:
    """The probability of every text of `new` tokens after the prompt `[1, P]`, in the order of its digits."""
    texts, chances = ids, torch.ones(1, dtype=torch.double)
    vocab = model.config.vocab_size
    for _ in range(new):
        out = model.generate(
            texts,
            attention_mask=torch.ones_like(texts),
            do_sample=True,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        chances = (chances[:, None] * out.scores[0].double().softmax(-1)).flatten()
        token = torch.arange(vocab).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(vocab, 0), token], 1)
    return chances


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "warped": {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "penalty": {"top_k": 0, "temperature": 1.5, "repetition_penalty": 1.4},
}


@pytest.mark.parametrize(
    "name, confidence", [("plain", 0.0), ("warped", 0.0), ("penalty", 0.0), ("warped", 0.45)]
)
def test_sampled_text_has_the_distribution_of_full_attention(name: str, confidence: float) -> None:
    """Chi-square over all texts of two tokens; the seed is fixed, and a right loop fails at one of 10,000."""
    sizes = {"vocab_size": 7, "num_hidden_layers": 1, "num_key_value_heads": 1}
    model = build("llama", num_attention_heads=2, hidden_size=16, **sizes)
    ids, options = tokens(1, 20, vocab=7), SAMPLING[name]
    rows = 1500
    expected = distribution(model, ids, 2, **options) * rows
    config = RefreshConfig(mode="exact", budget=2, draft=3, pool_kernel=1, confidence=confidence)
    with refreshkv.attach(model, config) as session:
        torch.manual_seed(1)
        text = model.generate(
            ids, do_sample=True, max_new_tokens=4, num_return_sequences=rows, **options
        )
    assert 0.1 < session.stats.acceptance < 0.9
    observed = torch.bincount(text[:, 20] * 7 + text[:, 21], minlength=49).double()
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected)]
    cells = [cell[cells[1] > 0] for cell in cells]
    assert chisquare(*cells).pvalue > 1e-4


def test_several_return_sequences_of_a_ragged_batch(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    with refreshkv.attach(llama, config):
        texts = []
        for _ in range(2):
            torch.manual_seed(0)
            texts.append(run(llama, do_sample=True, num_return_sequences=2, eos_token_id=5))
        assert texts[0].shape[0] == 6 and torch.equal(*texts)
        assert torch.equal(texts[0][:, :34], RAGGED["input_ids"].repeat_interleave(2, 0))


def test_a_distribution_of_one_token_is_greedy(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    same(llama, config, do_sample=True, top_k=1)


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
def test_half_precision(architecture: str, dtype: torch.dtype) -> None:
    """The first token that differs, if one does, was a near tie of full attention's two best.

    A pass over several tokens rounds otherwise than one a token: at most 4e-2 (bfloat16) and 5e-3 (float16) of the
    logits' size.
    """
    model = build(architecture).to(dtype)
    options = {"output_logits": True, "return_dict_in_generate": True}
    vanilla = run(model, **options)
    with refreshkv.attach(model, OPTIONS):
        ours = run(model, **options)
    differ = ours.sequences != vanilla.sequences
    for row in range(3):
        if differ[row].any():
            logits = vanilla.logits[int(differ[row].int().argmax()) - 34][row].float()
            best = logits.topk(2).values
            bound = {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
            assert best[0] - best[1] < bound * logits.abs().max()


# -- statistics


def test_the_counts_add_up(llama: PreTrainedModel, config: RefreshConfig) -> None:
    stats = same(llama, config)
    counts = stats.drafts
    assert counts.yielded == 3 * 10 == counts.accepted + counts.full
    assert counts.all == counts.drafted + counts.full
    assert 0 <= counts.accepted <= counts.drafted
    assert stats.acceptance == counts.accepted / counts.drafted
    assert stats.tokens_per_full_pass == counts.yielded / counts.full
    assert stats.passes_per_token == counts.all / counts.yielded
    heads = llama.config.num_key_value_heads
    for layer in stats.layers.values():
        assert int(layer.steps) == counts.yielded * heads
        assert int(layer.full) == counts.full * heads
        # Full attention reads all visible tokens of the prompt and the n-th new one with n.
        assert int(layer.available) == heads * sum(
            prompt + n for prompt in (34, 21, 27) for n in range(1, 11)
        )
        assert int(layer.read) > 0


def test_what_is_read_where_every_draft_stands(llama: PreTrainedModel) -> None:
    """One row, a prompt of 30."""
    with refreshkv.attach(llama, RefreshConfig(mode="exact", budget=1.0)) as session:
        run(llama, ONE_ROW, max_new_tokens=2)
    # No room for a draft: one full pass over the prompt and its token.
    assert session.stats.kv_read_share == 1.0 and session.stats.drafts.drafted == 0
    with refreshkv.attach(llama, RefreshConfig(mode="exact", budget=1.0, draft=1)) as session:
        run(llama, ONE_ROW, max_new_tokens=3)
    # One draft over K = 30, and a full pass over 32; a second one over 32, if the draft was wrong.
    right = session.stats.drafts.accepted
    assert session.stats.kv_read_share == (30 + 32 + (0 if right else 32)) / (31 + 32)
    with refreshkv.attach(llama, LARGE) as session:
        run(llama, ONE_ROW, max_new_tokens=13)
    # Twelve tokens in two cycles: five drafts that read everything so far, and a full pass that reads as much as the
    # token after them would.
    assert session.stats.drafts.full == 2
    assert session.stats.kv_read_share == 1.0


def test_rows_add_up_and_an_ended_row_is_not_charged(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    options = {"eos_token_id": int(run(llama)[0, 34 + 2])}
    lengths = lengths_of(run(llama, **options)[:, 34:], [options["eos_token_id"]])
    assert lengths[0] == 3 < max(lengths)
    stats = RowStats()
    with refreshkv.attach(llama, config, stats=stats):
        run(llama, **options)
    rows = [stats.row(row) for row in range(3)]
    for name, count in vars(stats.drafts).items():
        assert sum(getattr(row.drafts, name) for row in rows) == count
    for index, layer in stats.layers.items():
        for name in ("full", "steps", "read", "available"):
            assert sum(int(getattr(row.layers[index], name)) for row in rows) == int(
                getattr(layer, name)
            )
    assert [row.drafts.yielded for row in rows] == [length - 1 for length in lengths]
    assert int(rows[0].layers[0].available) == 2 * (35 + 36)
