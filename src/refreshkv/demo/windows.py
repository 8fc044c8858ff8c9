"""Dense training windows: one context, then as many questions about it as fit (ours).

Letters: B windows, L positions. A window is `context, request, answer, <eos>, request, ...`; the
loss falls on answers and on the `<eos>` after each, never on the context, which cannot be guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refreshkv.demo import documents as doc
from refreshkv.demo import tokenizer as tk
from refreshkv.demo.recipe import Stage
from refreshkv.demo.tasks import TASKS, check_task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START_AT_FIRST = 0.6  # share of chain and table questions about the whole record
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
        task = TASKS[rng.choice(len(TASKS), p=chances)]
        share = rng.uniform(*stage.context_share)
        row, wanted, context = training_window(rng, tokenizer, task, length + 1, share)
        tokens[b, : len(row)], answer[b, : len(row)] = row, wanted
        if gaps and rng.random() < GAP_SHARE:
            positions[b, context:] += int(rng.integers(length + 1))
    return Batch(tokens, answer, positions)


def training_window(
    rng: np.random.Generator, tokenizer: Tokenizer, task: str, length: int, context_share: float
) -> tuple[list[int], list[bool], int]:
    """(token ids, loss here?, length of the context) of one window of at most `length` tokens."""
    context, questions = _questions(rng, task, int(length * context_share))
    eos = tokenizer.token_to_id(tk.EOS)
    assert eos is not None
    row = tokenizer.encode(context).ids  # with <bos>
    wanted = [False] * len(row)
    context_length = min(len(row), length)
    for request, answer in questions:
        if len(row) >= length:
            break
        ids = tokenizer.encode(request, add_special_tokens=False).ids
        gold = [*tokenizer.encode(answer, add_special_tokens=False).ids, eos]
        row += ids + gold
        wanted += [False] * len(ids) + [True] * len(gold)
    return row[:length], wanted[:length], context_length


def _questions(
    rng: np.random.Generator, task: str, budget: int
) -> tuple[str, list[tuple[str, str]]]:
    """(context, all questions about it in random order): every record is asked for once."""
    check_task(task)
    if task == "key-value":
        document = doc.pair_document(rng, budget)
        order = [document.records[i] for i in rng.permutation(len(document.records))]
        questions = []
        while order:
            # The larger of two draws: going to the next key is the hard part, ask for many.
            size = int(rng.integers(1, MOST_KEYS + 1, 2).max())
            questions.append(doc.pair_question(order[:size]))
            order = order[size:]
        return document.text, questions
    if task == "chain-of-key":
        document = doc.chain_document(rng, budget)
        ask, shortest = doc.chain_question, 2  # a given key and one to answer
    else:
        document = doc.table_document(rng, budget)
        ask, shortest = doc.table_question, 1
    questions = []
    for i in rng.permutation(len(document.records)):
        record = document.records[i]
        whole = rng.random() < START_AT_FIRST
        start = 0 if whole else int(rng.integers(len(record) - shortest + 1))
        questions.append(ask(record, start))
    return document.text, questions
