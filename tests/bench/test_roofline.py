"""The byte model against numbers worked out by hand, and the shapes against the sizes that are published."""

from __future__ import annotations

import pytest
import torch

from refreshkv.bench import roofline
from refreshkv.bench.roofline import Load, Reads, Sizes
from refreshkv.bench.shapes import SHAPES, build, config_of, outline
from refreshkv.kernels.codes import Codes

# Parameters of the checkpoints; numbers of K and V of one token.
PUBLISHED = {
    "llama-3.1-8b": (8_030_261_248, 32 * 2 * 8 * 128),
    "llama-3.2-1b": (1_235_814_400, 16 * 2 * 8 * 64),
    "qwen3-8b": (8_190_735_360, 36 * 2 * 8 * 128),
    "qwen2-7b": (7_615_616_512, 28 * 2 * 4 * 128),
    "mistral-7b": (7_248_023_552, 32 * 2 * 8 * 128),
    "demo": (2_492_672, 4 * 2 * 2 * 64),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_size_of_the_checkpoints(shape: str) -> None:
    config = config_of(shape)
    sizes = roofline.sizes_of(outline(config, torch.bfloat16))
    parameters, numbers = PUBLISHED[shape]
    assert (sizes.stored, sizes.entry) == (2 * parameters, 2 * numbers)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert sizes.weights == 2 * (parameters - table)


def test_build_makes_a_model_that_runs() -> None:
    model = build("demo", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits = model(torch.ones(1, 3, dtype=torch.int64)).logits
    assert logits.shape == (1, 3, 512) and bool(logits.isfinite().all())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"unknown shape 'lama-3.2-1b'; did you mean"):
        config_of("lama-3.2-1b")


def test_modes_by_hand() -> None:
    modes = Load(context=1000, budget=100, stride=10, draft=8, acceptance=0.85).modes()
    assert modes["full"] == Reads(1, 1000) and modes["snapkv"] == Reads(1, 100)
    assert modes["mix"] == Reads(1, 190)  # .9 * 100 + .1 * 1000
    assert modes["mixed"] == Reads(1, 132, 1000)  # and half a block, of 64 tokens
    # 9 passes for 1 + 8 * .85 = 7.8 tokens, over 8 * 100 + 1000 entries
    cost = modes["exact"]
    assert (cost.passes, cost.entries) == (pytest.approx(9 / 7.8), pytest.approx(1800 / 7.8))
    assert Load(context=1000, budget=100, stride=None).modes()["mix"] == Reads(1, 100)
    assert Load(context=50, budget=100).modes()["snapkv"] == Reads(1, 50)


def test_rows_share_the_weights_and_not_the_cache() -> None:
    sizes = Sizes(weights=1000, entry=10, stored=1200)
    assert Reads(1.5, 20).bytes(sizes, rows=4) == 1.5 * 1000 + 4 * 20 * 10
    assert Reads(1, 20, 64).bytes(sizes, rows=4) == 1000 + 4 * (20 * 10 + 64 * sizes.codes)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_codes_are_as_large_as_those_of_the_kernels(itemsize: int) -> None:
    """Of one KV head of 64 dims."""
    like = torch.zeros(1, 1, 1, 64)
    sizes = Sizes(weights=0, entry=2 * 64 * itemsize, stored=0, itemsize=itemsize)
    assert sizes.codes == sum(Codes.room(like, (64, 64), 1, 2, 2).block_bytes) / 64


@pytest.mark.parametrize("acceptance", [-0.1, 1.1, float("nan")])
def test_acceptance_is_a_share(acceptance: float) -> None:
    with pytest.raises(ValueError, match="acceptance is a share"):
        Load(acceptance=acceptance)


def test_the_constants_agree_with_the_kv_read_of_the_fidelity_tables() -> None:
    """Means of docs/fidelity.md: 15.6 % for the lossless mode at K = 1/16."""
    drafts = {"draft": roofline.DRAFT, "acceptance": roofline.ACCEPTANCE}
    exact = Load(context=2048, budget=128, **drafts).modes()["exact"]
    assert exact.entries / 2048 == pytest.approx(0.156, abs=0.005)
