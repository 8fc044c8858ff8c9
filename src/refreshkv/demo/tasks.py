"""The three demo tasks as prompts with gold answers, and their score (ours).

Every task hides many short records in a long context and asks for several of them in an order
that only the context can tell, so that each line of the answer needs another look at it.

`chain-of-key`
    Shuffled lines `word-word`. A chain is a run of keys in which the second word of one is the
    first word of the next; it ends at a key whose second half is a full stop. Given a chain's
    first key, write the rest of the chain.
`html-to-tsv`
    Several HTML tables of three cells a row (word, price, word). Given the first cell of a table,
    write the table as tab-separated lines.
`key-value`
    Lines `key:value`. Given several keys, write their lines in the order asked for.

The first two follow the paper's chain-of-key and HTML-to-TSV in spirit. Words are made of
syllables, so that the tasks suit a model of 2.5M parameters. An answer has an end that the text
itself tells (the full stop, the table's end, the last key asked for), so the model can stop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refreshkv.config import unknown
from refreshkv.demo import documents as doc

TASKS = ("chain-of-key", "html-to-tsv", "key-value")
MIN_LENGTH = 128

CHAIN_LINES = (9, 12)  # lines of the answer, both ends included
TABLE_LINES = (10, 12)
KEYS_ASKED = 6

_REQUEST_TOKENS = 10  # about, with the beginning-of-sequence token; six keys take twice that


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt with its gold answer.

    `prompt` ends with a newline that belongs to it: pass it on unchanged. `answer` is complete
    lines, each with its newline; the model should emit end-of-sequence right after it. `length`
    is the prompt length asked for, in tokens; the actual one is within a few per cent of it.
    """

    task: str
    seed: int
    length: int
    prompt: str
    answer: str

    @property
    def answer_lines(self) -> int:
        """Number of lines in the gold answer."""
        return self.answer.count("\n")


def check_task(task: str) -> None:
    """Raise `ValueError`, naming the nearest valid name, unless `task` is one of `TASKS`."""
    if task not in TASKS:
        raise ValueError(unknown("demo task", task, TASKS))


def make_prompt(task: str, seed: int, length: int = 1024) -> DemoPrompt:
    """The prompt number `seed` of `task`, about `length` tokens long (context plus request).

    The same arguments always give the same prompt. Raises `ValueError` for an unknown task, a
    negative seed or a `length` below `MIN_LENGTH`.
    """
    check_task(task)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if length < MIN_LENGTH:
        raise ValueError(f"length must be at least {MIN_LENGTH} tokens, got {length}")
    rng = np.random.default_rng([TASKS.index(task), seed, length])
    budget = length - _REQUEST_TOKENS
    if task == "chain-of-key":
        lines = int(rng.integers(CHAIN_LINES[0], CHAIN_LINES[1] + 1))
        document = doc.chain_document(rng, budget, first=lines + 1)  # the given key comes before
        request, answer = doc.chain_question(document.records[0])
    elif task == "html-to-tsv":
        lines = int(rng.integers(TABLE_LINES[0], TABLE_LINES[1] + 1))
        # A short prompt has room for a short table only.
        lines = min(lines, budget // (2 * doc.ROW_TOKENS))
        document = doc.table_document(rng, budget, first=lines)
        request, answer = doc.table_question(document.records[0])
    else:
        document = doc.pair_document(rng, budget - _REQUEST_TOKENS)
        chosen = rng.choice(len(document.records), size=KEYS_ASKED, replace=False)
        request, answer = doc.pair_question([document.records[i] for i in chosen])
    return DemoPrompt(task, seed, length, prompt=document.text + request, answer=answer)


def score_lines(answer: str, generated: str) -> tuple[int, int]:
    """How many lines of `answer` stand in `generated` exactly, each in its place: (right, total).

    Lines are compared by index, so a line left out or put in makes those after it wrong. Text
    after the last gold line is ignored; a last generated line without its newline counts.
    """
    gold = answer.removesuffix("\n").split("\n")
    lines = generated.split("\n")
    return sum(a == b for a, b in zip(gold, lines, strict=False)), len(gold)
