"""SubGen: the newest tokens exactly, a reservoir of values for those before, clusters of keys for their denominator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refreshkv.config import Budgeted, at_least
from refreshkv.methods.kept import Evicting, Look
from refreshkv.methods.method import Method


@dataclass(frozen=True, kw_only=True)
class SubGenSettings(Budgeted):
    """Settings of SubGen.

    Attributes:
        samples: keys of a cluster that stand for all of it.
        seed: of the chance by which a newer token replaces what stands for the older ones.
    """

    samples: int = at_least(1, 1)
    seed: int = at_least(0, 0)


class SubGen(Evicting):
    """Once K tokens have come, those before a window of K/2 are known by samples alone.

    A quarter of K is a reservoir of entries, drawn by the squared norm of their values, which stands for the numerator
    of the softmax; a quarter are keys, those drawn from each cluster and its centre, which stand for the denominator.
    A token belongs to the centre that its key is nearest to; the centres are keys of the prompt, far from each other.

    Attributes:
        centres: `[B, Hkv, C, D]` float32.
    """

    settings: SubGenSettings
    centres: Tensor | None = None

    def begin(self, prompt: Look) -> None:
        super().begin(prompt)
        most = int(self._parts(prompt)[1].max())
        self.centres = farthest_first(prompt.keys.float(), prompt.seen, most)

    def choose(self, now: Look) -> Tensor:
        """The window."""
        budget = now.cache.budget
        assert budget is not None
        window = torch.where(now.tokens > budget, budget - self.overhead(now), now.tokens)
        newest = now.seen.cumsum(-1) > (now.tokens - window)[:, None]
        self.kept = (now.seen & newest)[:, None].expand(-1, now.cache.kv_heads, -1)
        return self.kept

    def overhead(self, now: Look) -> Tensor:
        """The reservoir, and the keys, which are half of an entry."""
        assert now.cache.budget is not None
        slots, clusters = self._parts(now)
        keys = clusters * (self.settings.samples + 1)
        return (slots + (keys + 1) // 2) * (now.tokens > now.cache.budget)

    def attend(self, now: Look, kept: Tensor) -> Tensor:
        padding = ~now.seen[:, None, :, None]
        keys, values = (
            part[:, :, : now.length].float().masked_fill(padding, 0.0)
            for part in now.cache.store.dense()
        )
        above, below = (weights[:, :, None] for weights in self.weights(now, kept, keys, values))
        options = now.options
        logits = now.query.float().unflatten(1, (keys.shape[1], -1)) @ keys.mT * options.scale
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        taken = (above > 0) | (below > 0)
        logits = logits.masked_fill(~taken, -torch.inf)
        peak = logits.amax(-1, keepdim=True)
        mass = (logits - peak).exp()
        total = (mass * below).sum(-1, keepdim=True)
        if options.sinks is not None:
            total = total + (options.sinks.float().view(1, *peak.shape[1:]) - peak).exp()
        # Attention gives nothing larger than the largest value; where samples miss a heavy key, the ratio may.
        most = values.abs().amax((2, 3))[..., None, None]
        output = ((mass * above) @ values / total).clamp(-most, most)
        return output.flatten(1, 2).to(now.query.dtype)

    def weights(
        self, now: Look, kept: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`[B, Hkv, L]` float32: how often each token counts above and below the line; 1 in the mean over all seeds."""
        slots, clusters = self._parts(now)
        older = now.seen & ~kept[:, 0]
        most = int(slots.max())
        if not most:
            return kept.float(), kept.float()
        assert self.centres is not None
        samples, place = self.settings.samples, torch.arange(now.length, device=older.device)
        by_chance = chance(
            now.seen.cumsum(-1), samples + most, self.settings.seed * 1009 + self.layer
        )
        norms = values.double().square().sum(-1) * older[:, None]
        mass = norms.cumsum(-1)  # the same whatever padding stands before
        enters = by_chance[:, None, :, samples:] * mass[..., None] < norms[..., None]
        enters = enters & (torch.arange(most, device=older.device) < slots[:, None])[:, None, None]
        in_slot = place[:, None].where(enters, -1).amax(2)  # [B, Hkv, slots]
        share = mass[..., -1:] / slots[:, None, None] / norms.gather(-1, in_slot.clamp(min=0))
        above = kept.double().scatter_add(-1, in_slot.clamp(min=0), share.where(in_slot >= 0, 0.0))
        # [B, Hkv, L, C]
        near = keys @ self.centres.mT - self.centres.square().sum(-1)[:, :, None] / 2
        absent = torch.arange(near.shape[-1], device=near.device) >= clusters[:, None]
        label = near.masked_fill(absent[:, None, None], -torch.inf).argmax(-1, keepdim=True)
        member = torch.zeros_like(near, dtype=torch.int64).scatter(-1, label, 1)
        member = member * older[:, None, :, None]
        number = member.cumsum(2).gather(-1, label)
        below = kept.double()
        for sample in range(samples):
            enters = by_chance[:, None, :, sample, None] * number < 1
            drawn = place[:, None].where(enters & (member > 0), -1).amax(2)  # [B, Hkv, C]
            share = member.sum(2).double() / samples
            below = below.scatter_add(-1, drawn.clamp(min=0), share.where(drawn >= 0, 0.0))
        return above.float(), below.float()

    def _parts(self, now: Look) -> tuple[Tensor, Tensor]:
        """`[B]`: the slots of the reservoir, and how many clusters there are; none of either where K is too small."""
        budget = now.cache.budget
        assert budget is not None
        slots = budget // 4
        clusters = slots * 2 // (self.settings.samples + 1)
        return slots * (clusters > 0), clusters


def farthest_first(points: Tensor, seen: Tensor, count: int) -> Tensor:
    """`[B, H, count, D]`: the first of the points `[B, H, L, D]`, then always the one farthest from those before.

    `seen` `[B, L]` bool: the others are none of them.
    """
    at = seen.int().argmax(-1)[:, None, None].expand(-1, points.shape[1], -1)
    found, distance = [], torch.full_like(points[..., 0], torch.inf)
    for _ in range(count):
        found.append(points.gather(2, at[..., None].expand(-1, -1, -1, points.shape[-1])))
        distance = distance.minimum((points - found[-1]).square().sum(-1))
        at = distance.masked_fill(~seen[:, None], -1.0).argmax(-1, keepdim=True)
    return torch.cat(found, 2) if found else points[:, :, :0]


def chance(place: Tensor, count: int, seed: int) -> Tensor:
    """`[B, L, count]` float64 in [0, 1), which depends on nothing but the place `[B, L]` in the text and the seed."""
    mixed = place[..., None] * 0x9E3779B1 + torch.arange(count, device=place.device) * 0x85EBCA6B
    mixed = (mixed + (seed * 0xC2B2AE35 & 0xFFFFFFFF)) & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)).double() / 2**32


METHOD = Method(
    name="subgen",
    label="SubGen",
    source='Zandieh et al., "SubGen: Token Generation in Sublinear Time and Memory", arXiv 2402.06082, algorithm 1',
    note=(
        "The numerator by a reservoir drawn by squared norms, the denominator by samples of clusters, the newest"
        " tokens exactly: the paper. Ours: K is shared out as 1/2, 1/4 and 1/4, and until K tokens have come all are"
        " exact; the centres are keys of the prompt, each the farthest from those before (the paper opens a cluster"
        " where a key is farther than a radius from all); no component of an output exceeds the largest of the"
        " values; chance depends on the place in the text alone. Counts the window, the reservoir, and half an entry"
        " for each centre and sample."
    ),
    settings=SubGenSettings,
    make=SubGen,
)
