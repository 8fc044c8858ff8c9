"""One decoder layer compiled for all: the small operators of a model fuse, and the compiler sees one layer, not 32.

A layer is compiled in pieces, what comes before attention and what comes after it; our own part between them stays as
it is, because it knows which layer it serves. Nothing in a piece depends on the layer, so all share its code. Prompts
are not compiled. What comes out is captured as every other pass is (`captured.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which the compiler of a region leaves alone; a compiler of whole passes goes through it."""
    left_alone = torch._dynamo.disable(function)

    def run(*given: Any, **named: Any) -> Any:
        return (left_alone if _Switch.on else function)(*given, **named)

    return run


class _Switch:
    """As a plain attribute, which the compiler can read."""

    on = False


class Regions:
    """The decoder layers of a model, compiled in the passes of `use`.

    Args:
        model: its decoder layers are the longest list of modules of one class.
        backend: of `torch.compile`.
    """

    def __init__(self, model: nn.Module, backend: Any = "inductor") -> None:
        self.layers = decoder_layers(model)
        self._compiled = [torch.compile(layer._call_impl, backend=backend) for layer in self.layers]

    @contextmanager
    def use(self) -> Iterator[None]:
        """The passes inside run compiled layers."""
        before, _Switch.on = _Switch.on, True
        # Each attention module has a number, which the second layer makes a variable of the code that all share.
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            for layer, compiled in zip(self.layers, self._compiled, strict=True):
                layer._compiled_call_impl = compiled
            try:
                yield
            finally:
                for layer in self.layers:
                    layer._compiled_call_impl = None
                _Switch.on = before


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules of one class in a model."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    alike = [layers for layers in lists if layers and len({type(layer) for layer in layers}) == 1]
    return max(alike, key=len, default=[])
