"""Dense training windows: one context, then as many questions about it as fit (ours).

Letters: B windows, L positions. A window is `context, request, answer, <eos>, request, ...`; the
loss falls on answers and on the `<eos>` after each, never on the context, which cannot be guessed.
Prompts are made of the same pieces as those of the evaluation tasks, from other seeds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments.recipe import Stage
from refreshkv.demo import tokenizer as tk
from refreshkv.demo.prompts import TASKS
from refreshkv.tasks import chain_of_key as chain
from refreshkv.tasks import html_to_tsv as html
from refreshkv.tasks import key_value as pairs
from refreshkv.tasks.ruler.needles import draw_key, draw_value, intro, needle, question
from refreshkv.tasks.ruler.vocabulary import NOISE, sentence
from refreshkv.tasks.words import Endless

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUBJECTS = (*TASKS, "needles")  # in the order of a stage's mix
Question = tuple[str, str]  # request, answer

CHAIN_KEYS = 10  # keys of an answer
LEAST_FOR_EXAMPLE = 512  # shorter chain windows have no room for the worked example
COLUMNS = (2, 4)
TABLE_ROWS = (2, 12)
MOST_KEYS = 6  # asked for at once
GAP_SHARE = 0.7  # share of windows with a gap of positions between context and questions


@dataclass(frozen=True)
class Batch:
    """`tokens` [B, L+1] int64, `answer` [B, L+1] bool (loss here), `positions` [B, L] int64."""

    tokens: np.ndarray
    answer: np.ndarray
    positions: np.ndarray


def make_batch(
    rng: np.random.Generator, tokenizer: Tokenizer, stage: Stage, gaps: bool = True
) -> Batch:
    """One batch of `stage`: its windows are of tasks drawn by `stage.mix`.

    With `gaps`, most windows shift the positions of their questions by up to the window's length,
    which teaches distances beyond it.
    """
    size, length = stage.batch, stage.length
    tokens = np.zeros((size, length + 1), np.int64)  # 0 is <pad>, always after the last answer
    answer = np.zeros((size, length + 1), bool)
    positions = np.tile(np.arange(length), (size, 1))
    chances = np.array(stage.mix, float) / sum(stage.mix)
    for b in range(size):
        task = SUBJECTS[rng.choice(len(stage.mix), p=chances)]
        share = rng.uniform(*stage.context_share)
        row, wanted, context = training_window(
            rng, tokenizer, task, length + 1, share, stage.single_keys
        )
        tokens[b, : len(row)], answer[b, : len(row)] = row, wanted
        room = tk.MAX_LENGTH - length
        if gaps and rng.random() < GAP_SHARE:
            positions[b, context:] += int(rng.integers(min(length, room) + 1))
    return Batch(tokens, answer, positions)


def training_window(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    task: str,
    length: int,
    context_share: float,
    single_keys: float = 0.0,
) -> tuple[list[int], list[bool], int]:
    """(token ids, loss here?, length of the context) of one window of at most `length` tokens."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    budget = int(length * context_share)
    makers = {"chain-of-key": _chain, "html-to-tsv": _html, "needles": _needles}
    make = makers.get(task) or functools.partial(_pairs, single=single_keys)
    context, questions = make(rng, budget, lambda t: len(ids(t)))
    eos = tokenizer.token_to_id(tk.EOS)
    assert eos is not None
    row = tokenizer.encode(context).ids  # with <bos>
    wanted = [False] * len(row)
    context_length = min(len(row), length)
    for i in rng.permutation(len(questions)):
        if len(row) >= length:
            break
        request, gold = ids(questions[i][0]), [*ids(questions[i][1]), eos]
        row += request + gold
        wanted += [False] * len(request) + [True] * len(gold)
    return row[:length], wanted[:length], context_length


def _chain(rng: np.random.Generator, budget: int, count: chain.Count) -> tuple[str, list[Question]]:
    """The cycle is cut into stretches. One begins at the first key of the context and is asked for
    as the task asks; of the others the first key, which nothing tells, is given.
    """
    with_example = budget >= LEAST_FOR_EXAMPLE and rng.random() < 0.7
    head = chain.opening(CHAIN_KEYS, 2) if with_example else chain.instruction(CHAIN_KEYS)
    cycle = chain.Cycle.draw(rng, 4 + budget // 6, 2)
    per_key = count(cycle.context(len(cycle.chains))) / len(cycle.chains)
    size = max(3, min(len(cycle.chains), int((budget - count(head)) / per_key)))
    context = cycle.context(size)
    keys = cycle.keys(size)
    start = keys.index(context.splitlines()[1].removeprefix(chain.LINE))
    keys = [f"{key}\n" for key in keys[start:] + keys[:start]]
    request = chain.instruction(CHAIN_KEYS) + chain.ask(CHAIN_KEYS)
    questions = [(request, "".join(keys[:CHAIN_KEYS]))]
    for i in range(CHAIN_KEYS, size - 1, CHAIN_KEYS):
        questions.append((request + keys[i], "".join(keys[i + 1 : i + CHAIN_KEYS])))
    return head + context, questions


def _html(rng: np.random.Generator, budget: int, count: chain.Count) -> tuple[str, list[Question]]:
    """Every table of the page is asked for once."""
    seen: set[str] = set()
    tables: list[html.Table] = []
    columns = int(rng.integers(COLUMNS[0], COLUMNS[1] + 1)) if rng.random() < 0.5 else 3
    left = budget - count(html.page([]))
    while True:
        table = html.Table.draw(rng, seen, int(rng.integers(*TABLE_ROWS) + 1), columns)
        left -= count(table.html())
        if tables and left < 0:
            break
        tables.append(table)
    return html.page(tables), [(html.request(table), table.tsv()) for table in tables]


def _pairs(
    rng: np.random.Generator, budget: int, count: chain.Count, single: float
) -> tuple[str, list[Question]]:
    """Every line is asked for once, up to `MOST_KEYS` at a time; a share `single` of the questions asks for one."""
    seen: set[str] = set()
    lines: list[str] = []
    left = budget - count(pairs.INTRO)
    while not lines or left > 0:
        lines.append(pairs.draw_line(rng, seen))
        left -= count(lines[-1])
    order = [lines[i] for i in rng.permutation(len(lines))]
    questions = []
    while order:
        # The larger of two draws: going to the next key is the hard part, ask for many.
        size = int(rng.integers(1, MOST_KEYS + 1, 2).max())
        if single and rng.random() < single:
            size = 1
        questions.append((pairs.request(order[:size]), "".join(order[:size])))
        order = order[size:]
    return pairs.INTRO + "".join(lines), questions


def _needles(
    rng: np.random.Generator, budget: int, count: chain.Count
) -> tuple[str, list[Question]]:
    """Needles among needles, in text or in noise; each is asked for once, alone."""
    seen: set[str] = set()
    hay = rng.choice(["needles", "text", "noise"], p=[0.5, 0.35, 0.15])
    keys = "uuids" if hay == "needles" and rng.random() < 0.4 else "words"
    codes = "uuids" if keys == "uuids" or rng.random() < 0.25 else "numbers"
    stuff = Endless(lambda: sentence(rng) if hay == "text" else NOISE).first
    hidden: list[tuple[str, str]] = []
    lines: list[str] = []
    left = budget - count(intro(True, False)) - 4
    while not hidden or left > 0:
        # Text and noise are thin hay: two or three sentences between needles.
        chaff = (
            [] if hay == "needles" else stuff(len(lines) + int(rng.integers(2, 4)))[len(lines) :]
        )
        hidden.append((draw_key(rng, seen, keys), draw_value(rng, seen, codes)))
        lines += [*chaff, needle(*hidden[-1])]
        left -= sum(count(line) + 1 for line in lines[-len(chaff) - 1 :])
    text = (" " if hay == "text" else "\n").join(lines)
    context = f"{intro(True, False)}\n\n{text}\n\n"
    return context, [(question([key], 1), code) for key, code in hidden]
