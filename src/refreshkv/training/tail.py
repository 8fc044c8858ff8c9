"""Attention of the last tokens of a sequence as decoding would compute it, all steps at once and with gradients.

The first L tokens of a sequence are a prompt, the S after them are decode steps: what each attends to is known before
any of them is computed, because a fixed schedule depends on no query, and a ring loses its entries in a fixed order.
Selections are made by the functions of inference, and no gradient goes through them.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, T tokens, L of them before the tail, S in the tail,
K budget, D head dim, n entries. Source: RefreshKV, section 6; the fixed schedule and rounding are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refreshkv.config import RefreshConfig
from refreshkv.kernels import reference
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy.rounding import (
    BLOCK,
    largest_weights,
    restored,
    round_block,
    worth_reading,
)
from refreshkv.policy.selection import recent_share, select
from refreshkv.training.recipe import Keep


@dataclass(frozen=True, eq=False)
class Tail:
    """Which tokens are the tail, and what they attend to.

    Attributes:
        length: S, the last tokens of each sequence.
        config: mode "refresh" with a fixed stride or none, or mode "mixed".
        keep: what becomes of the K entries of a selection. "all": they stay, and the tokens after them come on top
            (the paper's training); "budget": each new token pushes out the lowest-scored, as in decoding. Mode "mixed"
            has no selection.

    Raises:
        ValueError: settings that cannot be computed for all steps at once, or a tail without tokens.
    """

    length: int
    config: RefreshConfig
    keep: Keep = "all"

    def __post_init__(self) -> None:
        config = self.config
        if self.length < 1:
            raise ValueError(f"the tail must have at least 1 token; got {self.length}")
        if self.keep not in ("all", "budget"):
            raise ValueError(f"keep must be 'all' or 'budget'; got {self.keep!r}")
        if config.mode not in ("refresh", "mixed"):
            raise ValueError(
                f"mode {config.mode!r} computes full attention, for which there is nothing to train; use 'refresh' or"
                " 'mixed'"
            )
        if config.mode == "mixed":
            return
        for name, plain in (("threshold", None), ("successor", 0), ("anchor", 0.0)):
            if getattr(config, name) != plain and not (name == "threshold" and not config.stride):
                raise ValueError(
                    f"{name} depends on one step after another, but training computes all at once; set {name}={plain}"
                )
        if config.trigger != "query" or config.score_only:
            raise ValueError(
                "training knows a fixed stride or none; use trigger='query' without score_only"
            )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttendOptions,
        dropout: float = 0.0,
    ) -> Tensor:
        """Attention of the last S tokens.

        Args:
            query: `[B, Hq, T, D]`, after RoPE and QK-norm; key and value likewise with Hkv heads.
            options: scale, softcap and sinks of the model.
            dropout: of the attention weights.

        Returns:
            `[B, Hq, S, D]` in the dtype of the values.
        """
        options = options.over(reduction=self.config.group_reduction)
        budget = self.config.resolve_budget(key.shape[2] - self.length)
        if self.config.mode == "mixed":
            return self._mixed(query, key, value, options, dropout, budget)
        first, length = key.shape[2] - self.length, key.shape[2]
        parts = []
        # A selection is made from the scores of the token `last`; the partial steps after it use it.
        for last in range(first - 1, length, self.config.stride or length):
            if last >= first:
                part = query[:, :, last : last + 1], key[:, :, : last + 1], value[:, :, : last + 1]
                parts.append(_attend(*part, options, None, dropout))
            end = min(last + (self.config.stride or length), length)
            if end > last + 1:
                chosen = self._chosen(query, key, options, last, budget, first)
                part = query[:, :, last + 1 : end], key[:, :, :end], value[:, :, :end]
                parts.append(self._partial(*part, options, chosen, budget, dropout))
        return torch.cat(parts, 2)

    @torch.no_grad()
    def _chosen(
        self, query: Tensor, key: Tensor, options: AttendOptions, last: int, budget: int, first: int
    ) -> Tensor:
        """`[B, Hkv, n]` int64: positions of the min(K, last + 1) tokens selected by the token `last`, lowest first."""
        rows = key.new_full((key.shape[0],), budget, dtype=torch.int64)
        window = min(self.config.window, first) if last < first else 1
        begin = last + 1 - window
        scores = reference.vote(
            query[:, :, begin : last + 1],
            Entries(key[:, :, : last + 1]),
            options,
            starts=torch.full_like(rows, begin),
        ).scores
        selected = select(
            scores,
            rows,
            pool_kernel=self.config.pool_kernel,
            recent=recent_share(rows, self.config.recent),
            slots=min(budget, last + 1),
        )
        return selected.positions.long()

    def _partial(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttendOptions,
        chosen: Tensor,
        budget: int,
        dropout: float,
    ) -> Tensor:
        """Steps over what was `chosen`, and over the tokens since; those are the last ones of `key`, as the queries."""
        steps, slots = query.shape[2], chosen.shape[2]
        at = chosen[..., None]
        entries = (
            torch.cat([torch.take_along_dim(part, at, 2), part[:, :, -steps:]], 2)
            for part in (key, value)
        )
        step = torch.arange(steps, device=key.device)
        since = step[:, None] - step  # how many tokens ago
        slot = torch.arange(slots, device=key.device)
        if self.keep == "budget":
            # Step i, from 0, is the (i + 1)-th token to enter: free slots first, then over the lowest-scored.
            old = slot > step[:, None] - (budget - slots)
            new = (since >= 0) & (since < budget)
        else:
            old, new = torch.ones_like(slot > step[:, None]), since >= 0
        return _attend(query, *entries, options, torch.cat([old, new], 1), dropout)

    def _mixed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttendOptions,
        dropout: float,
        budget: int,
    ) -> Tensor:
        """Steps over rounded entries and the exact ones of those that have weight; gradients ignore the rounding."""
        length, heads = key.shape[2], key.shape[1]
        query, steps = query[:, :, -self.length :], self.length
        position = torch.arange(length, device=key.device)
        now = position[-steps:, None]
        seen, block = position <= now, position // BLOCK
        finished = now // BLOCK
        covered = block < finished  # [S, T]
        rough_key, rough_value = (
            _straight_through(part, bits)
            for part, bits in ((key, self.config.key_bits), (value, self.config.value_bits))
        )
        exact = _logits(query, key, options)
        rough = torch.where(covered, _logits(query, rough_key, options), exact)
        with torch.no_grad():
            hidden = rough.masked_fill(~seen, float("-inf")).float()
            total = hidden.logsumexp(-1)
            if options.sinks is not None:
                total = torch.logaddexp(total, options.sinks.float()[:, None])
            # One step a row, as the rule takes them.
            weights = largest_weights(
                hidden.transpose(1, 2).flatten(0, 1), total.transpose(1, 2).flatten(0, 1), heads
            ).unflatten(0, (-1, steps))
            weights = weights.transpose(1, 2).masked_fill(~covered, float("-inf"))  # [B, Hkv, S, T]
            rows = torch.full((len(key) * steps,), budget, device=key.device)
            chosen = worth_reading(weights.transpose(1, 2).flatten(0, 1), rows)
            chosen = chosen.unflatten(0, (-1, steps)).transpose(1, 2)
            rounded = covered & ~chosen
            shares = (hidden - total[..., None]).exp().unflatten(1, (heads, -1))
            shares = shares * rounded[:, :, None]
            shares = F.pad(shares, (0, -length % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
            masses = shares.amax(2)  # [B, Hkv, S, blocks]
            read = ~(masses < self.config.skip / finished.clamp(min=1)) & (masses != 0)
            seen = seen & ~(rounded & ~read.repeat_interleave(BLOCK, -1)[..., :length])
            group = query.shape[1] // heads
            rounded, seen = (part.repeat_interleave(group, 1) for part in (rounded, seen))
        weights = _weights(torch.where(rounded, rough, exact), seen, options, dropout)
        of_codes = _weighted(weights * rounded, rough_value)
        return (of_codes + _weighted(weights * ~rounded, value)).to(value.dtype)


def _straight_through(numbers: Tensor, bits: int) -> Tensor:
    """Keys or values `[B, Hkv, T, D]` as their codes give them, in whole blocks; the gradient is that of the exact."""
    whole = numbers.shape[2] // BLOCK * BLOCK
    with torch.no_grad():
        blocks = numbers[:, :, :whole].unflatten(2, (-1, BLOCK))
        error = restored(round_block(blocks, bits)).flatten(2, 3) - numbers[:, :, :whole]
        error = F.pad(error, (0, 0, 0, numbers.shape[2] - whole))
    return numbers + error


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttendOptions,
    seen: Tensor | None,
    dropout: float,
) -> Tensor:
    """`[B, Hq, t, D]`; `seen` `[t, n]` bool, `None` when everything is."""
    weights = _weights(_logits(query, key, options), seen, options, dropout)
    return _weighted(weights, value).to(value.dtype)


def _logits(query: Tensor, key: Tensor, options: AttendOptions) -> Tensor:
    """`[B, Hq, t, n]` in at least float32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (key.shape[1], -1))
    logits = grouped.flatten(2, 3) @ key.to(wide).transpose(-1, -2) * options.scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits.unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def _weights(logits: Tensor, seen: Tensor | None, options: AttendOptions, dropout: float) -> Tensor:
    """Softmax of `[B, Hq, t, n]` over what is `seen`, which broadcasts to that, and over the head's sink."""
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    if options.sinks is None:
        weights = logits.softmax(-1)
    else:
        sinks = options.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return F.dropout(weights, dropout) if dropout else weights


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """`[B, Hq, t, n]` of values `[B, Hkv, n, D]` -> `[B, Hq, t, D]`."""
    grouped = weights.unflatten(1, (value.shape[1], -1))
    output = grouped.flatten(2, 3) @ value.to(weights.dtype)
    return output.unflatten(2, grouped.shape[2:4]).flatten(1, 2)
