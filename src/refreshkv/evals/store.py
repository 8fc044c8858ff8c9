"""The run directory: results that survive a kill at any moment, and settings that may not change under them.

`results.jsonl` holds one record a line. What stands before a line break is safe: lines are appended with one fsync a
batch, and half a line left by a kill is cut off at the next start. `config.json` holds what was asked; another run may
add tasks, methods and examples, nothing else. In a launch each process appends to a shard of its own
(`results-<rank>.jsonl`), and the main one merges them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refreshkv.evals.results import RESULTS, Record, line_of, read_lines
from refreshkv.evals.summary import write_whole

try:
    import fcntl
except ModuleNotFoundError:  # Windows: two runs on one directory go unnoticed there
    fcntl = None  # type: ignore[assignment]

FORMAT = "refreshkv-eval-1"
CONFIG = "config.json"
_WRITTEN = (RESULTS, "summary.csv", "report.html")
# What makes results comparable. Everything else in config.json is for the reader.
_FIXED = ("model", "dtype", "seed", "budget", "chat")


class RunError(RuntimeError):
    """The run cannot go on, but what was written is kept: the same command goes on from there."""


class RunDirectory:
    """Where one run keeps its results.

    Attributes:
        path: of the directory.
        config: what was asked for, of all runs in this directory so far; empty before `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        self._lock: int | None = None

    def open(self, config: Mapping[str, Any]) -> None:
        """Make or check the directory, and repair what a kill has left. For the main process.

        Args:
            config: JSON values; `tasks` maps names to settings, `methods` is a list of specs.

        Raises:
            ValueError: a directory that cannot be written, holds something else, belongs to a run that is still going,
                or was made with other settings.
            RunError: the disk is full.
        """
        try:
            self._open(json.loads(json.dumps(config, default=str)))  # as it will read
        except BaseException:
            self.close()
            raise

    def done(self) -> dict[str, str]:
        """Of every result, its key and the hash of its prompt.

        Raises:
            ValueError: a line that is no result, or one of a task or method that this directory was never asked for.
        """
        path, found = self.path / RESULTS, dict[str, str]()
        for number, record in enumerate(read_lines(path), 1):
            for name, asked in (("task", "tasks"), ("method", "methods")):
                if record[name] not in self.config.get(
                    asked, [record[name]]
                ):  # only the main process has a config
                    raise ValueError(
                        f"line {number} of '{path}' is of {name} {record[name]!r}, which {CONFIG} does not name; remove"
                        " that line and run again"
                    )
            found[record["key"]] = record["prompt_sha256"]
        return found

    def lines(self, rank: int | None) -> Lines:
        """Where to append results: in a launch (`rank`) a shard, otherwise the results themselves."""
        return Lines(self.path / (RESULTS if rank is None else f"results-{rank}.jsonl"))

    def tidy(self, order: Callable[[Record], Any]) -> list[Record]:
        """Bring shards and results together, each key once, sorted by `order` (ties stay as they are); return them.

        For the main process, when nobody writes any more. Nothing is removed before its copy is on the disk.
        """
        shards = self._shards()
        held: dict[str, Record] = {}
        for path in (self.path / RESULTS, *shards):
            for record in read_lines(path):  # in both after a kill in here
                held.setdefault(record["key"], record)
        wanted = sorted(held.values(), key=order)
        if shards or list(held) != [record["key"] for record in wanted]:
            try:
                write_whole(
                    self.path / RESULTS, "".join(line_of(record) for record in wanted).encode()
                )
            except OSError as error:
                raise cannot_write(self.path / RESULTS, error) from error
        for shard in shards:
            shard.unlink()
        return wanted

    def close(self) -> None:
        """Let another run have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self, config: dict[str, Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            self.config = self._merged_config(config)
            write_whole(self.path / CONFIG, (json.dumps(self.config, indent=1) + "\n").encode())
            for name in (CONFIG, *_WRITTEN):  # left by a kill within `write_whole`
                for leftover in self.path.glob(f".{name}.*.tmp"):
                    leftover.unlink()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise cannot_write(self.path / CONFIG, error) from error
            raise ValueError(
                f"run directory '{self.path}' cannot be used ({error.strerror}); use another --out"
            ) from None
        with Lines(self.path / RESULTS) as results:
            known = self.done()
            for shard in self._shards():
                results.append([r for r in read_lines(shard) if r["key"] not in known])
                shard.unlink()

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob("results-*.jsonl"))

    def _take(self) -> None:
        """Lock the directory itself: the lock ends with the process, and no file of it stays behind."""
        if fcntl is None:
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"another run is writing to '{self.path}'; wait for it, or use another --out"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _merged_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config` with the tasks and methods that the directory has already, which come first."""
        path = self.path / CONFIG
        if not path.exists():
            strange = [name for name in _WRITTEN if (self.path / name).exists()]
            if strange:
                raise ValueError(
                    f"run directory '{self.path}' has {strange[0]} but no {CONFIG}; use another --out"
                )
            return {"format": FORMAT, **config}
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            old = None
        if not isinstance(old, dict) or old.get("format") != FORMAT:
            raise ValueError(f"'{path}' was not written by a run like this; use another --out")
        for name, before, now in _differences(old, config):
            raise ValueError(
                f"run directory '{self.path}' was made with {name} {before!r}, now it is {now!r}; use another --out"
            )
        return {
            "format": FORMAT,
            **config,
            "tasks": {**old["tasks"], **config["tasks"]},
            "methods": list(dict.fromkeys([*old["methods"], *config["methods"]])),
        }


class Lines:
    """A JSONL file that is only ever appended to, whole lines at a time. A context manager.

    Raises:
        RunError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._size = _whole_lines(path)
            os.ftruncate(self._file, self._size)
        except OSError as error:
            raise cannot_write(path, error) from error

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def append(self, records: Sequence[Record]) -> None:
        """Write records and wait until they are on the disk.

        Raises:
            RunError: that failed, because the disk is full for example; the file is as it was before.
        """
        data = "".join(line_of(record) for record in records).encode()
        try:
            os.lseek(self._file, self._size, os.SEEK_SET)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # if not now, the next start cuts it off
                os.ftruncate(self._file, self._size)
            raise cannot_write(self.path, error) from error
        self._size += len(data)


def cannot_write(path: Path, error: OSError) -> RunError:
    """What to tell the user."""
    return RunError(
        f"cannot write '{path}' ({error.strerror}); the results so far are kept: make room, then run the same"
        " command again to go on"
    )


def _whole_lines(path: Path) -> int:
    """Bytes up to the last line break."""
    with path.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, value then and value now of everything that may not change; what is absent is None."""
    for name in _FIXED:
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)
    for task in old["tasks"].keys() & new["tasks"].keys():
        before, now = old["tasks"][task], new["tasks"][task]
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                yield f"{task}.{name}", before.get(name), now.get(name)
