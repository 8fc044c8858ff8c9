"""TOVA: what the last query needs least leaves."""

from __future__ import annotations

from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.methods.kept import Eviction
from refreshkv.methods.method import Method
from refreshkv.step import Attention


class TOVA(Eviction):
    """One set per layer, ranked by the last query's weights averaged over all heads."""

    def score_prompt(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        seen = None if visible is None else visible[:, None]
        return _averaged(cache, query, attention, seen, cache.length - 1)

    def step(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        output = super().step(cache, query, attention, visible)
        self.scores = _averaged(cache, query, attention, self.kept, cache.length)
        return output


def _averaged(
    cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None, length: int
) -> Tensor:
    """The weight of each of the first `length` tokens, the same for all heads, `[B, Hkv, length]`."""
    keys = cache.store.keys[:, :, :length]
    scores, _ = cache.backend.score(query, keys, **attention.options(visible), reduction="mean")
    return scores.mean(1, keepdim=True).expand(-1, cache.kv_heads, -1)


METHOD = Method(
    name="tova",
    label="TOVA",
    source='Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, arXiv 2401.06104',
    note=(
        "Heads averaged, one set per layer, as in the paper. Here the entry that a step needed least leaves when the"
        " next token enters, so that a step never reads more than K."
    ),
    uses=("budget",),
    make=TOVA,
)
