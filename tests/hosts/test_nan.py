"""A weight that is NaN gives tokens that mean nothing, and nothing worse: in every mode, method and form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import refreshkv
from refreshkv.methods import METHODS

from .prompts import greedy, left_padded
from .test_static import STATIC, compiled

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"preset": "fast"},
    "lse-drop": {"preset": "lse-drop"},
    "paper-llama": {"preset": "paper-llama"},
    "drafts of one": {"draft": 1},
    **{name: {"method": name} for name in METHODS},
}


@pytest.fixture(params=["one weight", "a head", "overflow"])
def broken(request: pytest.FixtureRequest, llama: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(llama)
    # What transformers compiled for the original would be run for the copy.
    vars(model).pop("_compiled_call", None)
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.k_proj.weight
        if request.param == "one weight":
            weight[0, 0] = torch.nan
        elif request.param == "a head":
            weight[: weight.shape[0] // 2] = -torch.nan
        else:
            weight.mul_(1e38)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_generation_goes_on(broken: PreTrainedModel, mode: str, dtype: torch.dtype) -> None:
    prompts = left_padded([80, 66])
    with refreshkv.attach(broken.to(dtype), **MODES[mode], budget=12):
        assert greedy(broken, prompts, new=12).shape == (2, 12)


@pytest.mark.parametrize("mode", ["default", "fast", "lse-drop", "paper-llama"])
def test_generation_goes_on_from_buffers_of_fixed_size(broken: PreTrainedModel, mode: str) -> None:
    with refreshkv.attach(broken, **MODES[mode], budget=12):
        for form in (STATIC, compiled()):
            assert greedy(broken, left_padded([80, 66]), new=6, **form).shape == (2, 6)
