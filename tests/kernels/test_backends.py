"""Which kernels serve a device, and that whole decode steps over the Triton kernels are those of the reference."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import torch

from tests.kernels.interpreted import device  # isort: skip  # before any kernel
from refreshkv import selection
from refreshkv.config import make_config
from refreshkv.kernels import CPU, REFERENCE, Backend, backend_for, reference, triton_backend
from tests.helpers import Decoder, held, random_tokens
from tests.test_static import StaticDecoder
from tests.test_step import CONFIGS, OPTIONS

OPERATIONS = [field.name for field in fields(Backend) if field.name != "name"]


def test_each_device_has_its_kernels() -> None:
    assert backend_for(torch.device("cpu")) is CPU
    assert backend_for(torch.device("cuda")) is triton_backend()
    assert backend_for(torch.device("meta")) is REFERENCE


@pytest.mark.parametrize("name", OPERATIONS)
def test_signatures_are_those_of_the_reference(name: str) -> None:
    defined = selection.select if name == "select" else getattr(reference, name)
    for backend in (CPU, triton_backend()):
        assert inspect.signature(getattr(backend, name)) == inspect.signature(defined)


def test_heads_wider_than_the_kernels_go_to_the_reference() -> None:
    query, keys = torch.randn(1, 2, 320), torch.randn(1, 1, 9, 320)
    ours = triton_backend().attend(query, keys, keys, scale=0.1)
    assert torch.equal(ours.output, reference.attend(query, keys, keys, scale=0.1).output)


@pytest.mark.parametrize("name", ["fixed", "drift of a head", "every option", "fast"])
def test_decoding_over_the_triton_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager decode steps, among them the first selection, refreshes of some heads and fetched successors."""
    if device().type == "cuda":
        pytest.skip("tests/integrations/test_gpu.py decodes on the GPU")
    every = {**CONFIGS, **OPTIONS, "fast": make_config("fast", budget=8)}
    config = replace(every[name], stride=every[name].stride and 3)
    tokens = random_tokens(length=33, rows=2, group=2, pads=(0, 5))
    expected = Decoder(tokens, config, 24).run(7)
    monkeypatch.setattr("refreshkv.cache.backend_for", lambda device: triton_backend())
    for ours, theirs in zip(Decoder(tokens, config, 24).run(7), expected, strict=True):
        torch.testing.assert_close(ours.output, theirs.output, atol=2e-5, rtol=1e-4)
        assert ours.held == theirs.held


def test_decoding_over_the_triton_kernels_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The static form, whose steps are the same launches whatever the flags say."""
    if device().type == "cuda":
        pytest.skip("tests/integrations/test_gpu.py decodes on the GPU")
    tokens = random_tokens(length=33, rows=2, group=2, pads=(0, 5))
    config = replace(OPTIONS["every option"], stride=3)
    expected = Decoder(tokens, config, 24).run(7)
    monkeypatch.setattr("refreshkv.kernels.ops.backend_for", lambda device: triton_backend())
    static = StaticDecoder(tokens, config, 24)
    for theirs in expected:
        torch.testing.assert_close(static.next(), theirs.output, atol=2e-5, rtol=1e-4)
        assert held(static.cache.partial) == theirs.held
