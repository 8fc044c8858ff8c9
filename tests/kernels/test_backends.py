"""Which kernels serve a device, and that whole decode steps over the Triton kernels are those of the reference."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import device  # isort: skip  # before any kernel
from refreshkv.config import make_config
from refreshkv.kernels import reference
from refreshkv.kernels.backend import (
    CPU,
    OPERATIONS,
    REFERENCE,
    Backend,
    backend_for,
    triton_backend,
)
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.native import attention
from refreshkv.kernels.native import mixed as native_mixed
from refreshkv.kernels.native import rings as native_rings
from refreshkv.kernels.native import selection as native_selection
from refreshkv.kernels.operators import OPERATORS
from refreshkv.kernels.options import AttendOptions, Entries
from refreshkv.policy import selection
from tests.helpers import Decoder, held, needs_compiler, random_tokens
from tests.kernels import rings
from tests.kernels.cases import SPARE_ROWS, Case, laid_out
from tests.kernels.interpreted import each_tensor, there
from tests.kernels.launches import run_triton
from tests.test_static import StaticDecoder
from tests.test_step import CONFIGS, OPTIONS


def test_each_device_has_its_kernels() -> None:
    assert backend_for(torch.device("cpu")) is CPU
    assert backend_for(torch.device("cuda")) is triton_backend()
    assert backend_for(torch.device("meta")) is REFERENCE


@pytest.mark.parametrize("name", OPERATIONS)
def test_signatures_are_those_of_the_reference(name: str) -> None:
    defined = selection.select if name == "select" else getattr(reference, name)
    for backend in (CPU, triton_backend(), OPERATORS):
        assert inspect.signature(getattr(backend, name)) == inspect.signature(defined)


def arguments(layout: str) -> dict[str, Any]:
    """One of every name, none of them a default."""
    gen = torch.Generator().manual_seed(0)
    case = Case(group=2, length=40, dtype=torch.bfloat16)
    query, dense, _ = case.dense()
    kept = case.rows + SPARE_ROWS
    copies = torch.randn(2, kept, 2, 9, 64, generator=gen).bfloat16()
    positions = torch.rand(kept, 2, 40, generator=gen).argsort(-1).int()
    return {
        "query": query,
        "entries": laid_out(dense, layout),
        "options": AttendOptions(
            scale=0.2,
            softcap=5.0,
            sinks=torch.randn(4, generator=gen),
            visible=torch.rand(2, 1, 40, generator=gen) < 0.8,
            lengths=torch.tensor([[40, 31], [28, 40]]),
            heads=torch.tensor([[True, True], [False, True]]),
            reduction="mean",
        ),
        "heads": torch.tensor([[True, True], [False, True]]),
        "visible": torch.rand(2, 40, generator=gen) < 0.8,
        "newest": torch.tensor([[3, 1], [0, 2]]),
        "count": 2,
        "starts": torch.tensor([37, 30]),
        "counts": torch.tensor([3, 2]),
        "window": 20,
        "expected": torch.randn(2, 4, 3, generator=gen),
        "scores": torch.rand(2, 2, 40, generator=gen),
        "budget": torch.tensor([7, 5, 6, 4]),
        "pool_kernel": 3,
        "recent": 2,
        "anchors": positions[:2, :, 20:22],
        "ends": torch.tensor([40, 33]),
        "slots": 8,
        "wanted": positions[:2, :, 5:8],
        "ring_keys": copies[0],
        "ring_values": copies[1],
        "ring_positions": positions[..., :9].contiguous(),
        "filled": torch.tensor([[3, 2], [1, 3]]),
        "state": torch.randint(0, 7, (6, 4, 2), generator=gen),
        "tally": torch.randint(0, 50, (2, 2, 5), generator=gen),
        "hidden": torch.tensor([2, 0]),
        "counted": torch.tensor([True, False]),
        "at": torch.tensor([39, 31]),
        "back": 1,
        "best": torch.tensor([[[3, 1], [2, 0]], [[5, 8], [0, 4]]]),
        "full": torch.tensor([[False, True], [False, False]]),
        "new_keys": torch.randn(2, 2, 2, 64, generator=gen).bfloat16(),
        "new_values": torch.randn(2, 2, 2, 64, generator=gen).bfloat16(),
        "reference": torch.randn(2, 2, 64, generator=gen),
        "summary": torch.randn(2, 2, 64, generator=gen),
        "stride": 2,
        "threshold": 0.1,
        "per_head": True,
        "into": torch.randn(2, 4, 64, generator=gen),
        "codes": Codes.room(query, (64, 64), 2, 2, 3),
        "first": torch.tensor([0, 7]),
        "finished": torch.tensor([1, 0]),
        "begin": torch.tensor([0, 1]),
        "end": torch.tensor([1, 2]),
        "most": 2,
        "skip": 0.1,
    }


def taken_by(name: str) -> dict[str, Any]:
    """Those that the reference takes."""
    wanted = inspect.signature(getattr(REFERENCE, name)).parameters.keys()
    whole = not wanted.isdisjoint(("starts", "ring_keys", "codes"))
    every = arguments("pages rows" if whole else "list pages rows")
    if "starts" in wanted:
        every["query"] = every["query"][:, :, None].repeat(1, 1, 3, 1)
    if name in ("select", "attend_mixed"):
        every["budget"] = every["budget"][:2]
    if name == "attend_mixed":
        every["tally"] = every["tally"][..., 2:4]
    if name == "write":
        every["full"] = True
    if name == "drift":
        every["state"] = every["state"][:, :2].contiguous()
    if "codes" in wanted:
        every["codes"] = Codes.room(every["entries"].keys[:4], (64, 64), 2, 2, 3)
        every["entries"] = replace(every["entries"], rows=None)
    return {key: every[key] for key in wanted}


def results_of(kernel: Any, given: dict[str, Any]) -> list[Tensor]:
    """What comes back, and what was written."""
    tensors: list[Tensor] = []
    each_tensor(lambda tensor: tensors.append(tensor) or tensor, kernel(**given))
    return tensors + [x for x in given.values() if isinstance(x, Tensor)]


@needs_compiler
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_argument_by_its_name_and_no_other(name: str) -> None:
    """In the kernels themselves: those in C++, and operators over these, have no signature to compare."""
    homes = {"select": native_selection, "drift": native_selection}  # which takes anything
    homes |= dict.fromkeys(("write", "push", "fetch", "refresh"), native_rings)
    homes |= dict.fromkeys(("attend_mixed", "encode"), native_mixed)
    module = homes.get(name, attention)
    assert module.serves(**taken_by(name))
    expected = results_of(getattr(CPU, name), taken_by(name))
    for theirs, ours in zip(
        expected, results_of(getattr(OPERATORS, name), taken_by(name)), strict=True
    ):
        assert torch.equal(ours, theirs)
    defined = inspect.signature(getattr(REFERENCE, name)).parameters
    for backend in (REFERENCE, CPU, OPERATORS, triton_backend()):
        move = there if backend.name == "triton" else lambda tensor: tensor
        kernel = getattr(backend, name)
        kernel(**each_tensor(move, taken_by(name)))
        others = arguments("").keys() - defined.keys()
        for other in (*others, "scale", "library", "threads"):
            with pytest.raises(TypeError, match=other):
                kernel(**each_tensor(move, taken_by(name)), **{other: None})
        required = [key for key, p in defined.items() if p.default is p.empty]
        with pytest.raises(TypeError, match=required[-1]):
            kernel(
                **{k: v for k, v in each_tensor(move, taken_by(name)).items() if k != required[-1]}
            )


def test_operators_keep_the_order_of_the_reference() -> None:
    query, entries, options = taken_by("attend").values()
    by_order = OPERATORS.attend(query, entries, options)
    assert torch.equal(by_order.output, CPU.attend(query, entries, options).output)
    for wrong in ((query, entries, options, 0.1), (query, entries)):
        with pytest.raises(TypeError, match="attend"):
            OPERATORS.attend(*wrong)


def test_the_operator_passes_a_guess_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the kernels in C++ do not use."""
    monkeypatch.setattr("refreshkv.kernels.schema.backend_for", lambda device: REFERENCE)
    given = taken_by("verify")
    scores = OPERATORS.verify(**given)[1].scores
    assert torch.equal(scores, REFERENCE.verify(**given)[1].scores)
    assert not torch.equal(scores, OPERATORS.verify(**given | {"expected": None})[1].scores)


@pytest.mark.parametrize("recent", [0, 3, 100, -1, torch.tensor([3, 0])], ids=str)
def test_operators_keep_as_many_recent_tokens_as_they_are_told(recent: int | Tensor) -> None:
    scores, budget = arguments("")["scores"], torch.tensor([6, 6])
    ours = OPERATORS.select(scores, budget, recent=recent, slots=6)
    theirs = selection.select(scores, budget, recent=recent)
    assert torch.equal(ours.positions, theirs.positions)
    with pytest.raises(ValueError, match="select needs slots"):
        OPERATORS.select(scores, budget, recent=recent)


@pytest.mark.parametrize("backend", [REFERENCE, CPU, OPERATORS], ids=lambda backend: backend.name)
def test_the_output_is_written_where_it_is_wanted(backend: Backend) -> None:
    rings.check_into(backend.attend_and_score, Case(length=90, sinks=True, value_dim=48))


@pytest.mark.parametrize("backend", [REFERENCE, OPERATORS], ids=lambda backend: backend.name)
def test_rings_are_kept_alike(backend: Backend) -> None:
    for name in rings.WRITERS:
        rings.check_writer(name, getattr(backend, name))
    rings.check_drift(backend.drift)


@pytest.mark.parametrize("wide", ["keys", "values"])
def test_heads_wider_than_the_kernels_go_to_the_reference(wide: str) -> None:
    dims = {"keys": 64, "values": 64} | {wide: 320}
    query, options = torch.randn(1, 2, dims["keys"]), AttendOptions(scale=0.1)
    entries = Entries(*(torch.randn(1, 1, 9, dim) for dim in dims.values()))
    expected = reference.attend(query, entries, options).output
    for given, named in (
        ((query, entries, options), {}),
        ((query, entries), {"options": options}),
        ((), {"query": query, "entries": entries, "options": options}),
    ):
        assert torch.equal(triton_backend().attend(*given, **named).output, expected)


@pytest.mark.parametrize("name", ["fixed", "drift of a head", "every option", "lse-drop"])
def test_decoding_over_the_triton_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager decode steps, among them the first selection, refreshes of some heads and fetched successors."""
    if device().type == "cuda":
        pytest.skip("tests/hosts/test_gpu.py decodes on the GPU")
    every = {**CONFIGS, **OPTIONS, "lse-drop": make_config("lse-drop", budget=8)}
    config = replace(every[name], stride=every[name].stride and 3)
    tokens = random_tokens(length=33, rows=2, group=2, pads=(0, 5))
    expected = Decoder(tokens, config, 24).run(7)
    monkeypatch.setattr("refreshkv.cache.store.backend_for", lambda device: triton_backend())
    for ours, theirs in zip(Decoder(tokens, config, 24).run(7), expected, strict=True):
        torch.testing.assert_close(ours.output, theirs.output, atol=2e-5, rtol=1e-4)
        assert ours.held == theirs.held


def test_decoding_over_the_triton_kernels_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The static form, whose steps are the same launches whatever the flags say."""
    if device().type == "cuda":
        pytest.skip("tests/hosts/test_gpu.py decodes on the GPU")
    tokens = random_tokens(length=33, rows=2, group=2, pads=(0, 5))
    config = replace(OPTIONS["every option"], stride=3)
    expected = Decoder(tokens, config, 24).run(7)
    run_triton(monkeypatch)
    static = StaticDecoder(tokens, config, 24)
    for theirs in expected:
        torch.testing.assert_close(static.next(), theirs.output, atol=2e-5, rtol=1e-4)
        assert held(static.cache.ring) == theirs.held
