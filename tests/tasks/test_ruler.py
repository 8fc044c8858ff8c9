"""RULER's kinds: what is asked for stands in the prompt as often as it should, and the gold answer is right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from refreshkv import demo
from refreshkv.tasks import GROUPS, make_task, options_of
from refreshkv.tasks.ruler import TASKS
from refreshkv.tasks.ruler.haystack import hide, read_sentences
from refreshkv.tasks.ruler.needles import draw_key, needle
from refreshkv.tasks.ruler.questions import Person
from refreshkv.tasks.ruler.vocabulary import NOISE, sentence
from refreshkv.tasks.ruler.words import frequencies
from refreshkv.tasks.task import Example
from refreshkv.tasks.words import Endless

_TOKENIZER = demo.load()[1]
NEEDLES = {  # needles in the text (None: as many as fit), codes asked for, what a code is
    "ruler-niah-single-1": (1, 1, r"\d{7}"),
    "ruler-niah-single-2": (1, 1, r"\d{7}"),
    "ruler-niah-single-3": (1, 1, r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "ruler-niah-multikey-1": (4, 1, r"\d{7}"),
    "ruler-niah-multikey-2": (None, 1, r"\d{7}"),
    "ruler-niah-multikey-3": (None, 1, r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "ruler-niah-multivalue": (4, 4, r"\d{7}"),
    "ruler-niah-multiquery": (4, 4, r"\d{7}"),
}
NEEDLE = re.compile(r"The locker of (\S+) opens with (\S+?)\.(?=\s|\Z)")


def tokens(text: str) -> int:
    return len(_TOKENIZER(text, add_special_tokens=False).input_ids)


def words(text: str) -> int:
    return len(text.split())


def first(name: str, seed: int = 0, count=tokens, **options) -> Example:
    return next(make_task(name, **options).examples(count, seed, 1))


def lines_of(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_thirteen_kinds_are_registered_under_their_names() -> None:
    assert tuple(TASKS) == GROUPS["ruler"]
    for name, task in TASKS.items():
        assert task.name == name
        assert options_of(name)["length"] == 2048
        for word in ("Data: ", "Prompt: ", "Metric: ", "Source: RULER", "lm-evaluation-harness"):
            assert word in task.recipe


@pytest.mark.parametrize("name", TASKS)
def test_examples_depend_on_seed_and_number_only(name: str) -> None:
    task = make_task(name)
    made = list(task.examples(tokens, 3, 3))
    assert made == list(task.examples(tokens, 3, 3))
    assert made[:2] == list(task.examples(tokens, 3, 2))
    other = list(task.examples(tokens, 4, 3))
    assert len({example.prompt for example in [*made, *other]}) == 6
    assert [example.id for example in made] == ["0000", "0001", "0002"]


@pytest.mark.parametrize("count, length", [(tokens, 2048), (words, 900), (len, 6000)])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_the_length_and_never_exceed_it(name: str, count, length: int) -> None:
    task = make_task(name, length=length)
    for example in task.examples(count, 1, 2):
        assert 0.85 * length <= count(example.prompt) <= length
        assert example.max_new_tokens >= max(count(example.answer) * 1.2, 30)
        assert example.prompt.endswith(":\n")
        json.dumps(example.facts, allow_nan=False)


@pytest.mark.parametrize("name", TASKS)
def test_the_gold_answer_scores_one_and_nothing_scores_zero(name: str) -> None:
    task = make_task(name)
    for example in task.examples(tokens, 0, 3):
        score = task.score(example, example.answer)
        assert score.value == 1
        assert set(score.parts) == {1.0}
        assert task.score(example, f"I SAY {example.answer.upper()}!").value == 1
        for wrong in ("", "\n", "no idea", "1, 2, 3"):
            assert task.score(example, wrong).value == 0
            assert len(task.score(example, wrong).parts) == len(score.parts)


def test_parts_are_the_strings_in_the_order_asked_for() -> None:
    for name in ("ruler-niah-multiquery", "ruler-niah-multivalue", "ruler-vt", "ruler-cwe"):
        task, example = make_task(name), first(name)
        wanted = example.facts["expected"]
        assert ", ".join(wanted) == example.answer
        score = task.score(example, f"{wanted[2]} {wanted[0]}")
        assert score.parts == tuple(float(i in (0, 2)) for i in range(len(wanted)))
        assert score.value == 2 / len(wanted)


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_stand_in_the_prompt_once_and_answer_the_question(name: str) -> None:
    hidden, codes, code = NEEDLES[name]
    for seed in range(4):
        example = first(name, seed)
        text, asked = example.prompt.rsplit("\n\n", 1)
        found = NEEDLE.findall(text)
        assert len(found) == len(set(found)) == len({value for _, value in found})
        assert len(found) == hidden if hidden else len(found) > 15
        assert all(re.fullmatch(code, value) for _, value in found)
        assert all(text.count(needle(*pair)) == 1 for pair in found)
        names = re.findall(r"\w+(?:-\w+)+", asked)
        wanted = [value for name in names for key, value in found if key == name]
        assert example.facts["expected"] == wanted
        assert len(wanted) == codes
        assert len(set(names)) == (4 if name == "ruler-niah-multiquery" else 1)
        assert len(example.facts["depths"]) == codes


def test_what_the_kinds_hide_the_needles_in() -> None:
    noise = first("ruler-niah-single-1").prompt
    assert noise.count(NOISE) > 15
    text = first("ruler-niah-single-2").prompt.split("\n\n")[1]
    sentences = text.split(". ")
    assert len(set(sentences)) > 0.9 * len(sentences)
    assert NOISE not in text
    keys = first("ruler-niah-multikey-2").prompt.split("\n\n")[1].splitlines()
    assert all(NEEDLE.fullmatch(line) for line in keys)
    uuids = [key for key, _ in NEEDLE.findall(first("ruler-niah-multikey-3").prompt)]
    assert all(len(key) == 36 for key in uuids)


def test_depths_are_spread_over_the_whole_text() -> None:
    task = make_task("ruler-niah-single-2", length=400)
    depths = []
    for example in task.examples(words, 0, 200):
        text = example.prompt.split("\n\n")[1]
        place = text.index("The locker") / len(text)
        (depth,) = example.facts["depths"]
        assert abs(place - depth) < 0.12  # places are whole sentences
        depths.append(place)
    assert np.histogram(depths, bins=5, range=(0, 1))[0].min() > 20


def test_hidden_needles_keep_their_order_and_all_the_hay() -> None:
    hay = [str(i) for i in range(10)]
    assert hide(hay, ["a"], [0.0]) == ["a", *hay]
    assert hide(hay, ["a"], [0.999]) == [*hay, "a"]
    assert hide([], ["a", "b"], [0.1, 0.9]) == ["a", "b"]
    assert hide(hay, ["a", "b"], [0.5, 0.5]) == [*hay[:5], "a", "b", *hay[5:]]


def test_keys_stay_unique_when_the_pairs_are_used_up() -> None:
    rng, seen = np.random.default_rng(0), set()
    keys = [draw_key(rng, seen, "words") for _ in range(20_000)]
    assert len(set(keys)) == 20_000


def test_chains_have_their_hops_in_order() -> None:
    for seed in range(4):
        example = first("ruler-vt", seed)
        text = example.prompt.rsplit("The text that counts:\n", 1)[1]
        steps = re.findall(r"^Let (\w+) be (\w+)\.$", text, re.MULTILINE)
        value = re.search(r"Which variables are (\d{5}) in the end", text)[1]
        names = example.facts["expected"]
        assert len(steps) == len(names) == 5  # four hops
        assert steps == list(zip(names, [value, *names], strict=False))
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert text.count(NOISE) > 5
        shown = example.prompt.split("The text that counts:\n")[0]
        assert len(re.findall(r"^Let \w{3} be \w+\.$", shown, re.MULTILINE)) == 5
        assert value not in shown


@pytest.mark.parametrize(
    "count, length, times", [(tokens, 2048, (6, 1)), (words, 4096, (30, 3)), (tokens, 4096, (6, 1))]
)
def test_common_words_come_as_often_as_stated(count, length: int, times: tuple[int, int]) -> None:
    example = first("ruler-cwe", 0, count, length=length)
    lists = re.findall(r"^1\. .*$", example.prompt, re.MULTILINE)
    assert len(lists) == 2
    listed = re.findall(r"\d+\. (\w+)", lists[1])
    assert [int(n) for n in re.findall(r"(\d+)\. ", lists[1])] == [*range(1, len(listed) + 1)]
    often, seldom = times
    common = example.facts["expected"]
    frequency = Counter(listed)
    assert len(set(common)) == 10
    assert {frequency.pop(word) for word in common} == {often}
    assert set(frequency.values()) == {seldom}
    assert len(frequency) > 20
    assert common == list(dict.fromkeys(word for word in listed if word in common))
    assert not set(re.findall(r"[a-z]{6}", lists[0])) & set(listed)


def test_frequent_words_follow_the_stated_law() -> None:
    for seed in range(3):
        example = first("ruler-fwe", seed)
        text = example.prompt.split("\n\n")[1]
        ranks = Counter(text.split()).most_common()
        assert ranks[0][0] == "..."
        assert [word for word, _ in ranks[1:4]] == example.facts["expected"]
        assert ranks[1][1] > ranks[2][1] > ranks[3][1] > ranks[4][1]
        total = next(n for n in itertools.count(60) if frequencies(n, 1)[0] == ranks[0][1])
        # Two totals can give the first rank the same count; the others then differ by one at most.
        near = frequencies(total, len(ranks))
        assert all(abs(n - count) <= 1 for n, (_, count) in zip(near, ranks, strict=True))


@pytest.mark.parametrize("total", [60, 100, 1000, 12345])
def test_the_three_most_frequent_words_are_unique(total: int) -> None:
    first, second, third, fourth, fifth = frequencies(total, 5)
    assert first > second > third > fourth > fifth


@pytest.mark.parametrize("name, needed", [("ruler-qa-1", 1), ("ruler-qa-2", 2)])
def test_answers_stand_in_the_passages_that_the_question_leads_to(name: str, needed: int) -> None:
    for seed in range(8):
        example = first(name, seed)
        passages = re.findall(r"^Passage (\d+)\n(.+)$", example.prompt, re.MULTILINE)
        assert [int(n) for n, _ in passages] == [*range(1, len(passages) + 1)]
        asked = example.prompt.rsplit("Question: ", 1)[1]
        person = re.search(r"[A-Z]\w+ [A-Z]\w+", asked)[0]
        (about,) = [text for _, text in passages if text.startswith(person)]
        if needed == 1:
            assert example.answer in about
            continue
        assert example.answer not in about
        town = re.search(r"in the town of (\w+)\.", about)[1]
        (of_town,) = [text for _, text in passages if text.startswith(f"{town} is a town")]
        assert example.answer in of_town
        assert town not in asked


def test_a_two_hop_question_needs_both_passages() -> None:
    rng = np.random.default_rng(0)
    person = Person.draw(rng, set())
    question = person.ask(rng, 2)
    assert question.passages == person.passages()
    assert question.answers[0] not in question.passages[0]
    assert person.name not in question.passages[1]
    assert person.ask(rng, 1).passages == person.passages()[:1]


def questions(number: int) -> list[dict]:
    return [
        {
            "question": f"What is the colour of thing {i}?",
            "answers": [f"colour-{i}x", f"hue-{i}x"],
            "context": f"Thing {i} is colour-{i}x. " + "It stands there. " * 5,
        }
        for i in range(number)
    ]


def test_the_users_questions_are_asked_in_their_order(tmp_path: Path) -> None:
    data = lines_of(tmp_path / "qa.jsonl", questions(12))
    task = make_task("ruler-qa-1", data=data, length=120)
    made = list(task.examples(words, 0, None))
    assert len(made) == 12
    for i, example in enumerate(made):
        assert f"thing {i}?" in example.prompt
        assert example.prompt.count(f"Thing {i} is colour-{i}x.") == 1
        assert 100 <= words(example.prompt) <= 120
        assert example.answer == f"colour-{i}x"
        assert task.score(example, f"hue-{i}x").value == 1
        assert task.score(example, f"hue-{i}").value == 0
        assert task.score(example, example.answer).parts == (1.0,)
    assert made[:3] == list(task.examples(words, 0, 3))
    assert made[0].prompt != next(task.examples(words, 1, 1)).prompt
    whole = next(dataclasses.replace(task, length=10_000).examples(words, 0, 1)).prompt
    assert all(f"Thing {i} is" in whole for i in range(12))


def test_a_question_may_need_several_passages(tmp_path: Path) -> None:
    rows = questions(6)
    rows[0]["context"] = ["Ada lives in Rom.", "Rom has a tower."]
    rows[1]["context"] = "Ada lives in Rom."  # no second time beside the first question
    data = lines_of(tmp_path / "qa.jsonl", rows)
    prompt = first("ruler-qa-2", 0, words, data=data, length=1000).prompt
    assert prompt.count("Ada lives in Rom.") == prompt.count("Rom has a tower.") == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q", "answers": ["a"]}, "line 2 of .*: the field 'context' is missing"),
        ({"question": "q", "context": "c"}, "line 2 .*'answers' is missing"),
        ({"question": 1, "answers": ["a"], "context": "c"}, "line 2 .*'question'.*a number"),
        ({"question": "q", "answers": "a", "context": "c"}, "line 2 .*'answers' must be a list"),
        ({"question": "q", "answers": [], "context": "c"}, "line 2 .*'answers' must be a list"),
        ({"question": "q", "answers": [" "], "context": "c"}, "line 2 .*'answers'.*blank"),
        ({"question": "q", "answers": ["a"], "context": [1]}, "line 2 .*'context'.*a number"),
        ({"question": "q", "answers": ["a"], "context": None}, "line 2 .*'context' must be a list"),
        (["question"], "line 2 .*must be a JSON object; got a list"),
    ],
)
def test_malformed_questions_are_named(tmp_path: Path, row: object, message: str) -> None:
    data = lines_of(tmp_path / "qa.jsonl", [*questions(1), row])
    with pytest.raises(ValueError, match=message):
        first("ruler-qa-1", data=data)


def test_a_question_too_long_for_the_length_is_named(tmp_path: Path) -> None:
    rows = questions(2)
    rows[1]["context"] = "word " * 500
    task = make_task("ruler-qa-1", data=lines_of(tmp_path / "qa.jsonl", rows), length=200)
    made = task.examples(words, 0, None)
    next(made)
    with pytest.raises(ValueError, match=r"ruler-qa-1: line 2 of .* more than 200 tokens: raise"):
        next(made)


def test_the_haystack_may_be_the_users_own(tmp_path: Path) -> None:
    text = " ".join(f"Sentence number {i} is here." for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    example = first("ruler-niah-multikey-1", 0, words, haystack=str(tmp_path), length=900)
    body = example.prompt.split("\n\n")[1]
    hay = [int(n) for n in re.findall(r"Sentence number (\d+) is here\.", body)]
    assert len(hay) > 140  # the 60 sentences come round
    assert hay == [(hay[0] + i) % 60 for i in range(len(hay))]
    starts = {
        re.search(
            r"number (\d+)",
            first("ruler-niah-single-2", seed, words, haystack=str(tmp_path), length=100).prompt,
        )[1]
        for seed in range(5)
    }
    assert len(starts) > 1


def test_long_sentences_of_the_users_text_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no end " * 1000 + "x" * 1000)
    assert all(0 < len(part) <= 300 for part in read_sentences(str(tmp_path)))


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ruler-vt: length must be an integer >= 1; got 0"):
        make_task("ruler-vt", length=0)
    with pytest.raises(ValueError, match=r"ruler-niah-single-1.*'haystack'"):
        make_task("ruler-niah-single-1", haystack=str(tmp_path))  # it would be ignored
    with pytest.raises(ValueError, match="haystack must be a folder of text files; 'nowhere'"):
        first("ruler-niah-single-2", haystack="nowhere")
    with pytest.raises(ValueError, match="no text files in the folder"):
        first("ruler-niah-single-2", haystack=str(tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="are empty"):
        first("ruler-niah-single-2", haystack=str(tmp_path))
    for name in TASKS:
        with pytest.raises(ValueError, match="a length of 20 tokens is too short"):
            first(name, length=20)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    rng = np.random.default_rng(0)
    hay = Endless(lambda: sentence(rng))
    short = hay.first(3)
    assert hay.first(8)[:3] == short
    assert hay.first(3) == short
    assert all(text[0].isupper() and text.endswith(".") for text in hay.first(200))
