"""StreamingLLM: the first tokens and the newest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refreshkv.config import Budgeted, at_least
from refreshkv.methods.kept import Eviction, Look
from refreshkv.methods.method import Method


@dataclass(frozen=True, kw_only=True)
class StreamingLLMSettings(Budgeted):
    """Settings of StreamingLLM.

    Attributes:
        sinks: how many of the first tokens stay (paper: 4).
    """

    sinks: int = at_least(0, 4)


class StreamingLLM(Eviction):
    """The first visible tokens score 1 and the others 0; ties go to the later token."""

    settings: StreamingLLMSettings

    def score_prompt(self, prompt: Look) -> Tensor:
        assert prompt.cache.budget is not None
        sinks = (prompt.cache.budget - 1).clamp(max=self.settings.sinks)  # and the newest token
        first = prompt.seen & (prompt.seen.cumsum(-1) <= sinks[:, None])
        return first.float()[:, None].expand(-1, prompt.cache.kv_heads, -1)


METHOD = Method(
    name="streaming-llm",
    label="StreamingLLM",
    source=(
        'Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv 2309.17453,'
        " section 3"
    ),
    note=(
        "4 sinks and the K - 4 newest. Ours: entries keep their true positions; the paper numbers them anew inside the"
        " cache, which matters beyond the trained length."
    ),
    settings=StreamingLLMSettings,
    make=StreamingLLM,
)
