"""`attach` and `RefreshCache` as objects: restoration, nesting, independence, and every refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import refreshkv
from refreshkv import RefreshCache, RefreshConfig
from refreshkv.hosts.transformers.cache import RefreshLayer
from refreshkv.hosts.transformers.masks import newest_row
from refreshkv.hosts.transformers.static import StaticRefreshLayer

from ..conftest import build
from .prompts import greedy, left_padded, refreshed, tokens


def appearance(model: PreTrainedModel) -> dict[str, Any]:
    """Everything an attachment could leave behind."""
    return {
        "attributes": {name: id(value) for name, value in vars(model).items()},
        "class": {name: id(value) for name, value in vars(type(model)).items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "implementation": model.config._attn_implementation,
        "methods": [
            getattr(method, "__func__", method)
            for method in (model.generate, model.forward, model._prefill)
        ],
        "modules": [
            (name, type(module), sorted(vars(module))) for name, module in model.named_modules()
        ],
        "hooks": [
            len(module._forward_pre_hooks) + len(module._forward_hooks)
            for module in model.modules()
        ],
    }


def test_leaving_restores_the_model(model: PreTrainedModel) -> None:
    before = appearance(model)
    with refreshkv.attach(model, budget=8):
        assert appearance(model) != before
        greedy(model, tokens(1, 20), new=3)
    assert appearance(model) == before


@pytest.mark.parametrize("ending", ["by itself", "by an exception"])
def test_leaving_the_lossless_mode_restores_the_model(llama: PreTrainedModel, ending: str) -> None:
    before = appearance(llama)
    with refreshkv.attach(llama, mode="exact", budget=8):
        assert "generate" in vars(llama)
        greedy(llama, tokens(1, 20), new=3)
        if ending == "by an exception":
            with pytest.raises(ValueError, match="is a DynamicCache"):
                greedy(llama, tokens(1, 20), past_key_values=DynamicCache())
    assert appearance(llama) == before


def test_leaving_by_an_exception_restores_the_model(llama: PreTrainedModel) -> None:
    before = appearance(llama)
    with pytest.raises(KeyError), refreshkv.attach(llama):
        raise KeyError
    assert appearance(llama) == before


def test_nested_sessions(llama: PreTrainedModel) -> None:
    ids, before = tokens(1, 40), appearance(llama)
    outer, inner = (
        RefreshConfig(budget=6, stride=None),
        RefreshConfig(budget=9, stride=4, threshold=None),
    )
    expected = refreshed(llama, ids, outer), refreshed(llama, ids, inner)
    with refreshkv.attach(llama, outer) as first:
        between = appearance(llama)
        with refreshkv.attach(llama, inner) as second:
            assert torch.equal(greedy(llama, ids), expected[1])
        assert appearance(llama) == between
        assert first.stats.full_share is None and second.stats.full_share > 0
        assert torch.equal(greedy(llama, ids), expected[0])
    assert appearance(llama) == before


@pytest.mark.parametrize("order", ["exact inside", "exact outside", "exact in exact"])
def test_nested_sessions_of_the_lossless_mode(llama: PreTrainedModel, order: str) -> None:
    ids, before = tokens(1, 40), appearance(llama)
    exact = RefreshConfig(mode="exact", budget=6, draft=3)
    other = RefreshConfig(mode="refresh", budget=6, stride=None)
    outer, inner = {
        "exact inside": (other, exact),
        "exact outside": (exact, other),
        "exact in exact": (exact, RefreshConfig(mode="exact", budget=1000)),
    }[order]
    vanilla = greedy(llama, ids)
    expected = {
        config: vanilla if config.mode == "exact" else refreshed(llama, ids, config)
        for config in (outer, inner)
    }
    with refreshkv.attach(llama, outer) as first:
        with refreshkv.attach(llama, inner) as second:
            assert torch.equal(greedy(llama, ids), expected[inner])
            assert not first.stats.layers and second.stats.layers
            assert (second.stats.acceptance is None) == (inner.mode == "refresh")
        assert torch.equal(greedy(llama, ids), expected[outer])
        assert (first.stats.acceptance is None) == (outer.mode == "refresh")
    assert appearance(llama) == before


def test_a_generate_patched_by_somebody_else_is_called(llama: PreTrainedModel) -> None:
    calls: list[int] = []
    original = llama.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    llama.generate = counted
    try:
        with refreshkv.attach(llama, RefreshConfig(mode="exact", budget=6)) as session:
            greedy(llama, tokens(1, 20), new=4)
        assert calls == [1] and vars(llama)["generate"] is counted
        assert session.stats.acceptance is not None
    finally:
        del llama.generate


def test_a_method_patched_by_somebody_else_survives(llama: PreTrainedModel) -> None:
    calls: list[int] = []
    original = llama._prefill

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    llama._prefill = counted
    try:
        with refreshkv.attach(llama):
            greedy(llama, tokens(1, 20), new=2)
        assert calls == [1] and vars(llama)["_prefill"] is counted
    finally:
        del llama._prefill


def test_detach_without_a_with_block_and_twice(llama: PreTrainedModel) -> None:
    before = appearance(llama)
    session = refreshkv.attach(llama)
    session.detach()
    session.detach()
    assert appearance(llama) == before


def test_two_models_at_once(llama: PreTrainedModel) -> None:
    other, ids = build("qwen3", seed=3), tokens(1, 40)
    one, two = (
        RefreshConfig(budget=6, stride=None),
        RefreshConfig(budget=9, stride=2, threshold=None),
    )
    expected = refreshed(llama, ids, one), refreshed(other, ids, two)
    with refreshkv.attach(llama, one) as first, refreshkv.attach(other, two) as second:
        assert torch.equal(greedy(other, ids), expected[1])
        assert torch.equal(greedy(llama, ids), expected[0])
    assert first.stats.full_share == 0 and second.stats.full_share > 0.4


def test_the_explicit_cache(llama: PreTrainedModel) -> None:
    ids, config = tokens(1, 40), RefreshConfig(budget=6, stride=3, threshold=None)
    expected = refreshed(llama, ids, config)
    with refreshkv.attach(llama, mode="refresh"):  # within a mode the cache's own settings count
        cache = RefreshCache(llama.config, config)
        assert torch.equal(greedy(llama, ids, past_key_values=cache), expected)
    assert cache.stats.full_steps == 3 * (19 // 3)


def test_a_forward_pass_without_our_cache_is_ordinary(model: PreTrainedModel) -> None:
    inputs = left_padded([30, 18])
    with torch.no_grad():
        vanilla = model(**inputs).logits
        with refreshkv.attach(model, budget=4):
            assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize("form", [None, "static"])
@pytest.mark.parametrize("mode", ["refresh", "exact"])
def test_keys_are_not_kept_alive_by_the_session(
    llama: PreTrainedModel, mode: str, form: str | None
) -> None:
    import gc
    import weakref

    with refreshkv.attach(llama, mode=mode, budget=6) as session:
        options = {"max_new_tokens": 3, "return_dict_in_generate": True}
        out = llama.generate(tokens(1, 20), cache_implementation=form, **options)
        cache = weakref.ref(out.past_key_values.layers[0].inner.store)
        gc.disable()
        try:
            del out
            assert cache() is None, (
                "freed by reference counting alone, not at the next garbage collection"
            )
        finally:
            gc.enable()
        assert session.stats.full_steps + session.stats.partial_steps > 0


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "a foreign cache": ({"past_key_values": DynamicCache}, "session.new_cache"),
    "no cache": ({"use_cache": False}, "use_cache"),
    "offloading": ({"cache_implementation": "offloaded"}, "cache_implementation"),
}


@pytest.mark.parametrize("options, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_would_silently_be_ordinary_attention_is_refused(
    llama: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    options = {key: value() if isinstance(value, type) else value for key, value in options.items()}
    with refreshkv.attach(llama, mode="refresh"), pytest.raises(ValueError, match=message):
        greedy(llama, tokens(1, 10), **options)


def test_a_cache_that_the_checkpoint_ships_as_default_gives_way(llama: PreTrainedModel) -> None:
    """Gemma's generation config names one; an unmodified call must run all the same."""
    ids, config = tokens(1, 40), RefreshConfig(budget=6, stride=None)
    expected = refreshed(llama, ids, config)
    llama.generation_config.cache_implementation = "hybrid"
    try:
        assert torch.equal(refreshed(llama, ids, config), expected)
        assert llama.generation_config.cache_implementation == "hybrid"
    finally:
        llama.generation_config.cache_implementation = None


def test_a_cache_on_a_model_that_is_not_attached_raises(llama: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match=r"refreshkv\.attach"):
        greedy(llama, tokens(1, 10), past_key_values=RefreshCache(llama.config))
    with refreshkv.attach(llama) as session:
        cache = session.new_cache()
        greedy(llama, tokens(1, 10), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"refreshkv\.attach"):
        greedy(llama, tokens(1, 40), past_key_values=cache)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda keys, values: (keys.clone(), values), "layer 0 never reached"),
        (lambda keys, values: (keys, values.clone()), "values of layer 0 are changed"),
    ],
    ids=["keys", "values"],
)
@pytest.mark.parametrize("layer", [RefreshLayer, StaticRefreshLayer])
def test_what_is_changed_after_the_cache_is_noticed(
    monkeypatch: pytest.MonkeyPatch, layer: type, change: Any, message: str
) -> None:
    """An architecture that re-assigns its keys between cache and attention must not run as ordinary attention."""
    model = build("llama")
    update = layer.update
    monkeypatch.setattr(layer, "update", lambda self, *a, **k: change(*update(self, *a, **k)))
    form = "static" if layer is StaticRefreshLayer else None
    with refreshkv.attach(model), pytest.raises(RuntimeError, match=message):
        greedy(model, tokens(1, 10), cache_implementation=form)


def test_masks_that_a_decode_step_cannot_follow() -> None:
    lowest = torch.finfo(torch.float32).min
    hidden = torch.tensor([0.0, lowest, 0.0])
    assert newest_row(hidden[None, None, None], 3).tolist() == [[True, False, True]]
    with pytest.raises(RuntimeError, match="differs by head"):
        newest_row(hidden.expand(1, 2, 1, 3), 3)
    with pytest.raises(RuntimeError, match="adds a bias"):
        newest_row(hidden[None, None, None] - torch.tensor([0.5, 0.0, 0.0]), 3)
    with pytest.raises(RuntimeError, match="covers 3 tokens, the cache holds 4"):
        newest_row(hidden[None, None, None], 4)


def test_gradients_are_refused(llama: PreTrainedModel) -> None:
    with refreshkv.attach(llama) as session, pytest.raises(RuntimeError, match="no_grad"):
        llama(tokens(1, 10), past_key_values=session.new_cache())


def test_models_that_share_one_config_are_refused(llama: PreTrainedModel) -> None:
    twin = type(llama)(llama.config)
    with refreshkv.attach(llama), pytest.raises(RuntimeError, match="shares its config"):
        refreshkv.attach(twin)


def test_settings_and_config_together_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="not both"):
        refreshkv.attach(llama, RefreshConfig(), budget=3)
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        refreshkv.attach(llama, budgte=3)
    with pytest.raises(ValueError, match="did you mean 'paper-llama'"):
        refreshkv.attach(llama, preset="paper-lama")


def test_a_batch_of_another_size_on_the_same_cache_is_refused(llama: PreTrainedModel) -> None:
    with torch.no_grad(), refreshkv.attach(llama) as session:
        cache = session.new_cache()
        llama(tokens(2, 10), past_key_values=cache)
        with pytest.raises(ValueError, match="holds rows 2, the new keys have 3"):
            llama(tokens(3, 1), past_key_values=cache)


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "MLA": ("DeepseekV3Config", {"kv_lora_rank": 16}, "MLA"),
    "encoder-decoder": ("T5Config", {}, "encoder-decoder"),
    "no interface": ("BloomConfig", {}, "attention interface"),
    "no attention": ("MambaConfig", {}, ""),
    "its own cache": ("MiniMaxConfig", {}, "makes a cache of its own"),
    "no language model": ("CLIPVisionConfig", {}, "no causal language model"),
}


@pytest.mark.parametrize("config, options, reason", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_architectures_say_why(
    config: str, options: dict[str, Any], reason: str
) -> None:
    support = refreshkv.supported(getattr(transformers, config)(**options))
    assert (
        not support and not support.ok and reason in support.reason and "\n" not in support.reason
    )


@pytest.mark.parametrize(
    "config, reason",
    [
        ("DiffLlamaConfig", "changes the values"),
        ("JetMoeConfig", "changes the keys"),
        ("DogeConfig", "adds a bias"),
    ],
)
def test_models_that_are_left_as_they_are_say_why(config: str, reason: str) -> None:
    support = refreshkv.supported(getattr(transformers, config)())
    assert support.ok and reason in support.reason and "leaves it as it is" in support.reason


def test_attach_raises_the_reason() -> None:
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11
    )
    with pytest.raises(refreshkv.UnsupportedModelError, match="encoder-decoder"):
        refreshkv.attach(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(refreshkv.UnsupportedModelError, match="PreTrainedModel"):
        refreshkv.attach(torch.nn.Linear(1, 1))


def test_supported_architectures(model: PreTrainedModel) -> None:
    assert refreshkv.supported(model) and refreshkv.supported(model.config)


def test_attaching_a_model_without_a_head_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(refreshkv.UnsupportedModelError, match="cannot generate"):
        refreshkv.attach(llama.model)
