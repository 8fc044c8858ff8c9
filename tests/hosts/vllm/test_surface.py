"""A vLLM in which anything is missing that we touch is refused, with what it is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from refreshkv.hosts.vllm import plugin, surface

BACKENDS = "vllm.v1.attention.backends"
LOADED = "raise AssertionError('an attention backend was imported')\n"


def write(folder: Path, without: tuple[str, ...] = ()) -> None:
    """A package `vllm` that has what is asked for, but for one thing: a module, an object of it, a part of that."""
    sources: dict[str, str] = {}
    for module, objects in surface.IMPORTED.items():
        sources[module] = "\n".join(
            f"class {name}:\n    pass\n"
            + "".join(f"    {part} = 0\n" for part in parts if (module, name, part) != without)
            for name, parts in objects.items()
            if (module, name) != without
        )
    sources[f"{BACKENDS}.registry"] += (
        "\ncalls = []\n"
        "def register_backend(backend, class_path):\n    calls.append((backend, class_path))\n"
        if without[:2] != (f"{BACKENDS}.registry", "register_backend")
        else ""
    )
    for module, classes in surface.READ.items():
        sources[module] = LOADED
        for name, methods in classes.items():
            if (module, name) == without:
                continue
            sources[module] += f"class {name}:\n    pass\n"
            for method, parts in methods.items():
                if (module, name, method) == without:
                    continue
                kept = [part for part in parts if (module, name, method, part) != without]
                if method == "self":
                    body = "".join(f"        self.{part} = 0\n" for part in kept)
                    sources[module] += f"    def more(self):\n        pass\n{body}"
                else:
                    sources[module] += f"    def {method}({', '.join(['self', *kept])}): ...\n"
    for module, text in sources.items():
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if (module,) != without:
            path.write_text(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a package `vllm` is looked for; nothing of it stays loaded."""
    outside = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "vllm"
    }
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(surface, "version", lambda: None)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(outside)


def everything() -> list[tuple[str, ...]]:
    """All that can be missing."""
    found: list[tuple[str, ...]] = [(module,) for module in surface.IMPORTED]
    for module, objects in surface.IMPORTED.items():
        for name, parts in objects.items():
            found += [(module, name), *[(module, name, part) for part in parts]]
    for module, classes in surface.READ.items():
        found.append((module,))
        for name, methods in classes.items():
            found.append((module, name))
            for method, parts in methods.items():
                if method != "self":
                    found.append((module, name, method))
                found += [(module, name, method, part) for part in parts]
    return [x for x in found if x[1:2] != ("register_backend",) or len(x) == 2]


def test_a_whole_surface_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the backends of vLLM, which would load all of it, are not imported. Several times is as good as once."""
    write(folder)
    for switch in ("0", "1"):
        monkeypatch.setenv(plugin.CPU_SWITCH, switch)
        plugin.register()
    registry = importlib.import_module(f"{BACKENDS}.registry")
    paths = [path for _, path in registry.calls]
    assert paths == [plugin.CUDA_BACKEND, plugin.CUDA_BACKEND, plugin.CPU_BACKEND]


@pytest.mark.parametrize("missing", everything(), ids=".".join)
def test_what_is_missing_is_named(folder: Path, missing: tuple[str, ...]) -> None:
    write(folder, missing)
    with pytest.raises(surface.UnsupportedVllm) as error:
        surface.check()
    says = str(error.value)
    assert (
        says.startswith("refreshkv supports vllm") and ">=0.30" in says and "VLLM_PLUGINS" in says
    )
    assert missing[-1] in says and missing[0] in says and "\n" not in says


def test_a_parameter_of_a_function_that_is_missing(folder: Path) -> None:
    write(folder)
    registry = folder / "vllm/v1/attention/backends/registry.py"
    registry.write_text(registry.read_text().replace("class_path)", "path)"))
    with pytest.raises(surface.UnsupportedVllm, match="register_backend has no 'class_path'"):
        surface.check()


@pytest.mark.parametrize("found, supported", [
    ("0.29.1", False), ("0.30.0", True), ("0.32.0+cpu", True), ("0.33.1rc1", True), ("0.34.0", False), ("1.0", False),
])  # fmt: skip
def test_releases(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: str, supported: bool
) -> None:
    write(folder)
    monkeypatch.setattr(surface, "version", lambda: found)
    if supported:
        surface.check()
        return
    with pytest.raises(surface.UnsupportedVllm, match=rf"and it is {found};"):
        surface.check()


def test_the_classes_that_are_registered_are_there() -> None:
    """By name: what they are made of is not installed."""
    for path in (plugin.CUDA_BACKEND, plugin.CPU_BACKEND):
        module, _, name = path.rpartition(".")
        origin = importlib.util.find_spec(module)
        assert origin is not None and origin.origin is not None
        assert f"class {name}(" in Path(origin.origin).read_text()
