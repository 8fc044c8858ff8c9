"""What callers hold: models that are wrapped, copied or attached twice, sessions, and caches that belong to one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshCache, RefreshConfig
from refreshkv.hosts.transformers.static import StaticRefreshCache

from ..conftest import build
from .prompts import greedy, refreshed, tokens

LOSSY = RefreshConfig(budget=6, stride=None)
EXACT = RefreshConfig(mode="exact", budget=6, draft=3)


@pytest.mark.parametrize("settings", ["fast", {"budget": 3}, 8])
def test_settings_of_another_type_change_nothing(llama: PreTrainedModel, settings: Any) -> None:
    before = dict(vars(llama))
    with pytest.raises(TypeError, match=r"preset=\.\.\.") as error:
        refreshkv.attach(llama, settings)
    assert vars(llama) == before and "\n" not in str(error.value)


class Wrapper(nn.Module):
    """A model inside another, under a name."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        super().__init__()
        setattr(self, name, model)


@pytest.mark.parametrize("name", ["module", "_orig_mod", "model"])
def test_a_wrapper_is_refused_with_what_to_attach(llama: PreTrainedModel, name: str) -> None:
    with pytest.raises(refreshkv.UnsupportedModelError, match=rf"attach its \.{name}$"):
        refreshkv.attach(Wrapper(name, llama))


class Adapted(Wrapper):
    """As PEFT wraps a model."""

    def get_base_model(self) -> Any:
        return self.base

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.generate(*args, **kwargs)


def test_a_peft_model_is_unwrapped(llama: PreTrainedModel) -> None:
    peft, ids = Adapted("base", llama), tokens(1, 30)
    expected = refreshed(llama, ids, LOSSY)
    with refreshkv.attach(peft, LOSSY) as session:
        assert session.model is llama and torch.equal(greedy(peft, ids), expected)
    refreshkv.detach(peft)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("config", [LOSSY, EXACT], ids=["lossy", "exact"])
def test_a_copy_of_an_attached_model_is_plain(how: str, config: RefreshConfig) -> None:
    model, ids = build("llama"), tokens(1, 30)
    vanilla = greedy(model, ids)
    with refreshkv.attach(model, config), refreshkv.attach(model, LOSSY):
        twin = COPIES[how](model)
        assert twin.config._attn_implementation == "sdpa"
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.5)  # the copy has its own
        assert torch.equal(greedy(twin, ids), vanilla)
    assert torch.equal(greedy(twin, ids), vanilla)
    again = COPIES[how](twin)
    with refreshkv.attach(again, EXACT) as session:
        assert torch.equal(greedy(again, ids), vanilla)
    assert session.stats.layers and "generate" not in vars(model)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_what_the_instance_had(how: str) -> None:
    model = build("llama")
    model.generate = print
    with refreshkv.attach(model, LOSSY):
        twin = COPIES[how](model)
    assert twin.generate is print and model.generate is print


def caches(session: refreshkv.Session, form: str) -> Any:
    return session.new_cache() if form == "growing" else session.new_static_cache(64)


@pytest.mark.parametrize("form", ["growing", "static"])
def test_a_cache_of_another_model_session_or_mode_is_refused(
    llama: PreTrainedModel, form: str
) -> None:
    ids, other = tokens(1, 20), build("llama")
    with refreshkv.attach(llama, LOSSY) as first, refreshkv.attach(other, LOSSY) as foreign:
        theirs, earlier = caches(foreign, form), caches(first, form)
    make = RefreshCache if form == "growing" else StaticRefreshCache
    size = {} if form == "growing" else {"max_cache_len": 64}
    exact = make(llama.config, EXACT, **size)
    with refreshkv.attach(llama, LOSSY) as session:
        for cache, message in (
            (theirs, "another model"),
            (earlier, "another session"),
            (copy.deepcopy(earlier), "another session") if form == "growing" else (earlier, "an"),
            (exact, "mode 'exact', this session has 'refresh'"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                greedy(llama, ids, past_key_values=cache)
            assert "session.new_cache()" in str(error.value)
        expected = greedy(llama, ids)
        assert torch.equal(greedy(llama, ids, past_key_values=caches(session, form)), expected)


def test_a_session_that_has_ended_is_not_entered_again(llama: PreTrainedModel) -> None:
    session = refreshkv.attach(llama)
    with session:
        pass
    with pytest.raises(RuntimeError, match="has ended"), session:
        pass
    assert "generate" not in vars(llama)


def test_a_lost_handle(llama: PreTrainedModel) -> None:
    before = dict(vars(llama))
    refreshkv.attach(llama, LOSSY)
    refreshkv.attach(llama, EXACT)
    refreshkv.detach(llama)
    refreshkv.detach(llama)
    assert vars(llama) == before and llama.config._attn_implementation == "sdpa"


def test_sessions_end_in_any_order(llama: PreTrainedModel) -> None:
    ids, before = tokens(1, 30), dict(vars(llama))
    expected = refreshed(llama, ids, LOSSY), greedy(llama, ids)
    first, second = refreshkv.attach(llama, EXACT), refreshkv.attach(llama, LOSSY)
    first.detach()
    assert torch.equal(greedy(llama, ids), expected[0])
    second.detach()
    assert torch.equal(greedy(llama, ids), expected[1]) and vars(llama) == before


def test_what_somebody_replaces_meanwhile_stays_and_works(llama: PreTrainedModel) -> None:
    ids, calls = tokens(1, 30), []
    vanilla = greedy(llama, ids)
    session = refreshkv.attach(llama, LOSSY)
    ours = llama.generate
    llama.generate = lambda *args, **kwargs: (calls.append(1), ours(*args, **kwargs))[1]
    try:
        session.detach()
        assert torch.equal(greedy(llama, ids), vanilla) and calls == [1]
    finally:
        del llama.generate


def test_threads_have_sessions_of_their_own_and_leave_nothing(llama: PreTrainedModel) -> None:
    ids, before = tokens(1, 30), dict(vars(llama))
    settings = [RefreshConfig(budget=budget, stride=None) for budget in (4, 6, 8, 12)]
    expected = [refreshed(llama, ids, config) for config in settings]
    attached, found = threading.Barrier(len(settings)), {}

    def work(index: int) -> None:
        with refreshkv.attach(llama, settings[index]) as session:
            attached.wait(60)  # all of them before any generates
            found[index] = greedy(llama, ids), session.stats.partial_steps

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens_then in enumerate(expected):
        assert torch.equal(found[index][0], tokens_then) and found[index][1] > 0
    assert vars(llama) == before and llama.config._attn_implementation == "sdpa"
