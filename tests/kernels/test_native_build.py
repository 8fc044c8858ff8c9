"""The C++ kernels are compiled once, shared, and done without where that fails: said once, served by the reference."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refreshkv.kernels import reference
from refreshkv.kernels.backend import CPU
from refreshkv.kernels.native import attention, build
from tests.helpers import needs_compiler
from tests.kernels.cases import PLAIN

pytestmark = needs_compiler


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build.library.cache_clear()


def test_the_library_is_compiled_once(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))
    monkeypatch.setenv(
        "CXX", f"{shutil.which('env')} c++"
    )  # a command with arguments, as with ccache
    path = build.build()
    assert path.parent == fresh_build / "refreshkv"
    assert list(path.parent.iterdir()) == [path]
    before = path.stat().st_mtime_ns
    assert build.build() == path
    assert path.stat().st_mtime_ns == before
    assert build.build(["-DOTHER"]) != path


@pytest.mark.parametrize(
    "reason", ["no compiler", "it fails", "it is not there", "no OpenMP", "no place to write"]
)
def test_without_a_library_one_warning_says_why(
    reason: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "no compiler":
        monkeypatch.setenv("PATH", str(fresh_build))
        said = "no C\\+\\+ compiler is on the path"
    elif reason == "it fails":
        monkeypatch.setenv("CXX", shutil.which("false") or "/bin/false")
        said = "false failed"
    elif reason == "it is not there":
        monkeypatch.setenv("CXX", "/nonexistent/c++")
        said = "does not run"
    elif reason == "no OpenMP":
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-fno-openmp"))
        said = "OpenMP is needed"
    else:
        monkeypatch.setattr(build.safe_folder, "kept", lambda: None)
        monkeypatch.setattr(build.safe_folder, "private", lambda: fresh_build / "gone")
        said = "No such file or directory"
    given = replace(PLAIN, dtype=torch.bfloat16).inputs()
    with pytest.warns(RuntimeWarning, match=said) as warned:
        ours = [CPU.attend(*given).output for _ in range(2)]
    assert len(warned) == 1
    assert "REFRESHKV_NATIVE=0" in str(warned[0].message)
    assert torch.equal(ours[1], reference.attend(*given).output)
    assert not [path for path in fresh_build.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("error")
def test_it_can_be_switched_off(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRESHKV_NATIVE", "0")
    given = replace(PLAIN, dtype=torch.bfloat16).inputs()
    assert not attention.serves(*given)
    assert torch.equal(CPU.attend(*given).output, reference.attend(*given).output)


def test_a_cache_that_cannot_be_written_is_done_without(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = fresh_build / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-O0"))
    assert build.build().exists()


def test_the_library_has_no_threads_of_its_own() -> None:
    """It runs on those of torch's OpenMP: a second runtime in the process would fight for the cores."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import torch; from refreshkv.kernels.native.build import library; library();"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
