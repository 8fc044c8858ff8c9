"""What must hold exactly, on every proven architecture, through an unmodified `generate`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

from .prompts import NEW, greedy, left_padded, logits, refreshed, tokens

RAGGED = [50, 37, 21]

# Everything of ours past the paper, for a prompt of some dozens of tokens.
OURS = {
    "recent": 3,
    "successor": 2,
    "window": 32,
    "anchor": 0.25,
    "trigger": "lse-drop",
    "drop": 1.0,
}
EVERY_OPTION = RefreshConfig(budget=0.25, stride=7, **OURS)

FULL_BY = {
    "budget": RefreshConfig(budget=1000, stride=5, threshold=None),
    "budget, never refreshed": RefreshConfig(budget=50 + NEW, stride=None),
    "stride 1, threshold 1": RefreshConfig(budget=4, stride=1, threshold=1.0),
    "stride 1, per head": RefreshConfig(budget=4, stride=1, threshold=1.0, decide="head"),
    "fixed stride 1": RefreshConfig(budget=4, stride=1, threshold=None),
    "mode full": RefreshConfig(mode="full"),
    **{
        f"budget, {name}": RefreshConfig(budget=1000, **{name: OURS[name]})
        for name in ("recent", "successor", "window", "anchor", "trigger")
    },
    "budget, every option": replace(EVERY_OPTION, budget=1000),
    "stride 1, every option": replace(EVERY_OPTION, budget=4, stride=1),
    "stride 1, threshold 1, every option": replace(
        EVERY_OPTION, budget=4, stride=1, threshold=1.0, trigger="query", drop=4.0
    ),
}


@pytest.mark.parametrize("config", FULL_BY.values(), ids=FULL_BY.keys())
def test_full_attention_tokens(model: PreTrainedModel, config: RefreshConfig) -> None:
    inputs = left_padded(RAGGED)
    assert torch.equal(refreshed(model, inputs, config), greedy(model, inputs))


@pytest.mark.parametrize("name", ["budget, every option", "stride 1, every option"])
def test_full_attention_beams(model: PreTrainedModel, name: str) -> None:
    inputs, beams = left_padded(RAGGED[1:]), {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        refreshed(model, inputs, FULL_BY[name], **beams), greedy(model, inputs, **beams)
    )


def test_logits_of_full_steps_are_those_of_full_attention(model: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    vanilla = logits(model, ids, 8)
    with refreshkv.attach(model, budget=4, stride=1, threshold=None):
        ours = logits(model, ids, 8)
    # Measured 3.5e-5 at most (Mixtral), on logits of size 10: sums in another order.
    torch.testing.assert_close(ours, vanilla, atol=2e-4, rtol=1e-4)


def test_a_small_budget_is_not_full_attention(model: PreTrainedModel) -> None:
    """The equalities above could hold because nothing is attached at all."""
    ids = tokens(2, 50)
    vanilla = logits(model, ids, 4)
    with refreshkv.attach(model, budget=4, stride=None) as session:
        ours = logits(model, ids, 4)
    if not session.stats.layers:
        assert model.config.sliding_window, "only a model of sliding layers alone may go unserved"
        torch.testing.assert_close(ours, vanilla)
    else:
        assert (ours[1:] - vanilla[1:]).abs().max() > 0.01
        torch.testing.assert_close(ours[0], vanilla[0])  # the prefill is untouched


@pytest.mark.parametrize(
    "config",
    [
        RefreshConfig(budget=8, stride=None),
        RefreshConfig(budget=0.25, stride=3, threshold=None),
        RefreshConfig(budget=0.25, stride=2, threshold=0.5),
        RefreshConfig(budget=12, stride=2, threshold=0.5, decide="head"),
        EVERY_OPTION,
    ],
    ids=["never", "fixed stride", "query comparison", "per head", "every option"],
)
def test_a_batch_equals_its_rows_alone(model: PreTrainedModel, config: RefreshConfig) -> None:
    inputs = left_padded(RAGGED)
    batch = refreshed(model, inputs, config)
    for row, length in enumerate(RAGGED):
        alone = refreshed(model, inputs["input_ids"][row : row + 1, -length:], config)
        assert torch.equal(batch[row], alone[0]), f"row {row}"


@pytest.mark.parametrize("chunk", [1, 7, 13, 39, 40])
@pytest.mark.parametrize(
    "config",
    [RefreshConfig(budget=0.25, stride=3, threshold=None), EVERY_OPTION],
    ids=["fixed stride", "every option"],
)
def test_the_chunk_size_of_prefill_changes_nothing(
    model: PreTrainedModel, config: RefreshConfig, chunk: int
) -> None:
    ids = tokens(2, 40)  # 13 leaves a last chunk of one token, which looks like a decode step
    assert torch.equal(
        refreshed(model, ids, config, prefill_chunk_size=chunk), refreshed(model, ids, config)
    )


@pytest.mark.parametrize("length", [1, 5, 31, 32])
def test_a_prompt_may_be_shorter_than_the_window(llama: PreTrainedModel, length: int) -> None:
    ids = tokens(2, length)
    wide = refreshed(llama, ids, replace(EVERY_OPTION, window=1000))
    assert torch.equal(refreshed(llama, ids, EVERY_OPTION), wide)
    full = replace(EVERY_OPTION, budget=1000)
    assert torch.equal(refreshed(llama, ids, full), greedy(llama, ids))


def test_a_huge_drop_is_never_to_refresh(model: PreTrainedModel) -> None:
    inputs = left_padded(RAGGED)
    never = refreshed(model, inputs, RefreshConfig(budget=8, stride=None))
    huge = RefreshConfig(budget=8, stride=None, trigger="lse-drop", drop=1e6)
    assert torch.equal(refreshed(model, inputs, huge), never)


class WindowOneSnapKV:
    """SnapKV with observation window 1 and a fixed K, written without our package: the independent yardstick."""

    def __init__(self, budget: int) -> None:
        self.budget, self.ranked = budget, {}

    def step(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query `[Hq, D]`; keys, values `[Hkv, L, D]`, the new token last. `[Hq, D]`."""
        group, out = query.shape[0] // keys.shape[0], []
        for head in range(keys.shape[0]):
            ranked = self.ranked[layer][head]  # positions, worst first
            ranked.append(keys.shape[1] - 1)
            del ranked[: max(0, len(ranked) - self.budget)]
            q = query[head * group : (head + 1) * group]
            weights = (q @ keys[head, ranked].T * q.shape[-1] ** -0.5).softmax(-1)
            out.append(weights @ values[head, ranked])
        return torch.cat(out)

    def prompt(self, layer: int, query: Tensor, keys: Tensor) -> None:
        group = query.shape[0] // keys.shape[0]
        weights = (
            (query.unflatten(0, (-1, group)) @ keys.transpose(1, 2) * query.shape[-1] ** -0.5)
            .softmax(-1)
            .amax(1)
        )
        pooled = [
            [max(head[max(0, i - 3) : i + 4]) for i in range(len(head))]
            for head in weights.tolist()
        ]
        order = [sorted(range(len(head)), key=lambda i: (head[i], i)) for head in pooled]
        self.ranked[layer] = [positions[-self.budget :] for positions in order]


def test_never_refreshing_is_window_one_snapkv(llama: PreTrainedModel) -> None:
    from transformers import AttentionInterface, DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    snapkv = WindowOneSnapKV(budget=9)

    def attention(module, query, key, value, mask, **options):  # type: ignore[no-untyped-def]
        if query.shape[2] == 1:
            return snapkv.step(module.layer_idx, query[0, :, 0], key[0], value[0])[None, None], None
        snapkv.prompt(module.layer_idx, query[0, :, -1], key[0])
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("snapkv_of_the_test", attention)
    AttentionMaskInterface.register("snapkv_of_the_test", sdpa_mask)
    ids = tokens(1, 60)
    ours = refreshed(llama, ids, RefreshConfig(budget=9, stride=None), new=30)
    llama.set_attn_implementation("snapkv_of_the_test")
    try:
        expected = greedy(llama, ids, new=30, past_key_values=DynamicCache(config=llama.config))
    finally:
        llama.set_attn_implementation("sdpa")
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, greedy(llama, ids, new=30))


def test_after_j_partial_steps_the_best_and_the_newest_remain(llama: PreTrainedModel) -> None:
    ids, budget = tokens(1, 48), 12
    with torch.no_grad(), refreshkv.attach(llama, budget=budget, stride=None) as session:
        cache = session.new_cache()
        llama(ids, past_key_values=cache)
        llama(tokens(1, 1, seed=1), past_key_values=cache)
        rings = [layer.inner.ring for layer in cache.layers]
        best = [
            ring.positions.clone() for ring in rings
        ]  # slot 0 was the lowest of the K; the new token took it
        for j in range(2, budget + 4):
            llama(tokens(1, 1, seed=j), past_key_values=cache)
            newest = set(range(48, 48 + j)) if j <= budget else set(range(48 + j - budget, 48 + j))
            for ring, first in zip(rings, best, strict=True):
                for head in range(ring.positions.shape[1]):
                    kept = set(first[0, head, j:].tolist()) if j < budget else set()
                    assert set(ring.positions[0, head].tolist()) == kept | newest
