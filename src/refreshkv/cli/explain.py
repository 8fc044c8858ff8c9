"""`refreshkv generate --explain`: the bytes that a token moves in each mode, at least, for a model and a prompt.

The bytes are those of `refreshkv.bench.roofline`, in the best case: every draft stands, no entry is read exactly.
What a step costs besides bytes is not in them, so they bound a speedup and promise none; `refreshkv compare` measures
it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from refreshkv.bench.roofline import Load, Reads, sizes_of
from refreshkv.config import make_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def least(prompt_tokens: int) -> dict[str, Reads]:
    """What a token reads at least: full attention, the lossless mode and the preset "fast"."""
    exact = make_config("default")
    drafting = Load(
        context=prompt_tokens, budget=exact.budget, draft=exact.draft, acceptance=1.0
    ).modes()
    # Up to K entries of a KV head are exact; how many depends on the text.
    copy = replace(drafting["mixed"], entries=0)
    return {"full": drafting["full"], "exact": drafting["exact"], "fast": copy}


def lines(model: PreTrainedModel, prompt_tokens: int) -> list[str]:
    """What `--explain` prints."""
    found, sizes = least(prompt_tokens), sizes_of(model)
    moved = {mode: reads.bytes(sizes, 1) for mode, reads in found.items()}
    rows = [
        f"  {mode:6} {_size(reads.passes * sizes.weights):>9} of weights + "
        f"{_size(reads.cache_bytes(sizes)):>9} of KV cache"
        for mode, reads in found.items()
    ]
    rows[1:] = [
        f"{row}: at most {moved['full'] / moved[mode]:.2f}x full attention"
        for mode, row in list(zip(found, rows, strict=True))[1:]
    ]
    return [
        f"Bytes that a token moves after a prompt of {prompt_tokens} tokens, one row, at least (exact: every draft"
        " stands; fast: the copy in two bits alone):",
        *rows,
        "  An upper bound: work besides bytes can make a mode slower than full attention. What is so on this machine,"
        " 'refreshkv compare' measures.",
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
