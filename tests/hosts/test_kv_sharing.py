"""Models whose last layers read the keys of an earlier layer: the earlier layer is served, the readers stay full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

from .prompts import greedy, left_padded, logits, refreshed

SHARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6},
    ),
    "gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM", {"global_head_dim": 16}),
}


@pytest.fixture(params=SHARED)
def sharing(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Six layers, sliding and full in turn; the last two own no keys."""
    config_name, model_name, differs = SHARED[request.param]
    if not hasattr(transformers, config_name):
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    config = getattr(transformers, config_name)(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **differs,
    )
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@pytest.mark.parametrize(
    "config",
    [
        RefreshConfig(budget=1000, stride=4, threshold=None),
        RefreshConfig(budget=5, stride=1, threshold=1.0),
        RefreshConfig(mode="mixed", budget=1000),
    ],
    ids=["large budget", "S=1", "mixed"],
)
@pytest.mark.parametrize(
    "form", [{}, {"cache_implementation": "static"}], ids=["growing", "static"]
)
def test_full_attention_tokens(
    sharing: PreTrainedModel, config: RefreshConfig, form: dict[str, Any]
) -> None:
    inputs = left_padded([90, 70])
    assert torch.equal(refreshed(sharing, inputs, config, **form), greedy(sharing, inputs, **form))


@pytest.mark.parametrize(
    "config",
    [RefreshConfig(budget=5, stride=None), RefreshConfig(mode="mixed", budget=5)],
    ids=["partial", "mixed"],
)
def test_the_owners_are_served(sharing: PreTrainedModel, config: RefreshConfig) -> None:
    inputs = left_padded([90, 70])
    vanilla = logits(sharing, inputs, 4)
    with refreshkv.attach(sharing, config) as session:
        ours = logits(sharing, inputs, 4)
    assert set(session.stats.layers) == {1, 3}
    assert (ours[1:] - vanilla[1:]).abs().max() > 1e-3


def test_mixed_the_batch_and_the_static_form_are_the_rows_alone(sharing: PreTrainedModel) -> None:
    inputs, config = left_padded([90, 70]), RefreshConfig(mode="mixed", budget=5)
    batch = refreshed(sharing, inputs, config)
    assert torch.equal(refreshed(sharing, inputs, config, cache_implementation="static"), batch)
    for row, length in enumerate((90, 70)):
        alone = refreshed(sharing, inputs["input_ids"][row : row + 1, -length:], config)
        assert torch.equal(batch[row], alone[0])
