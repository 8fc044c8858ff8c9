"""StreamingLLM: the first tokens and the newest."""

from __future__ import annotations

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.methods.kept import Eviction
from refreshkv.methods.method import Method
from refreshkv.step import Attention

SINKS = 4


class StreamingLLM(Eviction):
    """The first four visible tokens score 1 and the others 0; ties go to the later token."""

    def score_prompt(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> Tensor:
        assert cache.budget is not None
        if visible is None:
            visible = torch.ones(1, cache.length - 1, dtype=torch.bool, device=query.device)
        sinks = (cache.budget - 1).clamp(max=SINKS)  # the token being decoded has its place
        first = visible & (visible.cumsum(-1) <= sinks[:, None])
        return first.float()[:, None].expand(-1, cache.kv_heads, -1)


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
    uses=("budget",),
    make=StreamingLLM,
)
