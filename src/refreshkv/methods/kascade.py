"""Kascade: a few anchor layers find their top-K exactly, and the layers above them attend to what they found."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from refreshkv.config import Grouped, Reduction, at_least, setting
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method
from refreshkv.policy.selection import reduce_group

# The paper has five anchor layers in the 32 of Llama-3.1-8B.
_ANCHORS, _LAYERS = 5, 32


@dataclass(frozen=True, kw_only=True)
class KascadeSettings(Grouped):
    """Settings of Kascade.

    Attributes:
        group_reduction: how the query heads of a group agree on one score per token (paper: mean).
        anchors: the anchor layers beside the first, counted among those served: `2-8-13-14` (paper, for Llama-3.1-8B).
            `None`: five in 32 layers, two at least, at equal distances.
        dense_first: the first layer attends to everything, as in the paper.
        window: the last prompt queries, by which a head finds the head of the anchor layer that it follows.
    """

    group_reduction: Reduction = "mean"
    anchors: int | str | None = setting(
        None,
        "names layers from 1 on, ascending, as 2-8-13-14, or None for equal distances",
        lambda given: given is None or _is_list(given),
    )
    dense_first: bool = True
    window: int = at_least(1, 32)


class Kascade(KeptEntries):
    """An anchor layer chooses K entries in every step, any other those of the anchor layer below it, head by head.

    Attributes:
        anchor: the anchor layer at or below this one.
        of_prompt: `[B, Hkv, L]` bool, of an anchor layer: the best K of the prompt's tokens by its last queries.
        chosen: `[B, Hkv, L]` bool, of an anchor layer: the best K in the newest step.
        heads: `[B, Hkv]` int64, of any other layer: the heads of the anchor layer that its heads follow.
    """

    settings: KascadeSettings
    of_prompt: Tensor | None = None
    chosen: Tensor | None = None
    heads: Tensor | None = None

    def __init__(self, settings: KascadeSettings, layer: int, layers: int) -> None:
        super().__init__(settings, layer, layers)
        self.is_anchor = layer in anchor_layers(settings, layers)

    @property
    def anchor(self) -> Kascade:
        layer = self
        while not layer.is_anchor:
            assert isinstance(layer.below, Kascade)
            layer = layer.below
        return layer

    def begin(self, prompt: Look) -> None:
        super().begin(prompt)
        assert prompt.cache.queries is not None
        votes = reduce_group(prompt.votes(prompt.cache.queries), prompt.cache.kv_heads, "mean")
        if self.is_anchor:
            self.of_prompt = prompt.best(votes)
        else:
            followed = self.anchor.of_prompt
            assert followed is not None
            # [B, Hkv, heads of the anchor layer]: what this layer's heads would keep of their weight.
            self.heads = (votes @ followed.to(votes.dtype).transpose(1, 2)).argmax(-1)

    def choose(self, now: Look) -> Tensor:
        if self.is_anchor:
            self.chosen = now.best(now.scores(self.settings.group_reduction))
            if self.layer == 0 and self.settings.dense_first:
                return now.seen[:, None].expand_as(self.chosen)
            return self.chosen
        chosen = self.anchor.chosen
        assert chosen is not None
        heads = self.heads
        if heads is None:  # after a crop there was no prompt to learn from
            own = torch.arange(now.cache.kv_heads, device=chosen.device) % chosen.shape[1]
            heads = own.expand(len(chosen), -1)
        return chosen.gather(1, heads[..., None].expand(-1, -1, now.length))

    def overhead(self, now: Look) -> Tensor | int:
        """An anchor layer reads all keys, half of the entries, to choose; a dense one has read them."""
        reads = self.is_anchor and not (self.layer == 0 and self.settings.dense_first)
        return (now.tokens + 1) // 2 if reads else 0

    def crop(self, length: int) -> None:
        """Which heads follow which stays true; everything else is chosen anew in every step."""


def anchor_layers(settings: KascadeSettings, layers: int) -> list[int]:
    """The anchor layers among the `layers` served ones, ascending; the first is always one.

    Raises:
        ValueError: the settings name a layer that is not there.
    """
    if settings.anchors is not None:
        named = [int(number) for number in str(settings.anchors).split("-")]
        if named[-1] >= layers:
            raise ValueError(
                f"anchors names layer {named[-1]}, but {layers} layers are served; name layers from 1 to {layers - 1}"
            )
        return [0, *named]
    count = min(layers, max(2, round(layers * _ANCHORS / _LAYERS)))
    return [layers * anchor // count for anchor in range(count)]


def _is_list(given: int | str) -> bool:
    """Whether these are ascending numbers from 1 on, with `-` between them."""
    if not re.fullmatch(r"\d+(-\d+)*", str(given)):
        return False
    numbers = [int(number) for number in str(given).split("-")]
    return numbers[0] >= 1 and numbers == sorted(set(numbers))


METHOD = Method(
    name="kascade",
    label="Kascade, anchor layers",
    source=(
        'Deshmukh et al., "Kascade: A Practical Sparse Attention Method for Long-Context LLM Inference",'
        " arXiv 2512.16391"
    ),
    note=(
        "Exact top-K in anchor layers, the first layer dense, every other layer attends to what the anchor layer below"
        " it chose, head by head. The paper picks the anchor layers by dynamic programming and the heads to follow on"
        " development texts; here the layers stand at equal distances unless they are named, and heads are paired by"
        " the last 32 prompt queries. Prefill is dense. Choosing reads the keys, counted as half of every entry."
    ),
    settings=KascadeSettings,
    make=Kascade,
)
