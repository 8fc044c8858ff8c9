"""PyramidKV: SnapKV with more entries in lower layers and fewer in higher ones."""

from __future__ import annotations

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.methods.method import Method
from refreshkv.methods.snapkv import USES, SnapKV
from refreshkv.step import Attention

BETA = 20


class PyramidKV(SnapKV):
    """K of this layer on the line from the first served layer to the last; the mean over layers is K."""

    def begin(
        self, cache: LayerCache, query: Tensor, attention: Attention, visible: Tensor | None
    ) -> None:
        assert cache.budget is not None and cache.hidden is not None
        tokens = (cache.length - 1 - cache.hidden).tolist()
        cache.budget = torch.tensor(
            [
                layer_budget(budget, count, self.layer, self.layers, self.window)
                for budget, count in zip(cache.budget.tolist(), tokens, strict=True)
            ],
            device=cache.budget.device,
        )
        super().begin(cache, query, attention, visible)


def layer_budget(budget: int, tokens: int, layer: int, layers: int, window: int) -> int:
    """K of a layer. Every layer has the window; the rest, on average b = K - window, falls from 2b - b/beta to b/beta.

    A first layer that would have more than the prompt's `tokens` gives its surplus to the higher ones, as in the
    paper's code. Rounded so that the layers add up to exactly `layers * budget`.
    """
    rest = budget - window
    if rest <= 0 or layers == 1:
        return budget
    most = 2 * rest - rest / BETA
    most = max(rest, min(most, tokens - window))
    lower = min(layer, layers - 1 - layer)  # the layer, or its mirror image in the lower half
    above = round((most - rest) * (1 - 2 * lower / (layers - 1)))
    return budget + (above if layer == lower else -above)


METHOD = Method(
    name="pyramidkv",
    label="PyramidKV",
    source=(
        'Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",'
        " arXiv 2406.02069, KV cache budget allocation"
    ),
    note=(
        "Beta 20, window 32 (the paper's code: 8 to 64). K is the mean over the served layers; selection, pooling and"
        " decoding as in snapkv. With K up to the window all layers have K."
    ),
    uses=USES,
    make=PyramidKV,
)
