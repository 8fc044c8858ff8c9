"""PyramidKV: SnapKV with more entries in lower layers and fewer in higher ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refreshkv.config import at_least
from refreshkv.methods.kept import Look
from refreshkv.methods.method import Method
from refreshkv.methods.snapkv import SnapKV, SnapKVSettings


@dataclass(frozen=True, kw_only=True)
class PyramidKVSettings(SnapKVSettings):
    """Settings of PyramidKV.

    Attributes:
        beta: the last layer has 1/beta of the mean beside its window (paper's code: 20).
    """

    beta: int = at_least(1, 20)


class PyramidKV(SnapKV):
    """K of this layer on the line from the first served layer to the last; the mean over layers is K."""

    settings: PyramidKVSettings

    def begin(self, prompt: Look) -> None:
        assert prompt.cache.budget is not None
        prompt.cache.budget = torch.tensor(
            [
                layer_budget(budget, tokens, self.layer, self.layers, self.settings)
                for budget, tokens in zip(
                    prompt.cache.budget.tolist(), prompt.tokens.tolist(), strict=True
                )
            ],
            device=prompt.query.device,
        )
        super().begin(prompt)


def layer_budget(
    budget: int, tokens: int, layer: int, layers: int, settings: PyramidKVSettings
) -> int:
    """K of a layer. Every layer has the window; the rest, on average b = K - window, falls from 2b - b/beta to b/beta.

    A first layer that would have more than the prompt's `tokens` gives its surplus to the higher ones, as in the
    paper's code. Rounded so that the layers add up to exactly `layers * budget`.
    """
    rest = budget - settings.window
    if rest <= 0 or layers == 1:
        return budget
    most = 2 * rest - rest / settings.beta
    most = max(rest, min(most, tokens - settings.window))
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
    settings=PyramidKVSettings,
    make=PyramidKV,
)
