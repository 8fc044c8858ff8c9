"""How many tokens are drafted, which of them stand, and the token after them.

The text has exactly the target's distribution.
Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, algorithm 1.
Letters: B batch, s drafted tokens, V vocabulary. Drafts beyond a row's count do not exist.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DraftLength:
    """How many tokens each row drafts in a cycle: more after drafts that all stood (ours).

    Args:
        most: tokens that a row drafts at most.
        confidence: a row stops after a token whose best alternative has a probability below this, whatever it draws
            there: else the draws that count would no longer be draws from their distribution.
        like: `[B]` int64, for the number of rows and the device.

    Attributes:
        length: `[B]` int64, drafts of each row in the next cycle.
    """

    def __init__(self, most: int, confidence: float, like: Tensor) -> None:
        self.most = most
        self.confidence = confidence
        self.length = torch.full_like(like, most)

    def within(self, active: Tensor, room: Tensor | None) -> Tensor:
        """`[B]` drafts of this cycle: none of rows that are not `active`, and a row with `room` for n tokens n - 1."""
        counts = torch.where(active, self.length, 0)
        return counts if room is None else torch.minimum(counts, (room - 1).clamp(min=0))

    def goes_on(self, drafted: Tensor, counts: Tensor, probabilities: Tensor) -> Tensor:
        """`[B]` bool, rows that draft on after `drafted` of `counts` tokens; the last from `probabilities` `[B, V]`."""
        return (drafted < counts) & (probabilities.amax(-1) >= self.confidence)

    def learn(self, active: Tensor, counts: Tensor, accepted: Tensor) -> None:
        """A row whose drafts all stood dares more; another, a little more than what stood. All `[B]`."""
        longer = torch.where(accepted == counts, counts + 2, accepted + 2).clamp(max=self.most)
        self.length.copy_(torch.where(active, longer, self.length))


def accept_greedy(drafts: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts stand as long as each is the target's choice.

    Args:
        drafts: `[B, s]` int64.
        targets: `[B, s + 1]` int64, the choice after the last sure token and after each draft.
        counts: `[B]` int64, drafts of each row.

    Returns:
        `[B]` int64, how many drafts stand; `[B]` int64, the token after them.
    """
    right = (drafts == targets[:, :-1]) & _real(drafts, counts)
    accepted = right.cumprod(1).sum(1)
    return accepted, targets.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    drafts: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    counts: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A draft x from q stands with probability min(1, p(x) / q(x)); for a refused one comes a draw from max(p - q, 0).

    Args:
        drafts: `[B, s]` int64, drawn from `draft_probs`.
        draft_probs: `[B, s, V]`, q of each draft.
        target_probs: `[B, s + 1, V]`, p after the last sure token and after each draft.
        counts: `[B]` int64, drafts of each row.
        generator: of the random numbers; `None` is torch's default.

    Returns:
        As `accept_greedy`.
    """
    p = target_probs[:, :-1].gather(2, drafts[..., None])[..., 0]
    q = draft_probs.gather(2, drafts[..., None])[..., 0]
    chance = torch.rand(drafts.shape, generator=generator, device=drafts.device, dtype=p.dtype)
    accepted = ((chance * q < p) & _real(drafts, counts)).cumprod(1).sum(1)
    rows = torch.arange(len(drafts), device=drafts.device)
    target = target_probs[rows, accepted]
    # Where all drafts of a row stand, nothing was proposed for the next token.
    proposed = torch.nn.functional.pad(draft_probs, (0, 0, 0, 1))[rows, accepted]
    proposed = proposed.masked_fill((accepted >= counts)[:, None], 0.0)
    left = (target - proposed).clamp(min=0.0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, target)  # p = q, but for rounding
    return accepted, draw(left, generator)


def draw(shares: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw from each of `shares` `[B, V]`, which need not sum to 1; `[B]` int64.

    As `torch.multinomial` draws, but that first asks the device whether the shares make sense.
    """
    waits = torch.empty_like(shares).exponential_(generator=generator)
    return (shares / waits).argmax(-1)


def _real(drafts: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(drafts.shape[1], device=drafts.device) < counts[:, None]
