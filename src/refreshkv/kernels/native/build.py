"""Compile the C++ files beside this one for the machine they run on, once, and load them.

The library goes to `$XDG_CACHE_HOME/refreshkv` (`~/.cache/refreshkv`; see `safe_folder`) under a name made of the
source, the flags and the features of the processor, then of the compiler: where there is no compiler any more, what
any made is taken. It shares the OpenMP threads of torch, which has loaded that runtime before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from refreshkv import safe_folder

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")
Given = TypeVar("Given", Tensor, Tensor | None)


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
            f"the CPU kernels run in plain torch, which takes many times as long on long contexts:"
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
    command = compiler()
    own = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = (*_FLAGS, own, *extra)
    made_of = b"\0".join(
        [
            *map(str.encode, (*flags, _processor())),
            *(x.read_bytes() for x in (*_SOURCES, *_HEADERS)),
        ]
    )
    stem = f"native-{hashlib.sha256(made_of).hexdigest()[:16]}-"
    if command:
        stem += f"{hashlib.sha256(shlex.join(command).encode()).hexdigest()[:8]}-"
    folder = safe_folder.kept() or safe_folder.private()
    found = _find(folder, stem)
    if found is None:
        if not command:
            raise BuildError("no C++ compiler is on the path")
        if not os.access(folder, os.W_OK):
            folder = safe_folder.private()
        with safe_folder.alone(folder):
            # Another process may have made it while this one waited.
            found = _find(folder, stem) or _compile([*command, *flags], folder, stem)
    return found


def load(path: Path) -> ctypes.CDLL:
    """The library in a file, ready to be called."""
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled library does not load ({error})") from error
    try:
        found.refreshkv_products.restype = ctypes.c_char_p
        for name, pointers, numbers in (
            ("attend", 1, 0),
            ("attend_mixed", 1, 0),
            ("encode", 1, 0),
            ("select", 1, 0),
            ("write", 1, 0),
            ("push", 1, 0),
            ("fetch", 1, 0),
            ("refresh", 1, 0),
            ("top_slots", 3, 3),
        ):
            kinds = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers
            getattr(found, f"refreshkv_{name}").argtypes = kinds
    except AttributeError as error:
        raise BuildError(f"the compiled library lacks a function ({error})") from error
    return found


def compiler() -> list[str]:
    """The command of the compiler; empty where there is none."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']!r} is no command ({error})") from error
    return named or [*filter(None, map(shutil.which, _COMPILERS))][:1]


def _find(folder: Path, stem: str) -> Path | None:
    """A library of this stem that is whole and loads: a home may be shared by systems that do not run each other's."""
    for path in safe_folder.whole(folder, f"{stem}*.so"):
        with contextlib.suppress(BuildError):
            load(path)
            return path
    return None


def _compile(command: list[str], folder: Path, stem: str) -> Path:
    """Compile and store. The compiler's own temporary files lie where a kill leaves them to be removed."""
    with safe_folder.workshop(folder) as room:
        file = room / "native.so"
        try:
            done = subprocess.run(
                [*command, *map(str, _SOURCES), "-o", str(file)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env={**os.environ, "TMPDIR": str(room)},
            )
        except OSError as error:
            raise BuildError(f"{command[0]} does not run ({error})") from error
        if done.returncode or not file.exists():
            said = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason"]
            raise BuildError(f"{command[0]} failed ({said[0].strip()})")
        return safe_folder.store(file, folder, stem)


def _processor() -> str:
    """What `native` means here: a home directory may be shared by different machines."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not mounted
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith(("flags", "Features")):
                    return line
    return f"{platform.machine()} {platform.processor()}"


def address(tensor: Tensor | None) -> int | None:
    """Where the numbers of a tensor begin; the caller keeps it alive."""
    return None if tensor is None else tensor.data_ptr()


def whole(tensor: Given, dtype: torch.dtype | None = None) -> Given:
    """Its numbers one after the other, in `dtype`; the caller keeps what may be a copy."""
    if isinstance(tensor, Tensor):
        return tensor.to(dtype or tensor.dtype).contiguous()
    return tensor
