"""A batch under a method: every row as if it were alone, free or fed, and counted for its own steps only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import refreshkv
from refreshkv import Session, demo
from refreshkv.evals.decoding import feed, generate
from refreshkv.evals.encoding import answer_tokens, lines_right
from refreshkv.stats import RowStats
from refreshkv.tasks import make_task

LENGTHS = (128, 200, 150)  # of the prompts: ragged
CAPS = [9, 14, 11]
METHODS = ["full", "refreshkv-paper", "snapkv-1"]


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return demo.load()


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Iterator[PreTrainedModel]:
    before = loaded[0].generation_config.to_dict()
    yield loaded[0]
    loaded[0].generation_config.update(**before)


@pytest.fixture(scope="module")
def tokenizer(loaded: tuple[Any, Any]) -> PreTrainedTokenizerBase:
    return loaded[1]


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Prompts and gold answers; the answers are ragged too."""
    found = []
    for keys, length in enumerate(LENGTHS, 1):
        task = make_task("key-value", length=length, keys=keys)
        (example,) = task.examples(lambda text: len(answer_tokens(tokenizer, text)), 0, 1)
        assert example.answer is not None
        found.append((example.prompt, example.answer))
    return found


def attached(model: PreTrainedModel, method: str) -> Session:
    return refreshkv.attach(model, method=method, stats=RowStats())


@pytest.mark.parametrize("method", METHODS)
def test_free_rows_are_as_if_alone(
    method: str, model: PreTrainedModel, tokenizer: Any, examples: list[tuple[str, str]]
) -> None:
    prompts = [prompt for prompt, _ in examples]
    with attached(model, method) as session:
        together = generate(model, tokenizer, session, prompts, CAPS)
        for i, output in enumerate(together):
            (alone,) = generate(model, tokenizer, session, [prompts[i]], [CAPS[i]])
            assert alone.tokens == output.tokens
            assert alone.stats == output.stats
            assert alone.prompt_tokens == output.prompt_tokens
    assert [output.prompt_tokens for output in together] == [
        len(tokenizer(prompt)["input_ids"]) for prompt in prompts
    ]
    for output, cap in zip(together, CAPS, strict=True):
        assert output.output_tokens == len(output.tokens) + output.ended <= cap
        assert all(
            layer["steps"] == output.output_tokens - 1 for layer in output.stats["layers"].values()
        )


def test_the_lossless_mode_says_what_full_attention_says(
    model: PreTrainedModel, tokenizer: Any, examples: list[tuple[str, str]]
) -> None:
    prompts = [prompt for prompt, _ in examples]
    with attached(model, "full") as session:
        expected = generate(model, tokenizer, session, prompts, CAPS)
    with attached(model, "refreshkv") as session:
        together = generate(model, tokenizer, session, prompts, CAPS)
        assert [output.tokens for output in together] == [output.tokens for output in expected]
        # A row counts what it drafts up to the cap of its batch, which is its own where all are the same.
        even = generate(model, tokenizer, session, prompts, [12] * 3)
        for prompt, output in zip(prompts, even, strict=True):
            (alone,) = generate(model, tokenizer, session, [prompt], [12])
            assert alone.stats == output.stats
            assert output.stats["tokens_per_full_pass"] >= 1
            for layer in output.stats["layers"].values():
                assert layer["steps"] == output.output_tokens - 1


def test_the_lossless_mode_takes_no_answer(model: PreTrainedModel, tokenizer: Any) -> None:
    with attached(model, "refreshkv") as session, pytest.raises(ValueError, match="generate free"):
        feed(model, tokenizer, session, ["a"], ["b"])


@pytest.mark.parametrize("method", METHODS)
def test_fed_rows_are_as_if_alone(
    method: str, model: PreTrainedModel, tokenizer: Any, examples: list[tuple[str, str]]
) -> None:
    prompts, answers = map(list, zip(*examples, strict=True))
    with attached(model, method) as session:
        together = feed(model, tokenizer, session, prompts, answers)
        for i, fed in enumerate(together):
            (alone,) = feed(model, tokenizer, session, [prompts[i]], [answers[i]])
            assert alone.right == fed.right
            assert alone.text == fed.text
            assert alone.stats == fed.stats
            assert alone.logprobs == pytest.approx(fed.logprobs, abs=1e-4)
    counts = [len(answer_tokens(tokenizer, answer)) for answer in answers]
    assert len(set(counts)) == 3
    for fed, count in zip(together, counts, strict=True):
        assert fed.output_tokens == len(fed.right) == len(fed.logprobs) == count
        assert all(layer["steps"] == count - 1 for layer in fed.stats["layers"].values())


def test_fed_under_full_attention_is_one_dense_pass(
    model: PreTrainedModel, tokenizer: Any, examples: list[tuple[str, str]]
) -> None:
    prompts, answers = map(list, zip(*examples, strict=True))
    with attached(model, "full") as session:
        together = feed(model, tokenizer, session, prompts, answers)
    for prompt, answer, fed in zip(prompts, answers, together, strict=True):
        gold = answer_tokens(tokenizer, answer)
        tokens = torch.tensor([tokenizer(prompt)["input_ids"] + gold])
        with torch.no_grad():
            logits = model(tokens).logits[0, -len(gold) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(gold)[:, None])[:, 0]
        assert fed.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
        assert fed.right == [a == b for a, b in zip(logits.argmax(-1).tolist(), gold, strict=True)]
        assert fed.text == tokenizer.decode(logits.argmax(-1))


def test_feeding_a_free_output_takes_the_same_steps(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: list[tuple[str, str]],
) -> None:
    prompts = [prompt for prompt, _ in examples]
    with attached(model, "refreshkv-paper") as session:
        free = generate(model, tokenizer, session, prompts, [12] * 3)
        # The tokens themselves: a text need not be encoded as the model wrote it.
        fed = feed(model, tokenizer, session, prompts, [output.tokens for output in free])
    for a, b in zip(free, fed, strict=True):
        assert all(b.right)
        assert b.text == a.text
        if not a.ended:
            assert b.stats == a.stats


def test_an_end_stops_its_row_only(
    model: PreTrainedModel, tokenizer: Any, examples: list[tuple[str, str]]
) -> None:
    prompts = [prompt for prompt, _ in examples]
    model.generation_config.eos_token_id = None
    with attached(model, "refreshkv-paper") as session:
        endless = generate(model, tokenizer, session, prompts, CAPS)
        assert not any(output.ended for output in endless)
        end = endless[1].tokens[6]
        model.generation_config.eos_token_id = [end, 1]
        outputs = generate(model, tokenizer, session, prompts, CAPS)
    for before, after in zip(endless, outputs, strict=True):
        if end in before.tokens:
            at = before.tokens.index(end)
            assert after.ended
            assert after.tokens == before.tokens[:at]
            assert after.output_tokens == at + 1
            assert all(layer["steps"] == at for layer in after.stats["layers"].values())
        else:
            assert after.tokens == before.tokens
            assert not after.ended
    assert outputs[1].ended


def test_greedy_whatever_the_checkpoint_recommends(
    model: PreTrainedModel, tokenizer: Any, examples: list[tuple[str, str]]
) -> None:
    prompt = [examples[0][0]]
    with attached(model, "full") as session:
        (plain,) = generate(model, tokenizer, session, prompt, [8])
        model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0)
        (again,) = generate(model, tokenizer, session, prompt, [8])
    assert again.tokens == plain.tokens


def test_one_token_is_no_decode_step(
    model: PreTrainedModel, tokenizer: Any, examples: list[tuple[str, str]]
) -> None:
    with attached(model, "refreshkv-paper") as session:
        (free,) = generate(model, tokenizer, session, [examples[0][0]], [1])
        (fed,) = feed(model, tokenizer, session, [examples[0][0]], ["a"])
    for output in (free, fed):
        assert output.output_tokens == 1
        assert output.stats["full_share"] is None


def test_too_long(model: PreTrainedModel, tokenizer: Any) -> None:
    prompt = "a-" * 4096
    room = model.config.max_position_embeddings - len(tokenizer(prompt)["input_ids"])
    message = r"^story 7: \d+ tokens of prompt and \d+ of output make \d+, but the model has 8192 positions; lower"
    with attached(model, "full") as session:
        with pytest.raises(ValueError, match=message):
            generate(
                model, tokenizer, session, ["a", prompt], [1, room + 1], names=["s", "story 7"]
            )
        with pytest.raises(ValueError, match=message):
            feed(model, tokenizer, session, [prompt], ["b" * (room + 9)], names=["story 7"])
        with pytest.raises(ValueError, match="story 7: the answer has no tokens"):
            feed(model, tokenizer, session, ["a"], [""], names=["story 7"])


def test_chat(model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with attached(model, "full") as session:
        with pytest.raises(ValueError, match="no chat template"):
            generate(model, tokenizer, session, ["a"], [2], chat=True)
        template = "<user>{{ messages[0].content }}<assistant>"
        monkeypatch.setattr(tokenizer, "chat_template", template)
        (output,) = generate(model, tokenizer, session, ["a"], [2], chat=True)
    wrapped = tokenizer("<user>a<assistant>", add_special_tokens=False)["input_ids"]
    assert output.prompt_tokens == len(wrapped)


class Pieces:
    """A tokenizer whose tokens are given."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert text == "".join(self.pieces)
        return {"input_ids": list(range(len(self.pieces)))}

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(self.pieces[i] for i in tokens)


@pytest.mark.parametrize(
    "pieces, wrong, expected",
    [
        (["ab", "c", "\n", "d", "\n"], 1, [False, True]),
        (["ab", "c", "\n", "d", "\n"], 2, [False, True]),  # a line break ends its own line
        (["ab", "c\n", "d"], 2, [True, False]),  # no line break at the end
        (["a", "\nb", "\n"], 1, [False, False]),  # a token over two lines
        (["a", "\n\n", "b\n"], 1, [False, False, True]),  # an empty line is a line
        (["a", "\nb\n\nc", "d\n"], 1, [False, False, False, False]),
        (["a", "", "b"], 1, [False]),  # part of a character decodes to nothing
    ],
)
def test_lines_right(pieces: list[str], wrong: int, expected: list[bool]) -> None:
    tokenizer, text = Pieces(*pieces), "".join(pieces)
    right = [i != wrong for i in range(len(pieces))]
    assert lines_right(tokenizer, text, right) == expected
    assert lines_right(tokenizer, text, [True] * len(pieces)) == [True] * len(expected)
    assert len(expected) == len(text.splitlines())
