"""Only a transformers that was tested, and never ordinary attention in silence."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel

import refreshkv
from refreshkv.hosts.transformers import versions

from ..conftest import build
from .prompts import greedy, tokens

MODES: list[dict[str, Any]] = [{}, {"preset": "fast"}, {"mode": "full"}, {"method": "snapkv"}]


@pytest.mark.parametrize("version", ["4.57.6", "5.15.1", f"{versions.BEFORE}.0.dev0", "6.0.0"])
def test_an_untested_transformers_is_refused(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(versions, "VERSION", Version(version))
    before = dict(vars(llama))
    with pytest.raises(
        RuntimeError, match=rf"not with {version}: pip install 'transformers"
    ) as error:
        refreshkv.attach(llama)
    assert vars(llama) == before and "\n" not in str(error.value)


def test_the_range_is_that_of_the_package() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (wanted,) = (text for text in project["dependencies"] if text.startswith("transformers"))
    assert SpecifierSet(wanted.removeprefix("transformers")) == SpecifierSet(
        f">={versions.OLDEST},<{versions.BEFORE}"
    )


def test_the_caches_name_is_the_one_of_this_transformers() -> None:
    import inspect

    assert versions.CACHE in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    assert (versions.CACHE == "cache") == (Version(transformers.__version__) >= Version("5.24"))


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_gradient_checkpointing_in_training_mode(settings: dict[str, Any]) -> None:
    """transformers before 5.24 drops the cache there, and says so in a log that nobody reads."""
    model = build("llama")
    model.gradient_checkpointing_enable()
    model.train()
    with refreshkv.attach(model, **settings) as session:
        if versions.CACHE == "past_key_values":
            with pytest.raises(RuntimeError, match="never filled"):
                greedy(model, tokens(1, 30))
            model.eval()
        greedy(model, tokens(1, 30))
    assert session.stats.layers


class Prefixed(transformers.LlamaForCausalLM):
    """As prefix tuning does: a cache of its own for the prompt's pass."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs[versions.CACHE] = DynamicCache(config=self.config)
        return inputs


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str
)
@pytest.mark.parametrize("settings", MODES, ids=str)
def test_a_model_that_brings_a_cache_of_its_own(
    settings: dict[str, Any], options: dict[str, Any]
) -> None:
    model = build("llama")
    model.__class__ = Prefixed
    with refreshkv.attach(model, **settings), pytest.raises(RuntimeError, match="never filled"):
        greedy(model, tokens(1, 30), **options)


def test_a_call_that_makes_no_cache_that_we_know(llama: PreTrainedModel) -> None:
    """As where a new transformers calls it by another name."""
    llama._prepare_cache_for_generation = lambda *args, **kwargs: None
    try:
        with refreshkv.attach(llama), pytest.raises(RuntimeError, match="made no cache"):
            greedy(llama, tokens(1, 30))
    finally:
        del llama._prepare_cache_for_generation


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_every_mode_reads_its_own_cache(llama: PreTrainedModel, settings: dict[str, Any]) -> None:
    with refreshkv.attach(llama, **settings) as session:
        greedy(llama, tokens(1, 100))
    share = session.stats.kv_read_share
    assert (
        session.stats.layers
        and share is not None
        and (share < 1 or not settings or "mode" in settings)
    )


def test_torch_is_not_asked_for_gradients(llama: PreTrainedModel) -> None:
    with refreshkv.attach(llama, preset="fast"), torch.inference_mode():
        greedy(llama, tokens(1, 30))
