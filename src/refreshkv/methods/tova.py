"""TOVA: what the last query needs least leaves."""

from __future__ import annotations

from torch import Tensor

from refreshkv.config import Budgeted
from refreshkv.methods.kept import Eviction, Look
from refreshkv.methods.method import Method


class TOVA(Eviction):
    """One set per layer, ranked by the last query's weights averaged over all heads."""

    def score_prompt(self, prompt: Look) -> Tensor:
        return self._averaged(prompt)

    def attended(self, now: Look) -> None:
        self.scores = self._averaged(now)

    def _averaged(self, look: Look) -> Tensor:
        """The weight of each token that is kept, or of each in the prompt, the same for all heads, `[B, Hkv, L]`."""
        scores = look.scores("mean", kept=self.kept).mean(1, keepdim=True)
        return scores.expand(-1, look.cache.kv_heads, -1)


METHOD = Method(
    name="tova",
    label="TOVA",
    source='Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, arXiv 2401.06104',
    note=(
        "Heads averaged, one set per layer, as in the paper. Here the entry that a step needed least leaves when the"
        " next token enters, so that a step never reads more than K."
    ),
    settings=Budgeted,
    make=TOVA,
)
