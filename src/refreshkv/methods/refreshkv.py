"""RefreshKV in its variants, full attention, and the ablations of the paper."""

from __future__ import annotations

from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import Budgeted
from refreshkv.kernels.options import AttendOptions, over_heads
from refreshkv.methods.method import Method
from refreshkv.step import Algorithm, decode_step, full_step


class NoReselection(Algorithm):
    """RefreshKV with a full step that only attends."""

    def __init__(self, settings: Budgeted, layer: int, layers: int) -> None:
        pass

    def step(
        self, cache: LayerCache, query: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> Tensor:
        return decode_step(cache, query, options, visible, attend_only)


def attend_only(
    cache: LayerCache,
    query: Tensor,
    options: AttendOptions,
    visible: Tensor | None,
    heads: Tensor | None,
) -> Tensor:
    """Attends to everything and re-selects nothing: the partial cache goes on as after a partial step."""
    ring = cache.ring
    if ring is None or bool(
        (ring.filled == 0).any()
    ):  # after a crop there is nothing to go on with
        return full_step(cache, query, options, visible, heads)
    if heads is None:  # else the partial step has let the new token in
        ring.push(cache.store.lengths - 1)
    return cache.store.attend(query, options.over(over_heads(visible))).output


_PAPER = (
    'Xu, Goyal and Choi, "RefreshKV: Updating Small KV Cache During Long-form Generation",'
    " ACL 2025, arXiv 2411.05787"
)

FULL = Method(
    name="full",
    label="full attention",
    source="ordinary attention",
    note="K does not matter; it is accepted so that a comparison can name one for all.",
    fixed={"mode": "full"},
)
REFRESHKV = Method(
    name="refreshkv",
    label="RefreshKV",
    source=f"{_PAPER}, section 3",
    note='The preset "default": drafts over the partial cache, verified by full attention.',
)
FAST = Method(
    name="refreshkv-fast",
    label="RefreshKV, fast",
    source="ours",
    note='The preset "fast": every entry in two bits, and exactly those that have weight in this very step.',
    preset="fast",
    fixed={"mode": "mixed"},
)
LSE_DROP = Method(
    name="refreshkv-lse-drop",
    label="RefreshKV, by log-sum-exp",
    source="ours",
    note='The preset "lse-drop": a partial cache, chosen anew where the log-sum-exp of a head has dropped.',
    preset="lse-drop",
    fixed={"mode": "refresh"},
)
FIXED = Method(
    name="refreshkv-fixed",
    label="RefreshKV, fixed stride",
    source=f"{_PAPER}, ablations",
    note="Every due step is full, whatever the query.",
    fixed={"threshold": None, "trigger": "query"},
)
AS_IN_PAPER = Method(
    name="refreshkv-paper",
    label="RefreshKV as in the paper",
    source=f"{_PAPER}, section 3",
    note='The preset "paper-llama": stride 5, full where the cosine is at most 0.85, decided per layer.',
    preset="paper-llama",
)
NO_REFRESH = Method(
    name="no-refresh",
    label="RefreshKV, never refreshed",
    source=f"{_PAPER}, ablations",
    note="The selection after the prompt, then the newest tokens: SnapKV with window 1.",
    fixed={"stride": None, "trigger": "query"},
)
NO_FULL_ATTENTION = Method(
    name="no-full-attention",
    label="RefreshKV, no full attention",
    source=f"{_PAPER}, ablations",
    note=(
        "As refreshkv-paper, but a step that re-selects reads the keys only and attends to the new partial cache; it is"
        " counted as a full step that reads half."
    ),
    preset="paper-llama",
    fixed={"score_only": True},
)
NO_RESELECTION = Method(
    name="no-reselection",
    label="RefreshKV, no re-selection",
    source=f"{_PAPER}, ablations",
    note=(
        "As refreshkv-paper, but a full step only attends: the partial cache goes on from the selection after the"
        " prompt, and queries are compared with the last of the prompt."
    ),
    preset="paper-llama",
    fixed={"score_only": False},
    make=NoReselection,
)
