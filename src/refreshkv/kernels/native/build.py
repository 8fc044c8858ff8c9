"""Compile the C++ files beside this one for the machine they run on, once, and load them.

The library goes to `$XDG_CACHE_HOME/refreshkv` (`~/.cache/refreshkv`) under a name made of the source, the flags and
the features of the processor. It shares the OpenMP threads of torch, which has loaded that runtime before.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")


class BuildError(RuntimeError):
    """There is no library, and why."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled in the first call on this machine (seconds); `None`, with a warning, where that fails."""
    if os.environ.get("REFRESHKV_NATIVE", "1") == "0":
        return None
    try:
        return load(build())
    except (BuildError, OSError) as error:  # no place to write, for one
        warnings.warn(
            f"the CPU kernels run in plain torch, which takes up to four times as long on long contexts:"
            f" {error}. Install a C++ compiler (g++ 11 or newer, or clang++), name it in CXX, or set "
            f"REFRESHKV_NATIVE=0 to do without",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def ready() -> bool:
    """Whether compiled code may run here and now: `torch.compile` could not look into it."""
    return not torch.compiler.is_compiling() and library() is not None


def compiled() -> ctypes.CDLL:
    """The library, where `ready` has said that there is one."""
    found = library()
    assert found is not None, "a caller asks `serves` first"
    return found


def build(extra: Sequence[str] = ()) -> Path:
    """The compiled library, from the cache if it is there; `extra` flags come last."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise BuildError("no C++ compiler is on the path")
    own = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    command = [*shlex.split(compiler), *_FLAGS, own, *extra]
    sources = (file.read_text() for file in (*_SOURCES, *_HEADERS))
    made_of = [*command, _processor(), *sources]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    target = _folder() / f"native-{name}.so"
    if not target.exists():
        _compile(command, target)
    return target


def load(path: Path) -> ctypes.CDLL:
    """The library in a file, ready to be called."""
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled library does not load ({error})") from error
    found.refreshkv_products.restype = ctypes.c_char_p
    for name, pointers, numbers in (
        ("attend", 1, 0),
        ("select", 1, 0),
        ("insert", 1, 0),
        ("gather", 4, 12),
        ("top_slots", 3, 3),
    ):
        kinds = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers
        getattr(found, f"refreshkv_{name}").argtypes = kinds
    return found


def _compile(command: list[str], target: Path) -> None:
    """Compile beside the target and move, so that nobody ever sees half a library."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, *map(str, _SOURCES), "-o", name], capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason"]
            raise BuildError(f"{command[0]} failed ({said[0].strip()})")
        os.replace(name, target)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _folder() -> Path:
    """The user's cache, or a folder of this process where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refreshkv"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(_folder_of_this_process().name)


@functools.cache
def _folder_of_this_process() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="refreshkv-")


def _processor() -> str:
    """What `native` means here: a home directory may be shared by different machines."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a tensor begin; the caller keeps it alive."""
    return None if tensor is None else tensor.data_ptr()


def whole(tensor: Tensor | None) -> Tensor | None:
    """Its numbers one after the other; the caller keeps what may be a copy."""
    return None if tensor is None else tensor.contiguous()
