"""Compiled code is loaded only from where nobody else can write, and only whole; a kill at any moment does no harm."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refreshkv import safe_folder
from refreshkv.kernels.native import build
from tests.helpers import needs_compiler

pytestmark = [needs_compiler, pytest.mark.skipif(os.name != "posix", reason="owners and modes")]

FUNCTIONS = (
    "products",
    "attend",
    "attend_mixed",
    "encode",
    "select",
    "write",
    "push",
    "fetch",
    "refresh",
    "top_slots",
)
STUBS = "".join(
    f'extern "C" const char* refreshkv_{name}() {{ return ""; }}\n' for name in FUNCTIONS
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the libraries go. The sources are stubs, which compile in no time."""
    (tmp_path / "stubs.cpp").write_text(STUBS)
    monkeypatch.setattr(build, "_SOURCES", [tmp_path / "stubs.cpp"])
    monkeypatch.setattr(build, "_HEADERS", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield tmp_path / "cache" / "refreshkv"
    build.library.cache_clear()


def script(path: Path, *lines: str) -> str:
    """A compiler that does something first."""
    path.write_text("\n".join(("#!/bin/sh", *lines, f'exec {shutil.which("c++")} "$@"')) + "\n")
    path.chmod(0o755)
    return str(path)


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)


@pytest.mark.filterwarnings("error")
def test_only_the_user_can_write_what_is_loaded(cache: Path) -> None:
    before = os.umask(0)
    try:
        path = build.build()
    finally:
        os.umask(before)
    assert path.parent == cache
    for made in (cache, path):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert list(cache.iterdir()) == [path]


def by_mode(mode: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda cache, monkeypatch: cache.chmod(mode)


def by_link(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to(cache.with_name("elsewhere"))


def by_owner(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_folder.os, "geteuid", lambda: cache.stat().st_uid + 1)


@pytest.mark.parametrize(
    ("unsafe", "said"),
    [
        (by_mode(0o720), "others can write to"),
        (by_mode(0o702), "others can write to"),
        (by_mode(0o1777), "others can write to"),
        (by_link, "is a link"),
        (by_owner, "belongs to another user"),
    ],
)
def test_a_folder_that_others_could_have_written_is_not_used(
    unsafe: Callable[[Path, pytest.MonkeyPatch], None],
    said: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = build.build()
    unsafe(cache, monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"{re.escape(str(cache))}', which {said}.*mode 700"):
        assert safe_folder.kept() is None
    monkeypatch.undo()  # the private folder belongs to us in any case
    assert safe_folder.private() not in (planted.parent, cache)
    assert stat.S_IMODE(safe_folder.private().stat().st_mode) == 0o700


def test_without_a_folder_to_keep_it_in_a_process_has_its_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_folder, "kept", lambda: None)
    path = build.build()
    assert path.parent == safe_folder.private()
    assert build.build() == path
    build.load(path)


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_is_made_again(mode: int, cache: Path) -> None:
    path = build.build()
    path.chmod(mode)
    build.build()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_relative_cache_is_ignored(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("cache", "./cache", "~/cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert safe_folder.kept() == tmp_path / "home" / ".cache" / "refreshkv"
    monkeypatch.setenv("HOME", "home")
    assert safe_folder.kept() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "stubs.cpp"]


def test_no_home_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.build().parent == safe_folder.private()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"\0" * len(data),
        lambda data: data + b"\0",
    ],
    ids=["half", "a byte less", "empty", "zeros", "a byte more"],
)
def test_a_damaged_library_is_made_again(damage: Callable[[bytes], bytes], cache: Path) -> None:
    path = build.build()
    whole = path.read_bytes()
    # As another file: the one that is loaded must not change under this process.
    path.unlink()
    path.write_bytes(damage(whole))
    path.chmod(0o700)
    assert build.build() == path
    assert path.read_bytes() == whole
    assert build.library() is not None


def test_a_foreign_library_is_not_loaded(cache: Path, tmp_path: Path) -> None:
    """Whole, of the right name, and without our functions."""
    (tmp_path / "stubs.cpp").write_text("int nothing;\n")
    other = build.build()
    (tmp_path / "stubs.cpp").write_text(STUBS)
    path = build.build()
    stem = path.stem.removesuffix(hashlib.sha256(path.read_bytes()).hexdigest())
    path.unlink()
    safe_folder.store(other, cache, stem)
    assert build.build() == path
    assert build.library() is not None


def test_a_compiler_that_leaves_functions_out_is_a_reason(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "stubs.cpp").write_text("int nothing;\n")
    with pytest.warns(RuntimeWarning, match=r"lacks a function \(.*refreshkv_products\)"):
        assert build.library() is None


def test_a_compiler_that_writes_nothing_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", shutil.which("true") or "/bin/true")
    with pytest.warns(RuntimeWarning, match=r"true failed \(no reason\)"):
        assert build.library() is None
    build.library.cache_clear()
    monkeypatch.setenv("CXX", "c++ '")
    with pytest.warns(RuntimeWarning, match=r"is no command \(No closing quotation\)"):
        assert build.library() is None


def test_a_library_outlives_its_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build()
    with monkeypatch.context() as gone:
        no_compiler(gone)
        assert build.build() == path
        with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
            build.build(["-DOTHER"])
    monkeypatch.setenv("CXX", script(tmp_path / "other"))
    assert build.build() != path
    assert len(list(cache.iterdir())) == 2


@pytest.mark.filterwarnings("error")
def test_what_killed_compilers_left_is_removed(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    (cache / "tmp1234").mkdir()
    (cache / "tmp1234" / "native.so").write_bytes(b"half")
    (cache / "tmp5678.so").write_bytes(b"half")
    (cache / "mine").write_bytes(b"")
    path = build.build()
    assert sorted(cache.iterdir()) == sorted([path, cache / "mine"])


def start(tmp_path: Path, compiler: str) -> subprocess.Popen[str]:
    """A process that builds the stubs and says where they are."""
    code = (
        "import sys; from pathlib import Path; from refreshkv.kernels.native import build;"
        "build._SOURCES[:] = [Path(sys.argv[1])]; build._HEADERS.clear(); print(build.build())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "stubs.cpp"],
        env={**os.environ, "CXX": compiler},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_kill_leaves_nothing_that_is_taken_for_whole(cache: Path, tmp_path: Path) -> None:
    killer = script(tmp_path / "killer", 'if mkdir "$0.was"; then kill -9 $PPID; fi')
    with start(tmp_path, killer) as process:
        assert process.wait() == -9
    with start(tmp_path, killer) as process:
        out, _ = process.communicate()
        assert process.returncode == 0
    assert list(map(str, cache.iterdir())) == out.split()


def test_two_processes_at_once_compile_once(cache: Path, tmp_path: Path) -> None:
    slow = script(tmp_path / "slow", 'echo >> "$0.calls"', "sleep 0.2")
    processes = [start(tmp_path, slow) for _ in range(2)]
    made = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert made == {f"{path}\n" for path in cache.iterdir()}
    assert len(made) == 1
    assert (tmp_path / "slow.calls").read_text() == "\n"


def test_a_system_without_locks_builds_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    import fcntl

    cache.mkdir(parents=True, mode=0o700)
    (cache / "tmp1234").mkdir()  # of another process, for all that is known
    monkeypatch.setattr(fcntl, "flock", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.build().exists()
    assert (cache / "tmp1234").exists()
