"""A start for the bundled model in which it already knows how to look things up (ours).

From a random start a model of this size shows no induction (find the earlier occurrence of what
was just read, copy what followed it) within the compute we allow ourselves. So the weights start
as a hand-made induction circuit plus noise, and training turns that into the tasks. The model
card says so.

The residual stream (D = 256) is split by a random orthogonal basis into

    constant   1 dim   the same for every token
    own       63 dims  which token this is
    slot 0-3  48 dims  each; which token stands 1, 2, 3, 4 places back

* Layer 0, head h: looks h+1 places back and copies `own` of that token into slot h. Query and key
  read only the constant; RoPE does the rest, because the query is the key turned by h+1 positions.
  Only the fastest frequencies are used, which tell neighbours apart.
* Layers 1 and 2 match n-grams. The key is the four slots, that is the tokens *before* a position;
  the query is (own, slot 0, 1, 2), the tokens *up to* a position. They agree where the same
  n-gram occurred, one place after its end. The first query head of each KV head copies `own` found
  there into `own` here, and the tied output embedding turns that into a prediction. The second one
  matches with the query moved by one or two slots, so it lands one or two tokens further on: a
  look-ahead, put into a random subspace for training to use.
* The last layer, all MLPs and everything else are small noise.

Before any training layer 1 puts most of its attention on the right token at 512 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention

SLOTS = 4  # one a head of layer 0
OWN = 63
MATCHER_LAYERS = (1, 2)

CONSTANT_SIZE = 0.5  # length of the constant part of an embedding; the own part has length 1
SLOT_SIZE = 0.7  # length of a filled slot
BACK_SHARPNESS = 4.0  # layer 0: the score of the right place is 8 times this
MATCH_SHARPNESS = 6.0  # layers 1-2: score of one matching token, before the position weights
LOOK_AHEAD = 0.8  # relative sharpness of the moved query
COPY_SIZE = 0.72  # what a match adds to `own`
LOOK_AHEAD_SIZE = 0.4
# How much each of the four tokens of an n-gram counts, by KV head.
NGRAM_WEIGHTS = ((1.0, 1.0, 1.0, 0.8), (1.0, 1.0, 0.6, 0.4))
# Matching must not depend on distance: the fast 55 % of the RoPE frequencies count a fifth.
FAST_SHARE, FAST_WEIGHT = 0.55, 0.2


@dataclass(frozen=True)
class Basis:
    """The split of the residual stream; columns are orthonormal.

    `constant` [D], `own` [D, 63], `slots` 4 x [D, S] (S = slot width), `squeeze` [S, 63] maps own
    to slot coordinates and keeps lengths on average.
    """

    constant: Tensor
    own: Tensor
    slots: tuple[Tensor, ...]
    squeeze: Tensor

    @property
    def width(self) -> int:
        """S, the dimensions of a slot."""
        return self.squeeze.shape[0]


@torch.no_grad()
def structured_start(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Overwrite all weights of `model` in place; the same seed gives the same weights.

    Needs head size 64, four or more layers of four query heads over two KV heads, tied embeddings
    and a hidden size of at least 128; raises `ValueError` otherwise.
    """
    config = model.config
    shape = (config.head_dim, config.num_attention_heads, config.num_key_value_heads)
    if shape != (64, SLOTS, 2) or config.num_hidden_layers <= max(MATCHER_LAYERS):
        raise ValueError(
            "the structured start needs 4 query heads over 2 KV heads of 64, 3+ layers"
        )
    if config.hidden_size < 64 + 16 * SLOTS or not config.tie_word_embeddings:
        raise ValueError("the structured start needs a hidden size >= 128 and tied embeddings")
    generator = torch.Generator().manual_seed(seed)
    basis = _make_basis(config.hidden_size, generator)
    _small_noise(model, generator)

    token = _noise((config.vocab_size, OWN), generator)
    token /= token.norm(dim=1, keepdim=True)
    embedding = token @ basis.own.T + CONSTANT_SIZE * basis.constant
    model.model.embed_tokens.weight.copy_(embedding)

    layers = model.model.layers
    inverse_frequency = model.model.rotary_emb.inv_freq.float().cpu()
    # RMSNorm makes every input sqrt(D) long; `scale` is its factor, known because the lengths are.
    length = 1.0 + CONSTANT_SIZE**2
    scale = math.sqrt(config.hidden_size / length)
    _look_back(layers[0].self_attn, basis, inverse_frequency, scale)
    length += SLOTS * SLOT_SIZE**2
    scale = math.sqrt(config.hidden_size / length)
    for index in MATCHER_LAYERS:
        _match_ngrams(layers[index].self_attn, basis, scale, generator)


def _look_back(
    attention: LlamaAttention, basis: Basis, inverse_frequency: Tensor, scale: float
) -> None:
    """Layer 0: head h copies `own` of the token h+1 back into slot h."""
    head = attention.head_dim
    half = head // 2
    amplitude = torch.zeros(half)
    amplitude[: half // 4] = 1.0  # the fastest quarter of the frequencies
    key = torch.cat([amplitude, torch.zeros(half)])
    size = math.sqrt(BACK_SHARPNESS * math.sqrt(head)) / (CONSTANT_SIZE * scale)
    for kv in range(2):
        rows = slice(kv * head, (kv + 1) * head)
        attention.k_proj.weight[rows] += size * torch.outer(key, basis.constant)
        attention.v_proj.weight[kv * head : kv * head + OWN] = basis.own.T
    for h, slot in enumerate(basis.slots):
        query = _rotate(key, -(h + 1.0), inverse_frequency)
        rows = slice(h * head, (h + 1) * head)
        attention.q_proj.weight[rows] += size * torch.outer(query, basis.constant)
        write = slot @ basis.squeeze * (SLOT_SIZE / scale)
        attention.o_proj.weight[:, h * head : h * head + OWN] = write


def _match_ngrams(
    attention: LlamaAttention, basis: Basis, scale: float, generator: torch.Generator
) -> None:
    """Layers 1 and 2: attend to the place after an earlier occurrence of the current n-gram."""
    head = attention.head_dim
    per_kv = attention.num_key_value_groups
    # The slots as read by the key, and the last four tokens (own first) as read by the query.
    before = [slot.T for slot in basis.slots]
    current = [basis.squeeze @ basis.own.T * SLOT_SIZE, *before[:-1]]
    size = math.sqrt(MATCH_SHARPNESS * math.sqrt(head)) / (scale * SLOT_SIZE)
    by_position = _position_weights(head)[:, None]
    for kv, weights in enumerate(NGRAM_WEIGHTS):
        # Each token of the n-gram is compared in a random subspace of the head of its own.
        spaces = [_orthonormal((head, head), generator)[:, : basis.width] for _ in before]
        spaces = [math.sqrt(w) * space for w, space in zip(weights, spaces, strict=True)]
        key = sum(space @ read for space, read in zip(spaces, before, strict=True))
        rows = slice(kv * head, (kv + 1) * head)
        attention.k_proj.weight[rows] += size * by_position * key
        attention.v_proj.weight[kv * head : kv * head + OWN] = basis.own.T
        for r in range(per_kv):
            # A query moved by m slots agrees with the key m places further on.
            moved = 0 if r == 0 else kv + 1
            query = sum(spaces[i] @ current[i - moved] for i in range(moved, SLOTS))
            strength = 1.0 if moved == 0 else LOOK_AHEAD * SLOTS / (SLOTS - moved)
            h = kv * per_kv + r
            rows = slice(h * head, (h + 1) * head)
            attention.q_proj.weight[rows] += size * strength * by_position * query
            if moved == 0:
                write = basis.own * (COPY_SIZE / scale)
            else:
                subspace = _orthonormal((basis.own.shape[0], OWN), generator)
                write = subspace * (LOOK_AHEAD_SIZE / scale)
            attention.o_proj.weight[:, h * head : h * head + OWN] += write


def _make_basis(hidden: int, generator: torch.Generator) -> Basis:
    """A random orthogonal split of `hidden` dimensions."""
    full = _orthonormal((hidden, hidden), generator)
    width = min((hidden - 1 - OWN) // SLOTS, OWN)
    start = 1 + OWN
    slots = tuple(full[:, start + width * i : start + width * (i + 1)] for i in range(SLOTS))
    squeeze = _orthonormal((OWN, width), generator).T * math.sqrt(OWN / width)
    return Basis(full[:, 0], full[:, 1:start], slots, squeeze)


def _small_noise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Fill every projection with small noise; norm weights become 1."""
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    deviation = {
        "q_proj": 0.02,
        "k_proj": 0.02,
        "v_proj": 0.02,
        "o_proj": 0.01,
        "gate_proj": 0.5 / math.sqrt(hidden),
        "up_proj": 0.5 / math.sqrt(hidden),
        "down_proj": 0.1 / math.sqrt(inner),
    }
    for name, weight in model.model.named_parameters():
        kind = name.split(".")[-2]
        if kind in deviation:
            weight.copy_(_noise(weight.shape, generator) * deviation[kind])
        elif weight.ndim == 1:
            weight.fill_(1.0)


def _position_weights(head: int) -> Tensor:
    """[head], mean square 1: how much each rotary dimension takes part in matching."""
    half = torch.ones(head // 2)
    half[: int(head // 2 * FAST_SHARE)] = FAST_WEIGHT
    weights = torch.cat([half, half])
    return weights / weights.square().mean().sqrt()


def _rotate(vector: Tensor, positions: float, inverse_frequency: Tensor) -> Tensor:
    """RoPE of `vector` [head] by `positions`, in Llama's half-split layout."""
    angle = torch.cat([inverse_frequency, inverse_frequency]) * positions
    first, second = vector.chunk(2)
    return vector * angle.cos() + torch.cat([-second, first]) * angle.sin()


def _noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _orthonormal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random matrix [rows, columns] with orthonormal columns."""
    return torch.linalg.qr(_noise(shape, generator))[0]
