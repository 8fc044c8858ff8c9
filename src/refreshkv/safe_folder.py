"""Where compiled code and fetched models may lie: a folder that nobody but its user can write to.

Whoever can write a library that this process loads runs code in its name, so a folder is looked at before each use. A
library says itself whether it is whole: its name ends with the SHA-256 of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

REMEDY = "make it a folder of yours with mode 700, or name another place in XDG_CACHE_HOME"
_UNFINISHED = "tmp"  # how everything begins that is still being written


class UnsafeFolder(OSError):
    """The folder is not the user's alone: which, and why."""


def user_folder(inside: str = "") -> Path:
    """The user's folder, or one inside, made where it is missing.

    Raises:
        UnsafeFolder: others could have written to it.
        OSError: there can be none.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # the XDG specification says to ignore it then
        with contextlib.suppress(RuntimeError):  # a user without a home directory
            home = Path.home() / ".cache"
    if not home.is_absolute():
        raise OSError("there is no home directory")
    own = home / "refreshkv"
    for folder in (own, own / inside):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if fault := _fault(folder.lstat(), stat.S_ISDIR):
            raise UnsafeFolder(f"{str(folder)!r}, which {fault}")
    return own / inside


def kept() -> Path | None:
    """Where compiled kernels are kept. `None` where they cannot be; a warning tells an unsafe folder."""
    try:
        return user_folder()
    except UnsafeFolder as error:
        warnings.warn(
            f"each process compiles its own CPU kernels, because none are kept in {error}: {REMEDY}",
            RuntimeWarning,
            stacklevel=2,
        )
    except OSError:
        pass
    return None


def private() -> Path:
    """A folder of this process, removed at its end."""
    return Path(_private().name)


@cache
def _private() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="refreshkv-")


def whole(folder: Path, pattern: str) -> Iterator[Path]:
    """The files of the folder whose names match, which are what was once written and nobody else can change."""
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(OSError):  # removed meanwhile
            if not _fault(path.lstat(), stat.S_ISREG) and path.stem.endswith(_sum(path)):
                yield path


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the folder; what killed ones have left in it is removed."""
    with contextlib.ExitStack() as stack:
        # Windows, or a file system without locks: nothing tells what is left from what is being written.
        with contextlib.suppress(ModuleNotFoundError, OSError):
            import fcntl

            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)  # the end of the process unlocks it too
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A folder inside, to write into; it is removed at the end."""
    with tempfile.TemporaryDirectory(
        prefix=_UNFINISHED, dir=folder, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def store(file: Path, folder: Path, stem: str) -> Path:
    """Move a file into the folder, as `stem`, its sum and its suffix, so that a kill leaves nothing or all of it."""
    target = folder / f"{stem}{_sum(file)}{file.suffix}"
    file.chmod(0o700)  # compilers leave it to the umask
    sync(file)
    os.replace(file, target)
    sync(folder)
    return target


def _fault(found: os.stat_result, is_kind: Callable[[int], bool]) -> str:
    """Why somebody else could have written a file or folder, of which this is the lstat; empty if nobody could."""
    if os.name != "posix":  # neither owners nor modes there that would tell
        return ""
    if not is_kind(found.st_mode):
        return "is a link"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    return "others can write to" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
