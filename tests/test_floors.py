"""Imports point downwards, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import refreshkv

SOURCE = Path(refreshkv.__file__).parent
# From the ground up. The parts of one floor do not import each other.
FLOORS = [
    {"config", "safe_folder", "text"},
    {"policy", "presets", "stats", "tasks", "weights"},
    {"kernels", "demo"},
    {"models"},
    {"cache"},
    {"mixed"},
    {"step"},
    {"exact", "methods"},
    {"hosts"},
    {"bench", "evals"},
    {"training"},
    {"reproduce"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor}


def module_name(path: Path) -> str:
    """`kernels/cpu.py` -> "kernels.cpu", `kernels/__init__.py` -> "kernels", the package's own -> ""."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def home(name: str) -> str:
    """Where `from refreshkv import name` leads; "" for what the package itself holds."""
    if is_module(name):
        return name
    return refreshkv._HOME.get(name, "").removeprefix("refreshkv").removeprefix(".")


def imports(source: str) -> set[str]:
    """The package's own modules that some code imports anywhere, in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "refreshkv":
                found |= {f"refreshkv.{home(alias.name)}" for alias in node.names}
            else:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("refreshkv.") for name in found if name.startswith("refreshkv.")}
    return inside - {""}


def may_import(user: str, used: str) -> bool:
    part, other = user.split(".")[0], used.split(".")[0]
    if part == other == "hosts":  # hosts do not import each other
        return used.startswith(".".join(user.split(".")[:2]))
    if part == "kernels" and other != part:  # plain tensors: no state, no counts
        return other in {"config", "safe_folder", "text", "policy"}
    return part == other or FLOOR_OF[part] > FLOOR_OF[other]


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if module_name(path)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    user = module_name(path)
    assert user.split(".")[0] in FLOOR_OF, f"{user} has no floor yet: give it one in FLOORS"
    upwards = sorted(name for name in imports(path.read_text()) if not may_import(user, name))
    assert not upwards, f"{user} imports {', '.join(upwards)}"


@pytest.mark.parametrize(
    ("user", "code", "allowed"),
    [
        ("cache.store", "from refreshkv.step import Attention", False),
        ("kernels.backend", "from refreshkv.kernels import reference", True),
        ("kernels.backend", "from refreshkv.policy import selection", True),
        ("kernels.backend", "from refreshkv.stats import Stats", False),
        ("kernels.backend", "from refreshkv.cache.store import DenseStore", False),
        ("step", "from refreshkv.methods import snapkv", False),
        ("exact", "from refreshkv.methods import find", False),
        ("methods.tova", "from refreshkv.hosts.transformers import cache", False),
        ("hosts.transformers.attach", "from refreshkv.methods import find", True),
        ("step", "def f():\n    from refreshkv import attach", False),
        ("cli.bench", "from refreshkv import attach", True),
        ("demo", "import refreshkv.cli.common", False),
        ("demo", "from refreshkv.tasks import make_task", True),
        ("demo", "from refreshkv.evals.decoding import generate", False),
        ("tasks", "from refreshkv.demo import tokenizer", False),
        ("evals.runner", "from refreshkv.tasks import make_task", True),
        ("evals.plots", "from refreshkv.bench import plots", False),
        ("policy.triggers", "from refreshkv.stats import Stats", False),
        ("bench.decode", "from refreshkv.evals import plots", False),
        ("bench.decode", "import torch", True),
        ("training.tail", "from refreshkv.kernels import reference", True),
        ("evals.runner", "from refreshkv.training import objective", False),
        ("reproduce.jobs", "from refreshkv.evals import runner", True),
        ("training.run", "from refreshkv.reproduce import tables", False),
        ("hosts.lm_eval", "from refreshkv.demo import MODEL_PATH", True),
        ("hosts.vllm", "from refreshkv.hosts.transformers import attach", False),
        ("hosts.vllm.worker", "from refreshkv.hosts.vllm import plugin", True),
    ],
)
def test_the_check_sees_every_form_of_import(user: str, code: str, allowed: bool) -> None:
    assert all(may_import(user, name) for name in imports(code)) is allowed


def loaded_by(statement: str) -> set[str]:
    """The top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    loaded = loaded_by("import refreshkv; refreshkv.make_config('paper-llama'); dir(refreshkv)")
    assert "refreshkv" in loaded
    assert not loaded & {"torch", "transformers", "numpy"}


def test_the_algorithm_does_not_need_transformers() -> None:
    loaded = loaded_by("import refreshkv.step")
    assert "torch" in loaded
    assert "transformers" not in loaded


@pytest.mark.parametrize("name", refreshkv.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(refreshkv, name) is not None
    assert name in dir(refreshkv)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = refreshkv.atach
