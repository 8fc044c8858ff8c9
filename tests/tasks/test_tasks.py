"""The tasks with a right answer: deterministic, consistent in themselves, of the length asked for, scored as stated."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from refreshkv.demo.tokenizer import build_backend
from refreshkv.tasks import GROUPS, TASKS, expand, make_task
from refreshkv.tasks.chain_of_key import LINE, parse
from refreshkv.tasks.html_to_tsv import read_rows
from refreshkv.tasks.task import Example, fit

NAMES = ("chain-of-key", "html-to-tsv", "key-value")
BACKEND = build_backend()


def tokens(text: str) -> int:
    return len(BACKEND.encode(text, add_special_tokens=False).ids)


def words(text: str) -> int:
    return len(text.split())


def first(name: str, seed: int = 0, count=tokens, **options) -> Example:
    options.setdefault("length", 1024)
    return next(make_task(name, **options).examples(count, seed, 1))


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_seed_and_number_only(name: str) -> None:
    task = make_task(name, length=512)
    made = list(task.examples(tokens, 3, 4))
    assert made[:2] == list(task.examples(tokens, 3, 2))
    assert len({example.prompt for example in made}) == 4
    assert made[0].prompt != next(task.examples(tokens, 4, 1)).prompt
    assert [example.id for example in made] == ["0000", "0001", "0002", "0003"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [tokens, words, len])
def test_prompts_fill_the_length_and_never_exceed_it(name: str, count) -> None:
    length = {tokens: 2048, words: 700, len: 6000}[count]
    for seed in range(3):
        example = first(name, seed, count, length=length)
        assert 0.8 * length <= count(example.prompt) <= length
        assert example.max_new_tokens > count(example.answer)


@pytest.mark.parametrize("name", NAMES)
def test_the_gold_answer_scores_one_and_nothing_scores_zero(name: str) -> None:
    task = make_task(name, length=1024)
    for example in task.examples(tokens, 0, 3):
        score = task.score(example, example.answer)
        assert score.value == 1
        assert set(score.parts) == {1.0}
        for wrong in ("", "\n", "no idea", "-", "\t\t\n"):
            assert task.score(example, wrong).value == 0
            assert len(task.score(example, wrong).parts) == len(score.parts)


@pytest.mark.parametrize("words_per_key", [2, 3, 5])
@pytest.mark.parametrize("keys", [1, 10, 17])
def test_every_key_has_exactly_one_successor(words_per_key: int, keys: int) -> None:
    example = first("chain-of-key", words=words_per_key, keys=keys, length=1500)
    context = example.prompt.rsplit("Context:\n", 1)[1]
    found = [line.removeprefix(LINE) for line in context.splitlines() if line.startswith(LINE)]
    assert found == example.facts["context"]
    heads, tails = [k.split("-")[0] for k in found], [k.split("-")[-1] for k in found]
    assert all(len(k.split("-")) == words_per_key for k in found)
    assert len(set(heads)) == len(found)
    assert sorted(heads) == sorted(tails)
    chain = example.answer.splitlines()
    assert len(chain) == keys
    assert chain[0] == found[0]
    assert all(a.split("-")[-1] == b.split("-")[0] for a, b in itertools.pairwise(chain))


def test_the_worked_example_is_right_and_shares_no_answer() -> None:
    example = first("chain-of-key")
    shown = example.prompt.split("Chain of ten keys:\n")[1].split("Context:")[0].split()
    task = make_task("chain-of-key")
    assert task.score(Example("x", "", 0, None, {"context": shown}), "\n".join(shown)).value == 1
    assert task.score(example, "\n".join(shown)).value == 0


def test_chain_score_is_the_longest_valid_prefix() -> None:
    task = make_task("chain-of-key", keys=4)
    example = Example("0", "", 0, None, {"context": ["a-b", "b-c", "c-d", "d-a"]})
    cases = {
        "b-c\nc-d\nd-a\na-b": (1.0, (1, 1, 1, 1)),  # the first key is free
        "a-b\nb-c\nx-y\nd-a": (0.5, (1, 1, 0, 0)),
        "a-b\nc-d\nd-a\na-b": (0.25, (1, 0, 1, 1)),  # goes on well after its mistake
        "1. a-b, 2. b-c": (0.5, (1, 1, 0, 0)),
        "Name of key: a-b\n\n- b-c\nc-d\nd-a\na-b": (1.0, (1, 1, 1, 1)),
    }
    for output, (value, parts) in cases.items():
        score = task.score(example, output)
        assert (score.value, score.parts) == (value, parts), output


def test_parse_takes_numbers_bullets_and_commas() -> None:
    assert parse("1) a-b\n* b-c, Name of key: c-d\n\n") == ["a-b", "b-c", "c-d"]


@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_the_table_of_that_caption(seed: int) -> None:
    example = first("html-to-tsv", seed, columns=4, rows=7)
    caption = example.prompt.splitlines()[-1].split()[-1]
    (table,) = re.findall(f"<caption>{caption}</caption>\n(.*?)</table>", example.prompt, re.DOTALL)
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in table.splitlines()]
    assert example.answer == "".join("\t".join(row) + "\n" for row in rows if row)
    assert len(example.answer.splitlines()) == 8


def test_row_score_follows_longproc() -> None:
    task = make_task("html-to-tsv")
    example = Example("0", "", 0, "name\tn\nThe Cat\t1.5\nDog!\t2\n")
    cases = {
        "x\ty\ncat\t15\ndog\t2\n": 1.0,  # case, articles, punctuation, blanks and the header do not count
        "name\tn\ndog\t2\nThe Cat\t1.5\n": 1.0,  # nor does the order
        "Sure:\n```tsv\nname\tn\nThe Cat\t1.5\n```\nDog!\t2": 2 / 3,  # inside the fence only
        "name\tn\nThe Cat\t1.5\nDog!\t3\n": 0.5,
        "name\tn\nThe Cat\t1.5\nbad\nDog!\t2\n": 0.8,  # a malformed row counts as a wrong one
        "name\tn\nThe Cat\t1.5\nDog!\t2\nThat is all.": 1.0,  # a last line of another width is dropped
        "name\tn\n": 0.0,
    }
    for output, value in cases.items():
        assert task.score(example, output).value == pytest.approx(value), output
    assert task.score(example, "a\tb\nDog!\t2\n").parts == (0.0, 1.0)
    assert read_rows("one line") == []


@pytest.mark.parametrize("keys", [1, 5])
def test_the_lines_asked_for_stand_in_the_list(keys: int) -> None:
    example = first("key-value", keys=keys)
    *lines, request = example.prompt.splitlines()
    listed = dict(line.split(":") for line in lines[1:])
    assert len(listed) == len(lines) - 1
    asked = request.rsplit(" ", 1)[1].split(",")
    assert len(asked) == keys
    assert example.answer == "".join(f"{key}:{listed[key]}\n" for key in asked)
    task = make_task("key-value", keys=keys)
    half = "wrong\n" + "".join(example.answer.splitlines(keepends=True)[1:])
    assert task.score(example, half).value == pytest.approx((keys - 1) / keys)


def test_settings_that_cannot_work_are_named() -> None:
    for name, options, message in (
        ("chain-of-key", {"words": 1}, "words must be an integer >= 2"),
        ("chain-of-key", {"keys": 0}, "keys must be"),
        ("html-to-tsv", {"rows": 0}, "rows must be"),
        ("key-value", {"keys": "5"}, "keys must be"),
        ("key-value", {"kees": 5}, "did you mean 'keys'"),
        ("key-valeu", {}, "did you mean 'key-value'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(name, **options)
    for name in NAMES:
        with pytest.raises(ValueError, match="raise the length"):
            first(name, length=20)
    with pytest.raises(ValueError, match="keys fit into length 260"):
        first("chain-of-key", length=260)


def test_groups_expand_and_every_name_has_a_task() -> None:
    assert expand(["ruler", "key-value", "ruler-vt"]) == [*GROUPS["ruler"], "key-value"]
    assert len(GROUPS["ruler"]) == 13
    assert set(GROUPS["ruler"]) < set(TASKS)
    with pytest.raises(ValueError, match="did you mean 'ruler'"):
        expand(["rulr"])


@pytest.mark.parametrize("size", range(9))
def test_fit_finds_the_largest(size: int) -> None:
    assert fit(lambda n: "x" * (3 + 2 * n), len, 3 + 2 * size + 1) == size
    assert fit(lambda n: "x" * n, len, 100, most=size) == size


def longproc(tmp_path: Path, **changes: object) -> Path:
    entry = {
        "task_id": "W1_0.5k_1",
        "html_path": "./data/html_to_tsv/webpage/W1.html",
        "task_topic": "Animals",
        "task_description": "(1) name; (2) legs",
        "tsv_header": "name\tlegs",
        "filtering_instruction": "Only those with legs.",
        "gt": "name\tlegs\ncat\t4\n",
    } | changes
    page = tmp_path / "data" / "html_to_tsv" / "webpage" / "W1.html"
    page.parent.mkdir(parents=True)
    page.write_text("<p>the page</p>")
    file = tmp_path / "data" / "html_to_tsv" / "html_to_tsv_0.5k.json"
    file.write_text(json.dumps([entry, entry]))
    return file


def test_longproc_files_are_read(tmp_path: Path) -> None:
    task = make_task("html-to-tsv", data=str(longproc(tmp_path)))
    (example,) = task.examples(tokens, 0, 1)
    assert example.id == "W1_0.5k_1"
    for part in ("<p>the page</p>", "Animals", "(2) legs", "Only those", "name\tlegs"):
        assert part in example.prompt
    assert task.score(example, "```tsv\nname\tlegs\nCat\t4\n```").value == 1


def test_longproc_errors_name_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("[{")
    listed = tmp_path / "dict.json"
    listed.write_text("{}")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    cases = {
        str(tmp_path / "none.json"): "cannot read",
        str(broken): "is not JSON",
        str(listed): "list of objects",
        str(longproc(tmp_path / "a", gt=None)): "entry 0 lacks 'gt'",
        str(longproc(tmp_path / "b", html_path="no/such.html")): "page 'no/such.html'",
    }
    for data, message in cases.items():
        with pytest.raises(ValueError, match=message):
            list(make_task("html-to-tsv", data=data).examples(tokens, 0, None))


@pytest.mark.parametrize("name", [*TASKS, *GROUPS])
def test_every_task_and_group_is_documented(name: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    assert f"`{name}`" in page.read_text("utf-8")
