"""What a run holds: one full store, and of each variant what the estimate says."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import refreshkv
from refreshkv.bench import decode, memory, roofline, timing, variants
from refreshkv.bench.cycle import Exact
from refreshkv.bench.job import Job
from refreshkv.bench.memory import Need, Needs
from refreshkv.bench.shapes import build, config_of, outline

from .conftest import SMALL


def needs(job: Job) -> Needs:
    return memory.needs_of(job, roofline.sizes_of(outline(config_of(job.shape), job.dtype)))


def held(*roots: Any) -> int:
    """Bytes of all distinct tensors that can be reached from the attributes of some objects."""
    seen, storages, waiting = set[int](), dict[int, int](), list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | torch.nn.Module | torch.Generator):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, list | tuple | dict) or type(one).__module__.startswith(
            ("refreshkv", "transformers.cache_utils", "types")
        ):
            waiting += gc.get_referents(one)
    return sum(storages.values())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nothing_is_kept_twice(static: bool, dtype: str) -> None:
    sizes = {"context": 4096, "batch": 2, "budget": 512, "draft": 3}
    job = Job(shape="demo", dtype=dtype, static=static, **sizes)
    expected, model = needs(job), build("demo", job.device, job.dtype)
    with torch.no_grad(), refreshkv.attach(model) as session:
        context = variants.Context(model, job)
        store = held(context.static)
        assert store == pytest.approx(expected.store, rel=1e-3)
        made = variants.caches(model, context)
        exact = Exact(model, session.implementation_below, made["exact"], job)
        for name, cache in made.items():
            step = variants.step(model, session.implementation_below, name, cache, context)
            (exact.begin if name == "exact" else step.once)()
        exact.verify(torch.ones(2, 4, dtype=torch.int64))
        exact.take_back()
        for name, cache in made.items():
            stays = expected.variants[name].stays
            assert held(context.static, cache) - store == pytest.approx(stays, rel=0.1, abs=3e5)
        everything = sum(expected.variants[name].stays for name in made)
        assert held(context.static, made) - store == pytest.approx(everything, rel=0.1, abs=1e6)


def test_four_rows_of_128k_fit_in_141_gb_but_for_the_growing_cache_of_others() -> None:
    job = Job(shape="llama-3.1-8b", context=131072, batch=4, budget=0.1, static=True)
    left_out = needs(job).fitting(variants.VARIANTS, 141e9)
    assert set(left_out) == {"default"}
    assert "GB with the others, of 141.0 GB" in left_out["default"]
    with pytest.raises(ValueError, match=r"need .* GB, and there are 80.0 GB: give fewer rows"):
        needs(job).fitting(variants.VARIANTS, 80e9)


def test_only_the_largest_passing_need_counts() -> None:
    given = {"a": Need(10, 50), "b": Need(20, 40), "c": Need(40), "d": Need(0, 81)}
    found = Needs(100, 100, 30, given).fitting("abcd", 200 + memory._SPARE + 120)
    assert set(found) == {"d"}  # 70 stay, and 50 pass
    assert set(Needs(100, 100, 30, given).fitting("dabc", 200 + memory._SPARE + 120)) == {"c"}


def test_what_does_not_fit_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(**{name: value for name, value in SMALL.items() if name != "progress"})
    sizes = needs(job)
    most = sizes.weights + sizes.store + memory._SPARE + sizes.checks
    monkeypatch.setattr(memory, "available", lambda device: most)
    found = decode.run(**SMALL)
    left_out = {name for name, note in found["notes"].items() if note.startswith("left out: needs")}
    assert left_out == {"exact", "mixed", "partial", "full"}
    assert all(found["ms"][name] is None for name in left_out)
    assert found["ms"]["own_dense"] > 0 and found["memory"]["store"] == sizes.store


@pytest.mark.parametrize("name", ["own_dense", "mixed", "exact"])
@pytest.mark.parametrize("when", ["filled", "run", "timed"])
def test_one_of_ours_that_finds_no_memory_is_left_out(
    name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever that shows, the others are timed."""
    error, serve, forward = (
        torch.OutOfMemoryError("no room"),
        variants.Context.serve,
        variants.forward,
    )
    modes = {"own_dense": "full", "mixed": "mixed", "exact": "exact"}
    timed: list[bool] = []

    def fails(cache: Any) -> bool:
        mode = getattr(getattr(cache, "refresh", None), "mode", None)
        return mode == modes[name] and cache.served_length() in (None, 0, 128)

    def serve_or_fail(context: Any, cache: Any, count: int) -> None:
        if when == "filled" and fails(cache) and count == 128:
            raise error
        serve(context, cache, count)

    def forward_or_fail(model: Any, below: str, cache: Any, *rest: Any) -> torch.Tensor:
        if fails(cache) and (when == "run" or timed):
            raise error
        return forward(model, below, cache, *rest)

    def turns(*given: Any) -> Any:
        timed.extend([True] * (when == "timed"))
        return timing.take_turns(*given)

    monkeypatch.setattr(variants.Context, "serve", serve_or_fail)
    monkeypatch.setattr(variants, "forward", forward_or_fail)
    monkeypatch.setattr("refreshkv.bench.cycle.forward", forward_or_fail)
    monkeypatch.setattr(decode, "take_turns", turns)
    found = decode.run(**SMALL)
    assert found["notes"] == {name: "left out: OutOfMemoryError: no room"}
    assert found["ms"][name] is None
    assert all(found["ms"][other] > 0 for other in ("partial", "full", "static", "default"))
