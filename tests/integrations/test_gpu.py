"""The equalities on a GPU, in float32. Skipped where there is none; `make test-gpu` runs them alone."""

from __future__ import annotations

import pytest
import torch

from refreshkv import RefreshConfig

from ..conftest import build
from .prompts import greedy, left_padded, refreshed

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize(
    "config",
    [
        RefreshConfig(budget=1000, stride=5, threshold=None),
        RefreshConfig(budget=4, stride=1, threshold=1.0),
        RefreshConfig(mode="full"),
    ],
    ids=["large budget", "S=1", "mode full"],
)
def test_full_attention_tokens(architecture: str, config: RefreshConfig) -> None:
    model = build(architecture).cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded([50, 37, 21]).items()}
    assert torch.equal(refreshed(model, inputs, config), greedy(model, inputs))


@pytest.mark.parametrize("decide", ["layer", "head"])
def test_a_batch_equals_its_rows_alone(decide: str) -> None:
    model, lengths = build("llama").cuda(), [50, 37, 21]
    inputs = {name: tensor.cuda() for name, tensor in left_padded(lengths).items()}
    config = RefreshConfig(budget=0.25, stride=2, threshold=0.5, decide=decide)  # type: ignore[arg-type]
    batch = refreshed(model, inputs, config)
    for row, length in enumerate(lengths):
        alone = refreshed(model, inputs["input_ids"][row : row + 1, -length:], config)
        assert torch.equal(batch[row], alone[0])
