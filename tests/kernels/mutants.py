"""Kernels broken on purpose: one textual change to the source of a module, which a check has to notice."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import refreshkv.kernels.triton as package

_PREFIX = f"{package.__name__}."


@dataclass(frozen=True)
class Mutant:
    """`old`, which occurs once in the source of `module` ("split"), replaced by `new`."""

    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old} -> {self.new}"


@contextmanager
def mutated(mutant: Mutant, user: str) -> Iterator[ModuleType]:
    """The module `user` ("step") as it would be with the mutant in place, which it may be itself."""
    name = f"{package.__name__}.{mutant.module}"
    source = Path(package.__path__[0], f"{mutant.module}.py").read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} occurs {source.count(mutant.old)} times"
    healthy = {key: sys.modules.pop(key) for key in list(sys.modules) if key.startswith(_PREFIX)}
    with tempfile.TemporaryDirectory() as folder:  # triton reads the source of a kernel from there
        path = Path(folder, f"{mutant.module}.py")
        path.write_text(source.replace(mutant.old, mutant.new))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        broken = importlib.util.module_from_spec(spec)
        sys.modules[name] = broken
        try:
            spec.loader.exec_module(broken)
            setattr(package, mutant.module, broken)
            yield importlib.import_module(f"{package.__name__}.{user}")
        finally:
            for key in [key for key in sys.modules if key.startswith(_PREFIX)]:
                del sys.modules[key]
            sys.modules.update(healthy)
            for key, module in healthy.items():
                setattr(package, key.rpartition(".")[2], module)
