"""Squeezed Attention: the keys of a fixed prefix lie in clusters, and a step reads those that its query is near."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import Grouped, at_least, setting
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method
from refreshkv.policy.selection import reduce_group

_ROUNDS = 50  # of k-means, if it does not settle before


@dataclass(frozen=True, kw_only=True)
class SqueezedSettings(Grouped):
    """Settings of Squeezed Attention; K is what a head reads of the prompt in the mean.

    Attributes:
        clusters: how many there are, as a share of the prefix's tokens (paper: 0.05).
        window: the last tokens of the prompt, which are not of the fixed prefix: the question, in the paper.
    """

    clusters: float = setting(0.05, "is a share of the prefix in (0, 1]", lambda c: 0.0 < c <= 1.0)
    window: int = at_least(1, 32)


class SqueezedAttention(KeptEntries):
    """Everything after the prefix, and those clusters of the prefix whose keys get more weight than a threshold.

    Attributes:
        labels: `[B, Hkv, P]` int64, the cluster of each token of the prefix; `None`: there is no prefix.
        centres: `[B, Hkv, C, D]` float32, the mean key of each cluster.
        sizes: `[B, Hkv, C]` float32, its tokens.
        threshold: `[B]` float32, one for all heads.
        clusters: `[B]` int64, how many there are.
    """

    settings: SqueezedSettings
    labels: Tensor | None = None
    centres: Tensor | None = None
    sizes: Tensor | None = None
    threshold: Tensor | None = None
    clusters: Tensor | None = None

    def begin(self, prompt: Look) -> None:
        super().begin(prompt)
        length = max(0, prompt.length - self.settings.window)
        seen = prompt.seen[:, :length]
        keys = prompt.keys[:, :, :length].float().masked_fill(~seen[:, None, :, None], 0.0)
        if not seen.any():
            return
        # The inner rounding undoes float noise, as for a budget.
        share = (seen.sum(-1).double() * self.settings.clusters).mul(1e9).round().div(1e9)
        self.clusters = share.ceil().long()
        self.labels = k_means(F.normalize(keys, dim=-1), seen, self.clusters)
        self.centres, self.sizes = _means(keys, self.labels, seen, int(self.clusters.max()))
        self.threshold = self._calibrated(prompt, seen.sum(-1))

    def choose(self, now: Look) -> Tensor:
        every = now.seen[:, None].expand(-1, now.cache.kv_heads, -1)
        if self.labels is None:
            return every
        assert self.threshold is not None
        weights = self.weights(now.query[:, :, None], now.options)[:, :, 0]
        near = (weights >= self.threshold[:, None, None]).gather(-1, self.labels)
        length = self.labels.shape[-1]
        return torch.cat([near & every[..., :length], every[..., length:]], -1)

    def overhead(self, now: Look) -> Tensor | int:
        """The centres, each of which is a key: half of an entry."""
        return 0 if self.clusters is None else (self.clusters + 1) // 2

    def weights(self, queries: Tensor, options: AttendOptions) -> Tensor:
        """`[B, Hkv, T, C]` float32: what a key at each cluster's centre gets of the queries `[B, Hq, T, D]`."""
        assert self.centres is not None and self.sizes is not None
        kv_heads = self.centres.shape[1]
        grouped = queries.float().unflatten(1, (kv_heads, -1))
        logits = grouped @ self.centres[:, :, None].mT * options.scale
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        sizes = self.sizes[:, :, None, None]
        # A row without a prefix has no cluster at all.
        shares = (logits + sizes.log()).softmax(-1).nan_to_num(0.0) / sizes.clamp(min=1)
        return reduce_group(shares.flatten(1, 2), kv_heads, self.settings.group_reduction)

    def crop(self, length: int) -> None:
        """Without a part of its prefix a text has none, until its next prompt."""
        if self.labels is not None and length < self.labels.shape[-1]:
            self.reset()

    def _calibrated(self, prompt: Look, tokens: Tensor) -> Tensor:
        """The threshold with which the last prompt queries read K in the mean, of a prefix of `tokens` `[B]`."""
        queries, budget = prompt.cache.queries, prompt.cache.budget
        assert queries is not None and budget is not None and self.sizes is not None
        weights = self.weights(queries, prompt.options)
        sizes = self.sizes[:, :, None].expand_as(weights)
        best, order = weights.flatten(1).sort(dim=-1, descending=True, stable=True)
        read = sizes.flatten(1).gather(-1, order).double().cumsum(-1)
        # The window and the token being decoded are read anyway.
        wanted = (budget - self.settings.window - 1).clamp(min=0)
        heads = weights.shape[1] * weights.shape[2]
        fits = (read <= (wanted * heads)[:, None]).sum(-1, keepdim=True)
        least = F.pad(best, (1, 0), value=math.inf).gather(-1, fits)[:, 0]
        return least.masked_fill(wanted >= tokens, 0.0)


def k_means(points: Tensor, seen: Tensor, clusters: Tensor) -> Tensor:
    """The cluster of each of the points `[B, H, P, D]`, `[B, H, P]` int64, by Lloyd's algorithm.

    It starts from points at equal distances in the text, so that nothing is drawn by chance. `seen` `[B, P]` bool: the
    others count nowhere. `clusters` `[B]`: how many; a cluster that has lost all of its points stays where it was.
    """
    most, tokens = int(clusters.max()), seen.sum(-1, keepdim=True)
    number = torch.arange(most, device=points.device)
    first = number * tokens // clusters[:, None].clamp(min=1)
    column = torch.searchsorted(seen.cumsum(-1), first + 1).clamp(max=points.shape[2] - 1)
    centres = points.gather(
        2, column[:, None, :, None].expand(-1, points.shape[1], -1, points.shape[3])
    )
    absent = (number >= clusters[:, None])[:, None, None]
    labels: Tensor | None = None
    for _ in range(_ROUNDS):
        near = points @ centres.mT - centres.square().sum(-1)[:, :, None] / 2
        before, labels = labels, near.masked_fill(absent, -math.inf).argmax(-1)
        if before is not None and torch.equal(before, labels):
            break
        means, sizes = _means(points, labels, seen, most)
        centres = means.where(sizes[..., None] > 0, centres)
    assert labels is not None
    return labels


def _means(points: Tensor, labels: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean of each of the `count` clusters, `[B, H, C, D]`, and its size, `[B, H, C]`; 0 for an empty one."""
    members = F.one_hot(labels, count).to(points.dtype) * seen[:, None, :, None]
    sizes = members.sum(2)
    return members.mT @ points / sizes[..., None].clamp(min=1), sizes


METHOD = Method(
    name="squeezed",
    label="Squeezed Attention",
    source=(
        'Hooper et al., "Squeezed Attention: Accelerating Long Context Length LLM Inference", ACL 2025,'
        " arXiv 2411.09688"
    ),
    note=(
        "K-means of the normalised keys of a fixed prefix, one cluster for 20 tokens, and a threshold on the weight of"
        " a key at the centre; everything after the prefix is read. The prefix is the prompt but its last 32 tokens."
        " Their queries set the threshold so that K tokens of the prompt are read in the mean: one for all heads of a"
        " layer (the paper: for all layers, by earlier queries). K-means starts from tokens at equal distances. One"
        " level of clusters; the paper also has two. Counts the centres as half an entry each."
    ),
    settings=SqueezedSettings,
    make=SqueezedAttention,
)
