"""`refreshkv generate --explain`: which mode is the fastest for a model and a prompt, by the bytes that a token moves.

The bytes are those of `refreshkv.bench.roofline`. How often drafts stand and heads refresh was measured on the bundled
model (docs/fidelity.md), so this is an estimate for any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refreshkv.bench.roofline import ACCEPTANCE, DRAFT, Load, Reads, sizes_of
from refreshkv.config import make_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def estimates(prompt_tokens: int) -> dict[str, Reads]:
    """What a token reads: full attention, the lossless mode and the preset "fast"."""
    drafts = {"draft": DRAFT, "acceptance": ACCEPTANCE}
    exact, fast = (
        Load(context=prompt_tokens, budget=make_config(preset).budget, **drafts).modes()
        for preset in ("default", "fast")
    )
    return {"full": exact["full"], "exact": exact["exact"], "fast": fast["fast"]}


def lines(model: PreTrainedModel, prompt_tokens: int) -> list[str]:
    """What `--explain` prints."""
    found, sizes = estimates(prompt_tokens), sizes_of(model)
    moved = {mode: reads.bytes(sizes, 1) for mode, reads in found.items()}
    rows = [
        f"  {mode:6} {_size(reads.passes * sizes.weights):>9} of weights + "
        f"{_size(reads.entries * sizes.entry):>9} of KV cache a token:"
        f" {moved['full'] / moved[mode]:.2f}x full attention"
        for mode, reads in found.items()
    ]
    # exact <= full where the KV bytes it saves outweigh the weights it reads again.
    again = (found["exact"].passes - 1) * sizes.weights
    saved = 1 - found["exact"].entries / found["full"].entries
    even = again / (saved * sizes.entry) if saved > 0 else float("inf")
    return [
        f"By bytes, for a prompt of {prompt_tokens} tokens, one row (an estimate, docs/fidelity.md):",
        *rows,
        f"  fastest: {min(moved, key=moved.__getitem__)}; exact is ahead of full from {even:,.0f} tokens of all rows"
        " together",
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
