"""`bench.decode`: the contract of its record, and that nothing wrong is timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import refreshkv
from refreshkv import attach
from refreshkv.bench import decode, rivals, shapes, variants
from refreshkv.bench.checks import WrongResultError, relative_rms
from refreshkv.bench.cycle import Exact, kept
from refreshkv.bench.job import Job
from refreshkv.bench.shapes import build
from refreshkv.bench.yardstick import Yardstick
from refreshkv.exact import ExactLayer
from refreshkv.hosts.transformers.static import StaticRefreshCache
from refreshkv.kernels.backend import language

from .conftest import SMALL

JOB = Job(**{name: value for name, value in SMALL.items() if name != "progress"})


def test_contract(record: dict[str, Any]) -> None:
    assert {"mix_over_static", "mix_over_default", "mix_over_own_dense", "share_of_ideal"} <= set(
        record["ratios"]
    )
    timed = {name for name, ms in record["ms"].items() if ms is not None}
    assert timed == set(record["ms"])
    assert set(record["tokens_per_s"]) == set(record["bytes"]) == set(record["bandwidth_share"])
    assert {"own_dense", "full", "mixed", "verify"} == set(record["relative_rms_error"])
    assert all(error < 2e-6 for error in record["relative_rms_error"].values())
    units = {f"{of}_{part}" for of in ("step", "verify") for part in ("logits", "attention")}
    assert set(record["rounding"]) == units
    assert all(1e-8 < unit < 2e-6 for unit in record["rounding"].values())
    assert record["versions"]["torch"] == torch.__version__ and record["device"]
    assert record["versions"]["kernels"] == language(torch.device("cpu"))


def test_derived_numbers(record: dict[str, Any]) -> None:
    ms, ratios, close = record["ms"], record["ratios"], {"rel": 2e-3}
    assert ms["mix"] == pytest.approx(0.9 * ms["partial"] + 0.1 * ms["full"], **close)
    assert record["tokens_per_pass"] == 2.5
    assert ms["exact"] == pytest.approx(ms["cycle"] / 2.5, **close)
    assert ratios["mix_over_static"] == pytest.approx(ms["static"] / ms["mix"], **close)
    # Of the demo shape, in float32: 4 layers, 2 KV heads of 64, 2 rows.
    attention = 256 * (256 + 2 * 128 + 256)
    weights = 4 * (512 * 256 + 4 * (attention + 3 * 256 * 512 + 2 * 256) + 256)
    entry = 4 * 2 * 2 * 64 * 4 * 2
    full, mix = weights + 128 * entry, weights + (0.9 * 32 + 0.1 * 128) * entry
    assert record["bytes"]["own_dense"] == full and record["bytes"]["mix"] == round(mix)
    # Two bits and a quarter of 16 for 64 numbers: 2.25 bits of 32. The newest block is half complete.
    mixed = weights + (128 * 2.25 / 32 + 32 + 32) * entry
    assert record["bytes"]["mixed"] == mixed
    faster = ms["own_dense"] / ms["mix"]
    assert ratios["share_of_ideal"] == pytest.approx(faster / (full / mix), **close)
    cycle = 4 * weights + (3 * 32 + 128) * entry
    assert record["ideal_over_own_dense"]["exact"] == pytest.approx(full / cycle * 2.5, **close)
    assert record["bandwidth_share"]["mix"] == pytest.approx(mix / ms["mix"] * 1e3 / 1e9, **close)


def test_the_curve_is_the_cycle_over_more_tokens(record: dict[str, Any]) -> None:
    curve = record["acceptance_curve"]
    assert [one["tokens_per_pass"] for one in curve if one["acceptance"] in (0, 0.5, 1)] == [
        1,
        2.5,
        4,
    ]
    at_half = next(one for one in curve if one["acceptance"] == 0.5)
    assert at_half["exact_over_own_dense"] == record["ratios"]["exact_over_own_dense"]
    assert at_half["ideal"] == record["ideal_over_own_dense"]["exact"]


def test_every_step_begins_at_the_context() -> None:
    """Ours share a store; whatever ran before, the next one finds it as it was."""
    model = build("demo", JOB.device, JOB.dtype)
    with torch.no_grad(), refreshkv.attach(model) as session:
        context = variants.Context(model, JOB)
        caches = variants.caches(model, context)
        dense = caches["own_dense"]
        turns = decode._Turns(model, session.implementation_below, caches, context, {})
        first = turns.steps["own_dense"].once()
        turns.check()
        turns.time(progress=False)
        assert dense.layers[0].inner.length == 128
        assert torch.equal(turns.steps["own_dense"].once(), first)
        # The check let the mixed mode read everything exactly; what was timed reads K of it, and two whole blocks.
        mixed = caches["mixed"].layers[0].inner
        assert mixed.budget.tolist() == [32, 32] and mixed.copy.finished.tolist() == [2, 2]
        assert caches["snapkv"].layers[0].inner.length == 32
        assert caches["empty"].layers[0].inner.length == 1
        assert caches["static"].get_seq_length() == caches["default"].get_seq_length() == 128


@pytest.mark.parametrize("static", [False, True])
def test_a_wrong_full_pass_is_not_timed(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ExactLayer.verify
    monkeypatch.setattr(ExactLayer, "verify", lambda *given: right(*given) * 1.01)
    with pytest.raises(WrongResultError, match="verify: logits differ from the truth by"):
        decode.run(**SMALL, static=static)


def test_the_lossless_mode_over_either_form_of_the_cache() -> None:
    """A cycle of three drafts: the same logits of drafts and of the full pass, before and after others."""
    model = build("demo", JOB.device, JOB.dtype)
    found = {}
    with torch.no_grad(), refreshkv.attach(model) as session:
        for static in (False, True):
            job = replace(JOB, static=static)
            cache = variants.caches(model, variants.Context(model, job))["exact"]
            assert isinstance(cache, StaticRefreshCache) == static
            exact = Exact(model, session.implementation_below, cache, job)
            token = torch.tensor([[5], [7]])
            for _ in range(2):
                exact.cycle(token, 2)
                exact.take_back()
                cache.before_drafts()
                drafts = [exact.draft(token + ahead, ahead).clone() for ahead in range(3)]
                verified = exact.verify(torch.cat([token, token + 1, token + 2, token], 1)).clone()
                exact.take_back()
            found[static] = torch.cat([*drafts, verified], 1)
            assert not exact.capture()  # of a GPU
    torch.testing.assert_close(found[True], found[False], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_the_other_architectures_have_a_truth_too(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        shapes.SHAPES, "small", (kind, *shapes.SHAPES["demo"][1:4], 2, 4, 2, 64, True)
    )
    found = decode.run(**{**SMALL, "shape": "small", "dtype": "bfloat16"}, skip=("default",))
    assert set(found["relative_rms_error"]) == {"own_dense", "full", "mixed", "verify"}
    assert all(error < 0.02 for error in found["relative_rms_error"].values())


class NoWait(TorchDispatchMode):
    """Raises where Python asks for a number in a tensor, which on a GPU waits for all that was launched."""

    ASKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, call: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if call.__name__.split(".")[0] in self.ASKS:
            raise RuntimeError(f"{call} waits")
        return call(*given, **(named or {}))


def test_no_timed_pass_of_ours_waits_for_the_device() -> None:
    """So that each can be a CUDA graph."""
    model, job = build("demo", JOB.device, JOB.dtype), replace(JOB, static=True)
    with torch.no_grad(), refreshkv.attach(model) as session:
        below, context = session.implementation_below, variants.Context(model, job)
        made = variants.caches(model, context, ("default",))
        exact = Exact(model, below, made.pop("exact"), job)
        exact.begin()
        exact.take_back()
        passes = {
            name: variants.step(model, below, name, cache, context) for name, cache in made.items()
        }
        passes |= {"draft": exact.draft.timed, "verify": exact.verify.timed}
        assert len(passes) == 10
        for one in passes.values():
            with NoWait():
                one.call()
            one.after()
        with pytest.raises(RuntimeError, match="waits"), NoWait():
            bool(torch.ones(()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["full_step", "_ordinary_step"])
def test_a_wrong_full_step_is_not_timed(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one in a hundred of what attention gives, which in 16 bits nobody would see in the logits."""
    from refreshkv import step

    given, variant = {**SMALL, "dtype": dtype}, "full" if name == "full_step" else "own_dense"
    others = tuple(other for other in variants.VARIANTS if other != variant)
    right = getattr(step, name)
    found = decode.run(**given, skip=others)
    assert found["relative_rms_error"][variant] > 0 and found["ms"][variant] > 0
    monkeypatch.setattr(step, name, lambda *given: right(*given) * 1.01)
    with pytest.raises(WrongResultError, match=f"{variant}: (logits|attention) differ from"):
        decode.run(**given, skip=others)


@pytest.mark.parametrize("static", [False, True])
def test_a_wrong_mixed_step_is_not_timed(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from refreshkv import step

    right = step.mixed_step
    monkeypatch.setattr(step, "mixed_step", lambda *given: right(*given) * 1.01)
    with pytest.raises(WrongResultError, match="mixed: logits differ from"):
        decode.run(**SMALL, static=static)


def test_the_truth_is_that_of_the_model_in_a_wider_dtype() -> None:
    """By the model itself, prompt and all: a prefill in float64."""
    model, wide = (
        build("demo", JOB.device, torch.float32),
        build.__wrapped__("demo", JOB.device, torch.float64),
    )
    wide.load_state_dict(model.state_dict())
    tokens = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = wide(tokens[:, :17], use_cache=True).past_key_values
        held = [(layer.keys.float(), layer.values.float()) for layer in before.layers]
        for count in (1, 3):
            yardstick = Yardstick(model, "sdpa", held, tokens[:, 17 : 17 + count])
            expected = wide(tokens[:, : 17 + count]).logits[:, 17:]
            assert relative_rms(yardstick.truth.logits, expected) < 1e-6
            assert 1e-8 < yardstick.unit["logits"] < 1e-6
            with yardstick.pinned() as attended:
                model(tokens[:, 17 : 17 + count], past_key_values=_cache(held))
            error = relative_rms(torch.stack(attended), torch.stack(yardstick.truth.attended))
            assert error < 1e-6


def _cache(held: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for index, both in enumerate(held):
        cache.update(*both, index)
    return cache


def test_a_variant_of_others_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = variants.forward

    def forward(model: Any, below: str, cache: Any, *rest: Any) -> torch.Tensor:
        if type(cache).__name__ == "DynamicCache" and below == "sdpa":
            raise MemoryError("no room")
        return right(model, below, cache, *rest)

    monkeypatch.setattr(variants, "forward", forward)
    found = decode.run(**SMALL, skip=("exact", "mixed"))
    assert found["ms"]["default"] is None and found["ms"]["static"] > 0
    assert found["notes"] == {"default": "left out: MemoryError: no room"}


def test_a_rival_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rivals.flash_sdpa
    monkeypatch.setattr(rivals, "flash_sdpa", lambda *given: right(*given) * 1.01)
    found = decode.run(**SMALL, skip=("exact", "mixed"))
    assert found["ms"]["flash"] is None and found["ms"]["own_dense"] > 0
    assert found["notes"]["flash"].startswith("left out: WrongResultError: flash: logits differ")


def test_committed_tokens_have_the_given_mean() -> None:
    tokens = [kept(cycle, Job(draft=8, acceptance=0.85)) for cycle in range(10)]
    assert set(tokens) == {7, 8} and sum(tokens) == 78


def test_several_sizes_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(refreshkv, "attach", lambda model: seen.append(model) or attach(model))
    skip = tuple(name for name in variants.VARIANTS if name != "own_dense")
    for batch, context in ((1, 64), (2, 96)):
        found = decode.run(**{**SMALL, "batch": batch, "context": context}, skip=skip)
        assert (found["batch"], found["context"]) == (batch, context)
    assert len(seen) == 2 and seen[0] is seen[1]


def test_our_steps_on_the_static_form() -> None:
    """As on a GPU, where they are compiled; what is checked is equal, and everything is timed."""
    static = decode.run(**SMALL, static=True)
    timed = {name for name, ms in static["ms"].items() if ms is not None}
    assert timed == set(static["ms"])
    assert all(error < 2e-6 for error in static["relative_rms_error"].values())
