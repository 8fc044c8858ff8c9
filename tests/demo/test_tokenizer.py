"""The demo tokenizer: exact round trips, left-to-right tokens, special tokens out of reach."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refreshkv.demo import tokenizer as tk
from refreshkv.demo.prompts import TASKS, make_prompt
from refreshkv.tasks.words import SYLLABLES

TOKENIZER = tk.build_tokenizer()
PIECES = [
    *tk.MARKERS,
    *SYLLABLES[:9],
    "42",
    "7",
    "\n",
    " ",
    tk.EOS,
    tk.PAD,
    "<reserved_0>",
    "é漢",
]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_round_trips(text: str) -> None:
    encoded = TOKENIZER(text).input_ids
    assert encoded[0] == TOKENIZER.bos_token_id
    assert not set(encoded[1:]) & set(TOKENIZER.all_special_ids)
    assert TOKENIZER.decode(encoded, skip_special_tokens=True) == text


def test_tokens_run_from_left_to_right() -> None:
    assert TOKENIZER.convert_ids_to_tokens(ids("banana12345")) == [
        "ba",
        "na",
        "na",
        "12",
        "34",
        "5",
    ]


def test_every_marker_syllable_and_number_is_one_token() -> None:
    for piece in (*tk.MARKERS, *SYLLABLES, *tk.NUMBERS):
        assert len(ids(piece)) == 1, piece


def test_vocabulary_has_no_holes() -> None:
    assert len(TOKENIZER) == tk.VOCAB_SIZE
    assert None not in TOKENIZER.convert_ids_to_tokens(list(range(tk.VOCAB_SIZE)))
    special = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id]
    assert special == [0, 1, 2]


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_tokenise_the_same_together_and_apart(task: str) -> None:
    # Training encodes context, requests and answers one by one.
    for seed in range(5):
        p = make_prompt(task, seed, 512)
        assert ids(p.prompt) + ids(p.answer) == ids(p.prompt + p.answer)


def test_saved_tokenizer_loads_with_auto_tokenizer(tmp_path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from experiments.recipe import SMOKE, llama_config

    tk.save_tokenizer(tmp_path)
    llama_config(SMOKE).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Context:\nbanana <eos> <bos> ü 漢字 12345\n"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    assert loaded.padding_side == "left"
