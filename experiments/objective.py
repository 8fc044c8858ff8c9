"""The training loss: next token, plus look-ahead heads that are thrown away (ours).

A head for j = 2, 3, ... predicts the token j places on from the same last hidden state. It makes
the model start a look-up before the moment it needs the result, and learn faster.

Letters: B windows, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

NEWLINE_BYTE = "Ċ"  # how byte-level vocabularies spell "\n"


class LookAhead(nn.Module):
    """Residual linear maps [D, D], one for each distance 2 ... `furthest`."""

    def __init__(self, hidden: int, furthest: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Linear(hidden, hidden, bias=False) for _ in range(2, furthest + 1)
        )
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def loss(
        self, model: LlamaForCausalLM, hidden: Tensor, tokens: Tensor, answer: Tensor
    ) -> Tensor:
        """Mean cross-entropy over the distances.

        `hidden` [B, L, D], `tokens` [B, L+1], `answer` [B, L+1]. A position counts for distance j
        only where all of the next j tokens are answer tokens: what lies beyond cannot be known.
        """
        total = hidden.new_zeros(())
        length = hidden.shape[1]
        inside = answer[:, 1:]
        for j, module in enumerate(self.maps, start=2):
            inside = inside[:, :-1] & answer[:, j:]
            state = hidden[:, : length - j + 1][inside]
            logits = model.lm_head(state + module(state)).float()
            wanted = tokens[:, j:][inside]  # none, where no answer is so long
            total = total + F.cross_entropy(logits, wanted, reduction="sum") / max(len(wanted), 1)
        return total / max(len(self.maps), 1)


def hidden_states(model: LlamaForCausalLM, tokens: Tensor, positions: Tensor) -> Tensor:
    """Last hidden states [B, L, D] of `tokens` [B, L] at `positions` [B, L]."""
    # An explicit mask keeps transformers from reading a gap in `positions` as a new sequence.
    return model.model(
        tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False
    ).last_hidden_state


def next_token_loss(
    model: LlamaForCausalLM, hidden: Tensor, tokens: Tensor, answer: Tensor
) -> Tensor:
    """Cross-entropy of the answer tokens; shapes as in `LookAhead.loss`."""
    wanted = answer[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[wanted]).float(), tokens[:, 1:][wanted])


class Pupil(LlamaForCausalLM):
    """The model with its look-ahead heads: what is trained."""

    def __init__(self, config: LlamaConfig, furthest: int, weight: float) -> None:
        super().__init__(config)
        self.look_ahead, self.weight = LookAhead(config.hidden_size, furthest), weight

    def forward(self, input_ids: Tensor, answer: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Windows [B, L+1], where the loss falls in them, and positions [B, L].

        Returns:
            The `loss`, in nats a token of the answers. The heads have a part in its gradient alone.
        """
        hidden = hidden_states(self, input_ids[:, :-1], positions)
        loss = next_token_loss(self, hidden, input_ids, answer)
        extra = self.weight * self.look_ahead.loss(self, hidden, input_ids, answer)
        return {"loss": loss + (extra - extra.detach())}


@torch.no_grad()
def teacher_forced(
    model: LlamaForCausalLM, tokens: Tensor, answer: Tensor, positions: Tensor, newline: int
) -> float:
    """Share of whole answer lines that are right in dense windows, gold tokens fed; an `<eos>` counts as a line."""
    hidden = hidden_states(model, tokens[:, :-1], positions)
    wanted, target = answer[:, 1:], tokens[:, 1:]
    right = (model.lm_head(hidden[wanted]).argmax(-1) == target[wanted]).cpu().numpy()
    # All answers in one flat list: a line starts after every newline and every `<eos>`. A line cut
    # short by the window's end is counted together with the next window's first one.
    flat = target[wanted].cpu().numpy()
    ends = (flat == newline) | (flat == model.config.eos_token_id)
    starts = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
    lines = np.minimum.reduceat(right.astype(np.int64), starts)
    return float(lines.mean())
