"""`generate` by graphs that are captured once: the tokens of the growing cache, whatever is asked for.

On a CPU the graphs are tapes, which replay the operators of a pass on the same tensors as CUDA graphs do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation import StopStringCriteria  # noqa: F401

import refreshkv
from refreshkv import RefreshConfig, make_config
from refreshkv.hosts.transformers import captured
from tests.tape import Tape

from .prompts import greedy, left_padded, tokens
from .test_equalities import EVERY_OPTION

CONFIGS = {
    "published": RefreshConfig(budget=8, stride=3, threshold=0.5),
    "fixed stride": RefreshConfig(budget=0.25, stride=3, threshold=None),
    "never": RefreshConfig(budget=8, stride=None),
    "every option": EVERY_OPTION,
    "lse-drop": make_config("lse-drop", budget=8),
    "full": RefreshConfig(mode="full"),
    "mixed": make_config("fast", budget=8),
}
RAGGED = [90, 70, 21]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    """CUDA graphs are tapes."""
    tape = Tape()
    monkeypatch.setattr(
        sys.modules["refreshkv.hosts.transformers.attach"], "recorder_for", lambda device: tape
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoding without CUDA graphs")
        yield tape


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_tokens_are_those_of_the_growing_cache(
    llama: PreTrainedModel, tape: Tape, name: str, padded: bool
) -> None:
    inputs = left_padded(RAGGED) if padded else tokens(2, 90)
    with refreshkv.attach(llama, CONFIGS[name], graphs=False) as session:
        grown = greedy(llama, inputs)
    with refreshkv.attach(llama, CONFIGS[name]) as other:
        assert torch.equal(greedy(llama, inputs), grown)
    assert tape.replayed > 10
    assert other.stats.as_dict() == session.stats.as_dict()


def test_a_second_call_uses_the_graphs_of_the_first(llama: PreTrainedModel, tape: Tape) -> None:
    with refreshkv.attach(llama, CONFIGS["every option"], graphs=False):
        expected = [greedy(llama, left_padded(RAGGED, seed)) for seed in (0, 1)]
    with refreshkv.attach(llama, CONFIGS["every option"]):
        for seed in (0, 1):
            before = tape.recorded
            assert torch.equal(greedy(llama, left_padded(RAGGED, seed)), expected[seed])
    assert before > 0 and tape.recorded == before


LOSSLESS = {
    "every draft stands": RefreshConfig(mode="exact", budget=1000, draft=5),
    "hardly any stands": RefreshConfig(mode="exact", budget=6, draft=5),
    "default": make_config("default", budget=8),
    "mixed drafts": RefreshConfig(mode="exact", budget=8, draft=7, drafter="mixed"),
}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_lossless_mode(
    llama: PreTrainedModel, tape: Tape, name: str, padded: bool
) -> None:
    inputs = left_padded(RAGGED) if padded else tokens(2, 90)
    vanilla = greedy(llama, inputs, new=60)
    with refreshkv.attach(llama, LOSSLESS[name]) as session:
        assert torch.equal(greedy(llama, inputs, new=60), vanilla)
    drafts = session.stats.drafts
    assert tape.replayed > 10 and 0 < drafts.full <= drafts.yielded
    assert name != "every draft stands" or drafts.accepted > 0.9 * drafts.drafted


@pytest.mark.parametrize("name", ["every option", "mixed", "published"])
def test_the_cache_grows(
    llama: PreTrainedModel, tape: Tape, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "_STEP", 7)
    monkeypatch.setattr(captured, "_GRAIN", 1)
    inputs = left_padded(RAGGED)
    with refreshkv.attach(llama, CONFIGS[name], graphs=False):
        grown = greedy(llama, inputs, new=40)
    with refreshkv.attach(llama, CONFIGS[name]):
        assert torch.equal(greedy(llama, inputs, new=40), grown)
    assert tape.recorded >= 5
