"""Contexts of the demo tasks and the questions that can be asked about them (ours).

A `Document` is text; its `records` are what a question asks for. `tasks.make_prompt` asks one
question of a document, `windows.training_window` as many as fit. Token counts are exact here
without a tokenizer, because a word is one token a syllable (see `tokenizer`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refreshkv.demo import tokenizer as tk

CHAIN_KEYS = (3, 13)  # keys in a chain, both ends included
TABLE_ROWS = (2, 12)  # rows in a table
VALUE_PARTS = (2, 4)  # syllables and numbers in a value
WORD_SYLLABLES = (2, 4)
KEY_SYLLABLES = (2, 3)  # a key of the key-value task is a shorter word

# Mean tokens of a chain's key (two words of 3, dash, newline) and of a table row (two words of 3,
# a price of 3, two cell separators, one row separator, and the share of a table's opening).
KEY_TOKENS = 8
ROW_TOKENS = 12
# The end of a chain: the second half of its last key.
CHAIN_END = "."


@dataclass(frozen=True)
class Document:
    """A context (`text`) and its `records`, each a tuple of complete answer lines.

    A record is a chain, a table or a single key-value line. Where the caller asked for a first
    record of a given size, it is `records[0]`; its place in `text` is random all the same.
    """

    text: str
    records: tuple[tuple[str, ...], ...]


def chain_document(rng: np.random.Generator, budget: int, first: int | None = None) -> Document:
    """Shuffled keys `word-word` of several chains, `budget` tokens to within half a chain.

    Each record is a chain, in order; `first` is the number of keys in `records[0]`.
    """
    seen: set[str] = set()
    chains: list[tuple[str, ...]] = []
    for size in _sizes(rng, (budget - 2) // KEY_TOKENS, CHAIN_KEYS, first):
        words = [draw_word(rng, seen) for _ in range(size)]
        seconds = [*words[1:], CHAIN_END]
        chains.append(tuple(f"{a}-{b}\n" for a, b in zip(words, seconds, strict=True)))
    lines = [line for chain in chains for line in chain]
    body = "".join(lines[i] for i in rng.permutation(len(lines)))
    return Document(tk.KEYS_HEADER + body, tuple(chains))


def chain_question(record: tuple[str, ...], start: int = 0) -> tuple[str, str]:
    """(request, answer): the key at `start` is given, the rest of the chain is wanted."""
    return tk.CHAIN_REQUEST + record[start], "".join(record[start + 1 :])


def table_document(rng: np.random.Generator, budget: int, first: int | None = None) -> Document:
    """HTML tables of three cells a row, about `budget` tokens; records are their TSV lines."""
    seen: set[str] = set()
    records: list[tuple[str, ...]] = []
    tables: list[str] = []
    for size in _sizes(rng, (budget - 2) // ROW_TOKENS, TABLE_ROWS, first):
        rows = [_table_row(rng, seen) for _ in range(size)]
        records.append(tuple("\t".join(row) + "\n" for row in rows))
        cells = tk.ROW.join(tk.CELL.join(row) for row in rows)
        tables.append(tk.TABLE_OPEN + cells + tk.TABLE_CLOSE)
    body = "".join(tables[i] for i in rng.permutation(len(tables)))
    return Document(tk.TABLES_HEADER + body, tuple(records))


def table_question(record: tuple[str, ...], start: int = 0) -> tuple[str, str]:
    """(request, answer): a table from the row `start` on, named by that row's first cell."""
    return tk.TSV_REQUEST + record[start].split("\t")[0] + "\n", "".join(record[start:])


def pair_document(rng: np.random.Generator, budget: int) -> Document:
    """Lines `key:value`, about `budget` tokens; each record is one line.

    A value is a run of syllables and two-digit numbers in any order.
    """
    seen: set[str] = set()
    parts = (*tk.SYLLABLES, *tk.NUMBERS)
    lines: list[str] = []
    used = 2
    while used < budget - KEY_TOKENS // 2:
        key = draw_word(rng, seen, KEY_SYLLABLES)
        size = int(rng.integers(VALUE_PARTS[0], VALUE_PARTS[1] + 1))
        value = "".join(parts[i] for i in rng.integers(0, len(parts), size))
        lines.append(f"{key}:{value}\n")
        used += len(key) // 2 + size + 2
    return Document(tk.DATA_HEADER + "".join(lines), tuple((line,) for line in lines))


def pair_question(records: list[tuple[str, ...]]) -> tuple[str, str]:
    """(request, answer): the lines of several keys, in the order in which they are asked for."""
    keys = ",".join(record[0].split(":")[0] for record in records)
    return f"{tk.GET_REQUEST}{keys}\n", "".join(record[0] for record in records)


def draw_word(
    rng: np.random.Generator, seen: set[str], syllables: tuple[int, int] = WORD_SYLLABLES
) -> str:
    """A new word that is not in `seen`, to which it is added."""
    while True:
        count = int(rng.integers(syllables[0], syllables[1] + 1))
        word = "".join(tk.SYLLABLES[i] for i in rng.integers(0, len(tk.SYLLABLES), count))
        if word not in seen:
            seen.add(word)
            return word


def _table_row(rng: np.random.Generator, seen: set[str]) -> tuple[str, str, str]:
    whole, cents = rng.integers(0, 100, 2)
    return draw_word(rng, seen), f"{whole:02d}.{cents:02d}", draw_word(rng, seen)


def _sizes(
    rng: np.random.Generator, total: int, bounds: tuple[int, int], first: int | None
) -> list[int]:
    """Random record sizes within `bounds` that add up to `total` lines (or one smallest record).

    `first`, where given, comes first whatever `bounds` say. A rest too small for a record joins
    the last one, unless that is `first`.
    """
    low, high = bounds
    sizes = [first] if first is not None else []
    rest = total - sum(sizes)
    while rest >= low or not sizes:
        size = int(rng.integers(low, high + 1))
        sizes.append(max(low, min(size, rest)))
        rest -= sizes[-1]
    return sizes
