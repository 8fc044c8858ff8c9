"""Documents -> whole sequences of L + S tokens: read once, kept beside the run, the same after every restart.

The rule is the paper's: a document shorter than a sequence is left out, and no sequence holds two documents. How many
a document gives, and which are held out, is ours: as many as it holds, one after the other; and of every ten documents
that are long enough the second is for validation and the third for the test, which is kept as text.

Source: RefreshKV, section 6.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from refreshkv.tasks.perplexity import HUB, LOCAL
from refreshkv.tasks.texts import is_local, read
from refreshkv.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("training", "validation", "test")
TEST = "test.jsonl"
ABOUT = "data.json"


class Sequences(Dataset[dict[str, Any]]):
    """Sequences `[n, L + S]` in a file, at most so many; an item is one of them and its number."""

    def __init__(self, path: Path, width: int, most: int | None = None) -> None:
        self.tokens = np.memmap(path, np.int32, "r").reshape(-1, width)[:most]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"number": index, "tokens": torch.from_numpy(self.tokens[index].astype(np.int64))}


class Collator:
    """A batch as models take it, cut to a length that its first sequence draws where the recipe asks for that."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids` `[B, T]`, and `labels`, the same but for the first token, which nothing predicts."""
        recipe = self.recipe
        tokens = torch.stack([item["tokens"] for item in items])
        if recipe.shortest is not None:
            draw = np.random.default_rng([recipe.seed, items[0]["number"]])
            tokens = tokens[
                :, : int(draw.integers(recipe.shortest, recipe.length + 1)) + recipe.tail
            ]
        labels: Tensor = tokens.clone()
        labels[:, 0] = -100
        return {"input_ids": tokens, "labels": labels, "use_cache": False}


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Make what the folder lacks, or see that it was made from the same; returns what is there, for the records.

    Raises:
        ValueError: data that cannot be read or has changed, or fewer than three documents that are long enough.
    """
    asked = {
        "data": recipe.data,
        "width": recipe.length + recipe.tail,
        "documents": recipe.documents,
        "vocabulary": _fingerprint(tokenizer),
        "source": _size(recipe.data),
    }
    if (folder / ABOUT).exists():
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        for name, value in asked.items():
            if about.get(name) != value:
                raise ValueError(
                    f"'{folder}' was made with another {name} ({about.get(name)}, now {value}): use another --out"
                )
        return about
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    about = {**asked, **_write(recipe, tokenizer, aside)}
    (aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    os.replace(aside, folder)
    return about


def _write(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """The three parts, and how much of what went into them."""
    width, seen, used = recipe.length + recipe.tail, 0, 0
    sequences = dict.fromkeys(PARTS, 0)
    with (
        (folder / "training.bin").open("wb") as training,
        (folder / "validation.bin").open("wb") as validation,
        (folder / TEST).open("w", encoding="utf-8") as test,
    ):
        for record in read(recipe.data, HUB, LOCAL):
            if used == recipe.documents:
                break
            seen += 1
            text = record.text("text", blank=True)
            tokens = tokenizer(text, verbose=False)["input_ids"]
            whole = len(tokens) // width
            if not whole:
                continue
            part = PARTS[used % 10] if used % 10 < 3 else PARTS[0]
            if part == "test":
                test.write(json.dumps({"text": text}) + "\n")
            else:
                file = training if part == "training" else validation
                file.write(np.asarray(tokens[: whole * width], np.int32).tobytes())
            sequences[part] += whole
            used += 1
    if used < 3:
        raise ValueError(
            f"{recipe.data}: {used} of {seen} documents have {recipe.length} + {recipe.tail} tokens, and at least 3 are"
            " needed, one of them to train on, one to validate and one to test: lower --length, or give longer ones"
        )
    return {"read": seen, "long_enough": used, "sequences": sequences}


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _size(data: str) -> int | None:
    """Bytes of local data, to notice that it has changed."""
    if not is_local(data):
        return None
    path = Path(os.path.expanduser(data))
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
