"""One prefill for several methods: no method sees a difference, and nothing is left of prompts that are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import refreshkv
from refreshkv import demo
from refreshkv.evals import prefill
from refreshkv.evals.decoding import feed, generate
from refreshkv.evals.prefill import Prefills
from refreshkv.methods import METHODS
from refreshkv.stats import RowStats
from tests.evals.toy import Toy
from tests.hosts.prompts import greedy, left_padded, tokens

OWN = ("h2o", "cascading", "critiprefill")  # which look at all queries of the prompt
SHARED = [name for name in METHODS if name not in OWN]
RAGGED = [50, 37, 21]
NEW = 12


@pytest.fixture(scope="module")
def loaded() -> Any:
    return demo.load()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the passes that are made to be shared, from here on."""
    seen: list[int] = []
    original = Prefills._prefill

    def watched(self: Prefills, tokens: Any, mask: Any) -> Any:
        seen.append(tokens.shape[1])
        return original(self, tokens, mask)

    monkeypatch.setattr(Prefills, "_prefill", watched)
    return seen


def under(
    model: PreTrainedModel, name: str, inputs: Any, prefills: Prefills | None, **settings: Any
) -> tuple[Any, dict[str, Any], bool]:
    """Greedy tokens, statistics, and whether the prefill was shared."""
    settings = {"budget": 0.25, **settings}
    with refreshkv.attach(model, method=name, stats=RowStats(), **settings) as session:
        cache = None
        if prefills is not None:
            cache = prefills.cache_for(session, inputs["input_ids"], inputs["attention_mask"])
        out = greedy(model, inputs, new=NEW, past_key_values=cache)
        return out, session.stats.as_dict(), cache is not None


@pytest.mark.parametrize("lengths", [RAGGED, [50]], ids=["ragged", "one row"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt-oss"])
def test_every_method_after_every_other(
    models: Any, architecture: str, lengths: list[int], passes: list[int]
) -> None:
    """Twice around, so that each also follows the last, whatever that left in the cache."""
    model, inputs = models(architecture), left_padded(lengths)
    prefills = Prefills(model)
    alone = {name: under(model, name, inputs, None) for name in METHODS}
    for name in (*METHODS, *METHODS):
        out, stats, shared = under(model, name, inputs, prefills)
        assert torch.equal(out, alone[name][0]), name
        assert stats == alone[name][1], name
        # With sliding layers the lossless mode has a cache of another make.
        assert shared is (name in SHARED and (architecture == "llama" or name != "refreshkv"))
    assert passes == [lengths[0] - 1]


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33])
@pytest.mark.parametrize("length", [2, 3, 20, 50])
def test_the_queries_that_vote_are_those_of_the_whole_prompt(
    llama: PreTrainedModel, length: int, window: int
) -> None:
    inputs = left_padded([length, length - 1])
    for name in ("refreshkv", "refreshkv-paper"):
        settings = {"window": window, "budget": 6}
        expected = under(llama, name, inputs, None, **settings)
        found = under(llama, name, inputs, Prefills(llama), **settings)
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]
        assert found[2] is (window <= prefill._WINDOW)


def test_a_prompt_of_one_token_has_nothing_to_share(
    llama: PreTrainedModel, passes: list[int]
) -> None:
    inputs = left_padded([1])
    expected = under(llama, "refreshkv-paper", inputs, None)
    assert torch.equal(under(llama, "refreshkv-paper", inputs, Prefills(llama))[0], expected[0])
    assert passes == []


def test_other_prompts_are_another_pass(llama: PreTrainedModel, passes: list[int]) -> None:
    prefills = Prefills(llama)
    one, other = left_padded(RAGGED), left_padded(RAGGED, seed=1)
    padded = {**one, "attention_mask": one["attention_mask"].clone()}
    padded["attention_mask"][0, :3] = 0
    rows = {name: tensor[:2] for name, tensor in one.items()}
    for count, inputs in enumerate((one, other, one, padded, rows, left_padded([30])), 1):
        expected = under(llama, "refreshkv-paper", inputs, None)
        for _ in range(2):
            found = under(llama, "refreshkv-paper", inputs, prefills)
            assert torch.equal(found[0], expected[0])
            assert found[1] == expected[1]
        assert len(passes) == count


def test_the_old_prompts_are_let_go_before_the_new_ones_pass(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills = Prefills(llama)
    under(llama, "full", left_padded([30]), prefills)
    monkeypatch.setattr(prefills, "_prefill", lambda *_: pytest.fail(str(prefills._base)))
    with pytest.raises(pytest.fail.Exception, match="None"):
        under(llama, "full", left_padded([31]), prefills)


def test_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    inputs = {"input_ids": tokens(1, 20), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    before = set(vars(llama)), greedy(llama, inputs)
    under(llama, "refreshkv", inputs, Prefills(llama))
    assert set(vars(llama)) == before[0]
    assert torch.equal(greedy(llama, inputs), before[1])


@pytest.mark.parametrize("name", SHARED)
def test_texts_and_scores_of_an_evaluation(loaded: Any, name: str) -> None:
    model, tokenizer = loaded
    examples = list(Toy().examples(len, 0, 3))
    prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
    found: list[Any] = []
    for prefills in (None, Prefills(model)):
        with refreshkv.attach(model, method=name, budget=16, stats=RowStats()) as session:
            outputs = generate(model, tokenizer, session, prompts, [6] * 3, prefills=prefills)
            fed = []
            if session.config.mode != "exact":
                fed = feed(model, tokenizer, session, prompts, answers, prefills=prefills)
        found.append(([(o.tokens, o.stats) for o in outputs], fed))
    (free, fed), (free_shared, fed_shared) = found
    assert free_shared == free
    for one, other in zip(fed, fed_shared, strict=True):
        assert (other.right, other.text, other.stats) == (one.right, one.text, one.stats)
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
