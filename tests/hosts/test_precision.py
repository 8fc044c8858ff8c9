"""Dtypes that differ within a model or from the usual: autocast, float64, float16, as without us in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig

from ..conftest import build
from ..helpers import relative_rms
from .prompts import greedy, left_padded, logits

MODES = {
    "full": RefreshConfig(mode="full"),
    "refresh": RefreshConfig(budget=1000, stride=3, threshold=0.9),
    "lse-drop": refreshkv.make_config("lse-drop", budget=1000),
    "mixed": RefreshConfig(mode="mixed", budget=1000),
    "exact": RefreshConfig(mode="exact", budget=8, draft=5, confidence=0.0, recent=2, successor=2),
}
FORMS: dict[str, dict[str, Any]] = {"growing": {}, "static": {"cache_implementation": "static"}}
PROMPT = left_padded([80, 63])  # with a whole block


def tokens_under(model: PreTrainedModel, config: RefreshConfig | None, **options: Any) -> Tensor:
    if config is None:
        return greedy(model, PROMPT, **options)
    with refreshkv.attach(model, config):
        return greedy(model, PROMPT, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_float64(architecture: str, mode: str, form: str) -> None:
    model = build(architecture).double()
    vanilla = tokens_under(model, None)
    assert torch.equal(tokens_under(model, MODES[mode], **FORMS[form]), vanilla)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_as_without_us(dtype: torch.dtype, mode: str, form: str) -> None:
    """Most tokens are the same; where two are as good as equal, rounding decides."""
    model = build("llama").to(dtype)
    vanilla = tokens_under(model, None)
    ours = tokens_under(model, MODES[mode], **FORMS[form])
    assert ours.shape == vanilla.shape and torch.equal(ours[:, 0], vanilla[:, 0])


# The last without a static cache: transformers' own sliding layers take no two dtypes there.
CASES = [("llama", "sdpa", *FORMS), ("llama", "eager", *FORMS), ("gemma2", "eager", "growing")]


@pytest.mark.parametrize("native", ["1", "0"], ids=["C++", "torch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_autocast(
    monkeypatch: pytest.MonkeyPatch, case: tuple[str, ...], mode: str, native: str
) -> None:
    """Queries and keys come in float32 and values in bfloat16, as RoPE leaves them."""
    if native == "0":
        monkeypatch.setattr("refreshkv.kernels.native.build.library", lambda: None)
    architecture, implementation, *forms = case
    model = build(architecture, initializer_range=0.05)
    model.set_attn_implementation(implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vanilla = tokens_under(model, None)
        for form in forms:
            ours = tokens_under(model, MODES[mode], **FORMS[form])
            assert ours.shape == vanilla.shape and torch.equal(ours[:, 0], vanilla[:, 0])


def test_autocast_changes_no_more_than_it_does_without_us() -> None:
    model = build("llama", initializer_range=0.05)
    full_precision = logits(model, PROMPT, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vanilla = logits(model, PROMPT, 6).float()
        with refreshkv.attach(model, MODES["refresh"]) as session:
            ours = logits(model, PROMPT, 6).float()
    assert relative_rms(ours, full_precision) < 2 * relative_rms(vanilla, full_precision)
    assert session.stats.layers


def test_a_cache_filled_under_autocast_is_refused_without_it() -> None:
    model, ids = build("llama"), PROMPT["input_ids"]
    with torch.no_grad(), refreshkv.attach(model, MODES["refresh"]) as session:
        cache = session.new_cache()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds dtype torch\.bfloat16, the new keys have"):
            model(ids[:, :1], past_key_values=cache)
