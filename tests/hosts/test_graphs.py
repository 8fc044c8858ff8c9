"""`generate` by graphs that are captured once: the tokens of the growing cache, whatever is asked for.

On a CPU the graphs are tapes, which replay the operators of a pass on the same tensors as CUDA graphs do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import refreshkv
from refreshkv import RefreshConfig, make_config
from refreshkv.hosts.transformers import captured
from refreshkv.hosts.transformers.regions import Regions
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.kernels.backend import REFERENCE
from refreshkv.stats import RowStats
from tests.tape import Tape

from ..conftest import build
from .prompts import greedy, left_padded, tokens
from .test_equalities import EVERY_OPTION


class Collected(BaseStreamer):
    """What a streamer is given after the prompt."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def greedy_result(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Any:
    """All that `generate` gives."""
    asked = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 16}
    return model.generate(ids, do_sample=False, **asked, **options)


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


@pytest.mark.parametrize("name", ["every option", "published", "mixed", "full"])
def test_a_second_call_uses_the_graphs_of_the_first(
    llama: PreTrainedModel, tape: Tape, name: str
) -> None:
    """Whatever its prompt: of another length, with other padding or none."""
    calls = [left_padded(RAGGED), left_padded([40, 61, 55], 1), tokens(3, 70), tokens(3, 33)]
    with refreshkv.attach(llama, CONFIGS[name], graphs=False):
        expected = [greedy(llama, inputs) for inputs in calls]
    with refreshkv.attach(llama, CONFIGS[name]) as session:
        for _ in range(2):
            recorded = tape.recorded
            for inputs, text in zip(calls, expected, strict=True):
                kept = session.kept
                assert torch.equal(greedy(llama, inputs), text)
                assert kept in (None, session.kept)
    assert 0 < recorded == tape.recorded


@pytest.mark.parametrize("chunk", [None, 32])
def test_a_prompt_attends_as_over_a_cache_that_grows(
    llama: PreTrainedModel, tape: Tape, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not over all positions of the static one, with a mask of as many numbers for each token."""
    attend = torch.nn.functional.scaled_dot_product_attention
    seen: list[tuple[int, bool]] = []

    def noted(query: Any, key: Any, value: Any, attn_mask: Any = None, **named: Any) -> Any:
        seen.append((key.shape[2], attn_mask is None))
        return attend(query, key, value, attn_mask=attn_mask, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    found = []
    for graphs in (False, True):
        seen.clear()
        with refreshkv.attach(llama, CONFIGS["published"], graphs=graphs):
            out = greedy(llama, tokens(2, 90), **options)
        found.append((out.tolist(), list(seen)))
    assert found[0] == found[1]
    assert max(length for length, _ in found[1][1]) == 90 and tape.replayed > 5


LOSSLESS = {
    "every draft stands": RefreshConfig(mode="exact", budget=1000, draft=5),
    "hardly any stands": RefreshConfig(mode="exact", budget=6, draft=5),
    "default": make_config("default", budget=8),
    "mixed drafts": RefreshConfig(mode="exact", budget=8, draft=7, drafter="mixed"),
}


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_lossless_mode(llama: PreTrainedModel, tape: Tape, name: str, padded: bool) -> None:
    inputs = left_padded(RAGGED) if padded else tokens(2, 90)
    vanilla = greedy(llama, inputs, new=60)
    with refreshkv.attach(llama, LOSSLESS[name]) as session:
        assert torch.equal(greedy(llama, inputs, new=60), vanilla)
    drafts = session.stats.drafts
    assert tape.replayed > 10 and 0 < drafts.full <= drafts.yielded
    assert name != "every draft stands" or drafts.accepted > 0.9 * drafts.drafted


@pytest.mark.parametrize("name", ["default", "mixed drafts"])
def test_the_lossless_cache_grows(
    llama: PreTrainedModel, tape: Tape, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "_STEP", 24)
    monkeypatch.setattr(captured, "_GRAIN", 1)
    inputs = left_padded(RAGGED)
    vanilla = greedy(llama, inputs, new=70)
    with refreshkv.attach(llama, LOSSLESS[name]):
        assert torch.equal(greedy(llama, inputs, new=70), vanilla)
    assert tape.replayed > 10


def test_votes_from_guesses_and_rows_that_end_early(
    llama: PreTrainedModel, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of CPUs do not need the guesses that a full pass is given; the reference votes by them."""
    monkeypatch.setattr("refreshkv.kernels.schema.backend_for", lambda device: REFERENCE)
    ids, options = tokens(2, 90), {"max_new_tokens": 60, "return_dict_in_generate": True}
    text = llama.generate(ids, max_new_tokens=60, do_sample=False)[:, 90:]
    options["eos_token_id"] = next(int(t) for t in text[0, 3:] if t not in text[1])
    expected = llama.generate(ids, do_sample=False, **options)
    with refreshkv.attach(llama, LOSSLESS["default"]) as session:
        found = llama.generate(ids, do_sample=False, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert session.stats.drafts.accepted > 0


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


@pytest.mark.parametrize("name", ["every option", "mixed"])
def test_sampling_draws_what_the_growing_cache_draws(
    llama: PreTrainedModel, tape: Tape, name: str
) -> None:
    drawn = []
    for graphs in (False, True):
        torch.manual_seed(5)
        with refreshkv.attach(llama, CONFIGS[name], graphs=graphs):
            options = {"do_sample": True, "top_k": 20, "num_return_sequences": 2}
            drawn.append(llama.generate(tokens(2, 60), max_new_tokens=12, **options))
    assert torch.equal(*drawn) and tape.replayed > 5


def test_lossless_sampling_draws_likely_tokens(llama: PreTrainedModel, tape: Tape) -> None:
    """One likely token is left of each distribution, so a draw is the greedy choice."""
    ids = tokens(2, 90)
    vanilla = llama.generate(ids, max_new_tokens=24, do_sample=False)
    with refreshkv.attach(llama, LOSSLESS["default"]):
        found = llama.generate(ids, max_new_tokens=24, do_sample=True, top_k=1)
    assert torch.equal(found, vanilla)
    assert tape.replayed > 5


@pytest.mark.parametrize("config", [CONFIGS["published"], LOSSLESS["default"]])
def test_whatever_generate_gives_and_is_given(
    llama: PreTrainedModel, tape: Tape, config: RefreshConfig
) -> None:
    ids = tokens(1, 80)
    stop = int(greedy(llama, ids, new=8)[0, -1])

    def call(**graphs: Any) -> tuple[Any, list[int]]:
        streamed = Collected()
        with refreshkv.attach(llama, config, **graphs):
            result = greedy_result(llama, ids, eos_token_id=stop, streamer=streamed)
        return result, streamed.tokens

    (captured_result, streamed), (plain, expected) = call(), call(graphs=False)
    assert torch.equal(captured_result.sequences, plain.sequences)
    assert streamed == expected
    for ours, theirs in zip(captured_result.scores, plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert isinstance(captured_result.past_key_values, StaticRefreshCache)


def test_hidden_states_are_those_of_each_pass(llama: PreTrainedModel, tape: Tape) -> None:
    ids, given = tokens(1, 60), []
    for graphs in (False, True):
        warned = pytest.warns(UserWarning, match="more than logits") if graphs else nullcontext()
        with refreshkv.attach(llama, CONFIGS["published"], graphs=graphs), warned:
            given.append(greedy_result(llama, ids, output_hidden_states=True).hidden_states)
    for ours, theirs in zip(*given, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gpt-oss", "qwen3"])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_beside_ours(architecture: str, padded: bool, tape: Tape) -> None:
    """A window that is full rolls in a graph; one with padding runs as it is."""
    model = build(architecture)
    inputs = left_padded(RAGGED) if padded else tokens(2, 90)
    with refreshkv.attach(model, CONFIGS["published"], graphs=False):
        grown = greedy(model, inputs)
    windows = padded and architecture != "qwen3"
    warned = pytest.warns(UserWarning, match="need masks") if windows else nullcontext()
    with refreshkv.attach(model, CONFIGS["published"]), warned:
        assert torch.equal(greedy(model, inputs), grown)
    assert windows or tape.replayed > 5


def test_a_pass_that_waits_stays_as_it_is_and_says_why(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = Tape()
    module = sys.modules["refreshkv.hosts.transformers.attach"]
    monkeypatch.setattr(module, "recorder_for", lambda device: tape)
    hook = llama.model.norm.register_forward_hook(lambda *given: float(given[-1].sum()) and None)
    vanilla = greedy(llama, tokens(1, 60))
    for config in (RefreshConfig(mode="full"), LOSSLESS["default"]):
        with (
            refreshkv.attach(llama, config),
            pytest.warns(UserWarning, match="without CUDA graphs: .* waits for the device"),
        ):
            assert torch.equal(greedy(llama, tokens(1, 60)), vanilla)
    hook.remove()
    assert tape.replayed == 0


@pytest.mark.parametrize(
    ("how", "call", "why"),
    [
        ({}, {"num_beams": 2}, "only greedy search and sampling"),
        ({"method": "h2o"}, {}, "'h2o' has no static form"),
        ({"stats": RowStats()}, {}, "RowStats"),
        ({}, {"disable_compile": True}, "disable_compile"),
    ],
)
def test_what_is_not_captured_runs_and_says_why(
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, Any],
    call: dict[str, Any],
    why: str,
) -> None:
    module = sys.modules["refreshkv.hosts.transformers.attach"]
    monkeypatch.setattr(module, "recorder_for", lambda device: Tape())
    how = how if "method" in how else {"preset": "paper-llama", **how}
    with (
        refreshkv.attach(llama, budget=1000, **how),
        pytest.warns(UserWarning, match=f"without CUDA graphs: .*{why}"),
    ):
        found = greedy(llama, tokens(1, 60), **call)
    assert torch.equal(found, greedy(llama, tokens(1, 60), **call))


def test_a_cache_of_ones_own_grows_as_ever(llama: PreTrainedModel, tape: Tape) -> None:
    with refreshkv.attach(llama, CONFIGS["published"]) as session:
        cache = session.new_cache()
        first = greedy_result(llama, tokens(1, 60), past_key_values=cache)
        again = torch.cat([first.sequences, tokens(1, 5, seed=3)], 1)
        greedy(llama, again, past_key_values=cache)
    assert tape.replayed == 0


class Again:
    """A recorder that runs the call each time: the compiler does not work under a tape."""

    def watch(self, call: Any) -> tuple[Any, None]:
        return call(), None

    def record(self, call: Any) -> Any:
        return call


@pytest.mark.parametrize("config", [CONFIGS["published"], CONFIGS["mixed"], LOSSLESS["default"]])
def test_one_compiled_layer_serves_all(
    config: RefreshConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["refreshkv.hosts.transformers.attach"]
    monkeypatch.setattr(module, "recorder_for", lambda device: Again())
    found = []
    for layers in (3, 6):
        torch._dynamo.reset()
        model = build("llama", num_hidden_layers=layers)
        ids = tokens(2, 60)
        with refreshkv.attach(model, config):
            expected = greedy(model, ids)
        counter = torch._dynamo.testing.CompileCounter()
        with refreshkv.attach(model, config) as session:
            session.regions = Regions(model, backend=counter)
            assert torch.equal(greedy(model, ids), expected)
        found.append(counter.frame_count)
    assert found[0] == found[1] > 0


def test_a_processor_that_looks_at_the_text(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the lossless mode it is called for each row and position, which the host has to know."""
    module = sys.modules["refreshkv.hosts.transformers.attach"]
    monkeypatch.setattr(module, "recorder_for", lambda device: Tape())
    inputs, options = left_padded(RAGGED), {"repetition_penalty": 1.4}
    vanilla = greedy(llama, inputs, **options)
    for config in (LOSSLESS["default"], LOSSLESS["mixed drafts"]):
        with (
            refreshkv.attach(llama, config),
            pytest.warns(UserWarning, match="without CUDA graphs: .* waits for the device"),
        ):
            assert torch.equal(greedy(llama, inputs, **options), vanilla)
    tape = Tape()
    monkeypatch.setattr(module, "recorder_for", lambda device: tape)
    with refreshkv.attach(llama, LOSSLESS["default"]):
        with pytest.warns(UserWarning, match="without CUDA graphs"):
            greedy(llama, inputs, **options)
        assert tape.replayed == 0
        greedy(llama, inputs)  # the next call is captured again
    assert tape.replayed > 0


def test_compiled_layers_are_for_graphs(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="compiled=True without graphs has no effect"):
        refreshkv.attach(llama, compiled=True, graphs=False)
