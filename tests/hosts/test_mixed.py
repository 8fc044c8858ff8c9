"""Mixed mode through an unmodified `generate`: what must hold exactly, on every proven architecture."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig, Session
from refreshkv.policy.rounding import BLOCK
from refreshkv.stats import RowStats

from ..conftest import build
from ..helpers import relative_rms
from .prompts import NEW, greedy, left_padded, logits, refreshed, tokens
from .test_static import STATIC, compiled, counted

RAGGED = [140, 96, 70]
MIXED = RefreshConfig(mode="mixed", budget=6)
EVERYTHING = replace(MIXED, budget=1000)
FORMS: dict[str, dict[str, Any]] = {"growing": {}, "static": STATIC}


def served(model: PreTrainedModel) -> list[int]:
    """Layers with full attention."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        return [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    windows = getattr(model.config, "sliding_window", None)
    return [] if windows else list(range(model.config.num_hidden_layers))


@pytest.mark.parametrize("form", FORMS)
def test_a_budget_of_everything_is_full_attention(model: PreTrainedModel, form: str) -> None:
    inputs = left_padded(RAGGED)
    vanilla = logits(model, inputs, NEW)
    along = torch.cat([inputs["input_ids"], vanilla.argmax(-1).T], 1)
    with refreshkv.attach(model, EVERYTHING):
        assert torch.equal(greedy(model, inputs, **FORMS[form]), along[:, RAGGED[0] :])
        if form == "growing":
            # As in test_equalities: logits of size 10, sums in another order.
            torch.testing.assert_close(logits(model, inputs, NEW), vanilla, atol=2e-4, rtol=1e-4)


def test_full_attention_is_approached_by_bits_and_left_alone_in_windows(
    model: PreTrainedModel,
) -> None:
    ids = tokens(2, 140)
    vanilla = logits(model, ids, 4)
    along = torch.cat([ids, vanilla.argmax(-1).T], 1)
    errors = []
    for bits in (2, 6):
        config = replace(MIXED, budget=24, key_bits=bits, value_bits=bits, skip=0.0)
        with refreshkv.attach(model, config) as session:
            ours = logits(model, ids, 4, along)
        assert sorted(session.stats.layers) == served(model)
        assert torch.equal(ours[0], vanilla[0])  # the prefill is untouched
        errors.append(relative_rms(ours[1:], vanilla[1:]))
    if served(model):
        assert errors[1] < 0.06 and errors[0] > 3 * errors[1]
        assert session.stats.full_share == 0
    else:
        assert errors == [0, 0]


def test_a_batch_equals_its_rows_alone(model: PreTrainedModel) -> None:
    inputs = left_padded(RAGGED)
    with refreshkv.attach(model, MIXED):
        batch = logits(model, inputs, NEW)
        for row, length in enumerate(RAGGED):
            alone = logits(model, inputs["input_ids"][row : row + 1, -length:], NEW)
            assert torch.equal(alone.argmax(-1)[:, 0], batch.argmax(-1)[:, row]), f"row {row}"
            torch.testing.assert_close(alone[:, 0], batch[:, row], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [13, 64, 139])
def test_the_chunk_size_of_prefill_changes_nothing(llama: PreTrainedModel, chunk: int) -> None:
    inputs = tokens(2, 140)
    for form in FORMS.values():
        whole = refreshed(llama, inputs, MIXED, **form)
        assert torch.equal(refreshed(llama, inputs, MIXED, prefill_chunk_size=chunk, **form), whole)


def test_the_static_form_gives_the_tokens_and_counts_of_the_growing_one(
    model: PreTrainedModel,
) -> None:
    inputs = left_padded(RAGGED)
    grown, counts = counted(model, inputs, MIXED)
    static, static_counts = counted(model, inputs, MIXED, **STATIC)
    assert torch.equal(static, grown)
    assert static_counts == counts


def test_compiled_there_is_one_graph_for_all_steps_and_calls(llama: PreTrainedModel) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with refreshkv.attach(llama, MIXED):
        for seed in (0, 1):
            inputs = left_padded(RAGGED, seed)
            assert torch.equal(greedy(llama, inputs, **compiled()), greedy(llama, inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


class Plainly:
    """One text, token by token, through a fresh cache: what any other way to the same text must equal."""

    def __init__(self, model: PreTrainedModel, session: Session) -> None:
        self.model, self.cache = model, session.new_cache()

    def prompt(self, ids: Tensor) -> Tensor:
        """Logits `[V]` after it."""
        with torch.no_grad(), self.cache.prompt():
            return self.model(ids[None], past_key_values=self.cache).logits[0, -1]

    def decode(self, ids: Tensor) -> Tensor:
        """Logits `[n, V]`."""
        with torch.no_grad():
            steps = [self.model(one[None, None], past_key_values=self.cache) for one in ids]
        return torch.stack([step.logits[0, -1] for step in steps])


def check_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def new_logits(out: Any) -> Tensor:
    """`[rows, new, V]` of what `generate` returns."""
    return torch.stack(out.logits, 1)


DICT = {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_several_turns_on_one_cache(models: Any, name: str) -> None:
    model = models(name)
    first, more = tokens(1, 100), tokens(1, 45, seed=9)
    with refreshkv.attach(model, MIXED) as session:
        cache, options = session.new_cache(), {"max_new_tokens": 12, "do_sample": False, **DICT}
        options["past_key_values"] = cache
        out = model.generate(first, attention_mask=torch.ones_like(first), **options)
        ids = torch.cat([out.sequences, more], 1)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        plain = Plainly(model, session)
        plain.prompt(first[0])
        plain.decode(ids[0, 100:111])
        last = plain.prompt(ids[0, 111:])
        expected = torch.cat([last[None], plain.decode(again.sequences[0, ids.shape[1] : -1])])
    check_close(new_logits(again)[0], expected)


def test_a_cache_that_was_cropped_goes_on_as_if_nothing_had_been(llama: PreTrainedModel) -> None:
    ids, other = tokens(1, 130)[0], tokens(1, 70, seed=3)[0]
    with refreshkv.attach(llama, MIXED) as session:
        used, fresh = Plainly(llama, session), Plainly(llama, session)
        for run in (used, fresh):
            run.prompt(ids[:120])
        used.decode(other)
        used.cache.crop(120)
        check_close(used.decode(ids[120:]), fresh.decode(ids[120:]))


def test_a_copy_of_a_cache_goes_on_alone(llama: PreTrainedModel) -> None:
    ids, other = tokens(1, 130)[0], tokens(1, 70, seed=3)[0]
    with refreshkv.attach(llama, MIXED) as session:
        one, fresh = Plainly(llama, session), Plainly(llama, session)
        for run in (one, fresh):
            run.prompt(ids[:110])
            run.decode(ids[110:120])
        twin = copy.copy(one)
        twin.cache = copy.deepcopy(one.cache)
        twin.decode(other)
        expected = fresh.decode(ids[120:])
        check_close(one.decode(ids[120:]), expected)
        twin.cache.crop(120)
        check_close(twin.decode(ids[120:]), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_beam_is_its_text_decoded_plainly(llama: PreTrainedModel, form: str) -> None:
    ids = tokens(1, 125)
    beams = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True}
    with refreshkv.attach(llama, MIXED) as session:
        out = llama.generate(
            ids, max_new_tokens=NEW, do_sample=False, **beams, **DICT, **FORMS[form]
        )
        for text, score in zip(out.sequences, out.sequences_scores, strict=True):
            plain = Plainly(llama, session)
            last = plain.prompt(ids[0])
            every = torch.cat([last[None], plain.decode(text[125:-1])]).log_softmax(-1)
            chosen = every.gather(1, text[125:, None])
            torch.testing.assert_close(chosen.mean(), score, atol=1e-4, rtol=1e-4)


def test_several_return_sequences_are_their_texts_decoded_plainly(llama: PreTrainedModel) -> None:
    ids = tokens(2, 125)
    torch.manual_seed(1)
    with refreshkv.attach(llama, MIXED) as session:
        out = llama.generate(
            ids, max_new_tokens=NEW, do_sample=True, num_return_sequences=2, **DICT
        )
        assert len({tuple(text) for text in out.sequences.tolist()}) == 4
        for row, text in enumerate(out.sequences):
            plain = Plainly(llama, session)
            last = plain.prompt(ids[row // 2])
            expected = torch.cat([last[None], plain.decode(text[125:-1])])
            check_close(new_logits(out)[row], expected)


def test_beams_of_padded_rows_are_those_of_full_attention(model: PreTrainedModel) -> None:
    inputs, beams = left_padded(RAGGED[1:]), {"num_beams": 3, "num_return_sequences": 2}
    ours = refreshed(model, inputs, EVERYTHING, **beams)
    assert torch.equal(ours, greedy(model, inputs, **beams))


def test_what_is_read_is_counted_row_by_row(llama: PreTrainedModel) -> None:
    """With a budget of everything every entry is read, and the codes of the keys beside them."""
    inputs, stats = left_padded(RAGGED), RowStats()
    with refreshkv.attach(llama, EVERYTHING, stats=stats):
        greedy(llama, inputs, new=NEW)
    # Two KV heads of 8 dims in float32; codes of 2 bits for 32 dims, and 16 bits a dim.
    entry, block = 2 * 8 * 4, 64 * 32 * 2 // 8 + 8 * 2
    for row, length in enumerate(RAGGED):
        alone = stats.row(row)
        ends = range(length + 1, length + NEW)  # the first token comes from the prompt
        blocks = sum((end - 1) // BLOCK for end in ends)
        assert alone.kv_bytes_full == 3 * 2 * sum(ends) * entry
        assert alone.kv_bytes_read == 3 * 2 * (sum(ends) * entry + blocks * block)
    assert stats.kv_read_share is not None and stats.kv_read_share > 1


DRAFTS = RefreshConfig(mode="exact", drafter="mixed", budget=6, draft=5, confidence=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_drafts_by_codes_are_lossless(model: PreTrainedModel, form: str) -> None:
    """Rows keep different numbers of them; models with windows draft in the growing form alone."""
    inputs = left_padded(RAGGED)
    windows = getattr(model.config, "sliding_window", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if not windows else "ignore")
        found, counts = counted(model, inputs, DRAFTS, **FORMS[form])
    assert torch.equal(found, greedy(model, inputs))
    if served(model) and not (windows and form == "static"):
        assert counts["acceptance"] > 0
        assert form == "growing" or counts == counted(model, inputs, DRAFTS)[1]


def test_drafts_of_a_second_turn(llama: PreTrainedModel) -> None:
    first, more, turns = tokens(2, 100), tokens(2, 45, seed=9), []
    for attached in (True, False):
        with refreshkv.attach(llama, DRAFTS) if attached else nullcontext() as session:
            options = {"past_key_values": session.new_cache()} if attached else {}
            out = torch.cat([first, greedy(llama, first, 12, **options), more], 1)
            turns.append(greedy(llama, out, 12, **options))
    assert torch.equal(*turns)


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_as_it_was(llama: PreTrainedModel, form: str) -> None:
    inputs, before = left_padded(RAGGED), dict(vars(llama))
    vanilla = logits(llama, inputs, 4)
    refreshed(llama, inputs, MIXED, new=4, **FORMS[form])
    assert vars(llama) == before and llama.config._attn_implementation == "sdpa"
    assert torch.equal(logits(llama, inputs, 4), vanilla)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_every_ratio_of_heads(heads: int) -> None:
    """GQA of 8, 4 and 1."""
    model, inputs = build("llama", num_key_value_heads=heads), left_padded(RAGGED)
    vanilla = logits(model, inputs, 6)
    with refreshkv.attach(model, EVERYTHING):
        check_close(logits(model, inputs, 6), vanilla)
    batch = refreshed(model, inputs, MIXED)
    for row, length in enumerate(RAGGED):
        alone = refreshed(model, inputs["input_ids"][row : row + 1, -length:], MIXED)
        assert torch.equal(batch[row], alone[0])
