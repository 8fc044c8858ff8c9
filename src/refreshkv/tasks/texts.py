"""Data of the user: text files, folders of them, JSONL, and data sets of the hub. Errors say where, and what to do.

Everything is read lazily, one document at a time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refreshkv.config import unknown
from refreshkv.text import reason

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
_HUB_DOCUMENTS = 100  # the paper's number
# Up to 16 characters of a word with the blanks before it: text without blanks can be cut as well.
_PIECE = re.compile(r"\s{0,16}\S{1,16}|\s{1,16}")


@dataclass(frozen=True)
class Record:
    """One document: named fields, and where it stands (`line 3 of a.jsonl`), for messages."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str, *, blank: bool = False) -> str:
        """The field `name`, a text that is not blank, or may be. Raises `ValueError` where it is missing or no text."""
        return check_text(self.where, name, self.get(name), blank=blank)

    def get(self, name: str) -> Any:
        """The field `name`. Raises `ValueError` where it is missing."""
        if name not in self.fields:
            has = ", ".join(map(repr, self.fields)) or "none"
            raise ValueError(f"{self.where}: the field {name!r} is missing (fields there: {has})")
        return self.fields[name]


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face hub.

    Attributes:
        id: its owner and name.
        file: read only this file of it.
        columns: our field -> its column; fields not named here keep their names. Of a list, the first item counts.
        keep: whether a row is wanted.
    """

    id: str
    split: str = "test"
    subset: str | None = None
    file: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    keep: Callable[[Mapping[str, Any]], bool] = lambda row: True


def read(data: str, named: Mapping[str, HubSet], local: str) -> Iterator[Record]:
    """The documents of `data`: a folder, a text file, a JSONL file, a name of `named`, or `hub:owner/name[/split]`.

    What exists on the disk goes first. A text file is a record with the one field "text". `local` says what to give
    where the hub does not answer.

    Raises:
        ValueError: neither a path nor a known name, or something that cannot be read.
    """
    path = place(data)
    if is_local(data):
        if path.is_dir():
            return read_folder(path)
        if path.suffix.lower() in JSONL_SUFFIXES:
            return read_jsonl(path)
        return iter((Record(shown(path), {"text": read_text(path)}),))
    if data in named:
        return read_hub(named[data], local)
    if data.startswith("hub:"):
        return read_hub(_hub_set(data), local)
    if not named or os.sep in data or path.suffix:
        raise ValueError(f"no such file or folder: {data!r}; give {local}")
    raise ValueError(f"{unknown('data set', data, named)}, and no file or folder of that name")


def documents(
    task: str, data: str | None, named: Mapping[str, HubSet], local: str, limit: int | None
) -> tuple[Iterator[Record], int | None]:
    """The documents of a task's `data`, and how many are wanted: without a limit all of a local set, 100 of the hub's.

    Raises:
        ValueError: no `data`, and as `read`.
    """
    if data is None:
        known = ", ".join(named)
        raise ValueError(f"{task}: no data; give {task}.data: {local}, or {known} from the hub")
    if limit is None and not is_local(data):
        limit = _HUB_DOCUMENTS
    return read(data, named, local), limit


def place(data: str) -> Path:
    """Where `data` is on this machine, `~` resolved. Raises `ValueError` for what can be no path."""
    if "\0" in data:
        raise ValueError(f"no such file or folder: {data!r}")
    return Path(os.path.expanduser(data))  # pathlib's raises where there is no such user


def is_local(data: str) -> bool:
    """Whether `data` is a file or folder of this machine."""
    return bool(data) and os.path.exists(
        os.path.expanduser(data)
    )  # pathlib raises for names too long


def read_text(path: Path) -> str:
    """A UTF-8 text file; a byte order mark is dropped, line ends become newlines."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(path)} is not UTF-8 (byte {error.start}): convert it, or leave it out"
        ) from error
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error


def read_folder(path: Path) -> Iterator[Record]:
    """The text files under a folder, in the order of their paths; hidden ones are left out."""

    def unreadable(error: OSError) -> None:
        raise ValueError(_unreadable(Path(error.filename), error)) from error

    files = []
    for folder, inner, names in os.walk(path, onerror=unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    texts = sorted(file for file in files if file.suffix.lower() in TEXT_SUFFIXES)
    if not texts:
        kinds = ", ".join(f"*{suffix}" for suffix in TEXT_SUFFIXES)
        raise ValueError(f"no text files in the folder {shown(path)}: put some there ({kinds})")
    return (Record(shown(file), {"text": read_text(file)}) for file in texts)


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a JSONL file, one a line; blank lines are left out.

    Raises:
        ValueError: the file cannot be read or holds nothing, or a line (its number) is not UTF-8 or not an object.
    """
    empty = True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    where = f"line {number} of {shown(path)}"
                    yield Record(where, _parse(where, line))
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error
    if empty:
        raise ValueError(f"{shown(path)} is empty: write one JSON object a line")


def read_hub(source: HubSet, local: str) -> Iterator[Record]:
    """The rows of a data set of the hub, streamed.

    Raises:
        ValueError: it cannot be read; names `local` as the way out.
    """
    try:
        from datasets import load_dataset

        rows = load_dataset(
            source.id,
            source.subset,
            data_files={source.split: source.file} if source.file else None,
            split=source.split,
            streaming=True,
        )
        for number, row in enumerate(rows):
            if source.keep(row):
                taken = {ours: row.get(column) for ours, column in source.columns.items()}
                fields = {
                    name: value[0] if isinstance(value, list) and value else value
                    for name, value in {**row, **taken}.items()
                }
                yield Record(f"row {number} of {source.id}", fields)
    except Exception as error:  # the hub, its client and its files fail in many ways
        raise ValueError(
            f"the data set {source.id} cannot be read from the hub ({reason(error)}); give {local} instead"
        ) from error


def check_text(where: str, name: str, value: object, *, blank: bool = False) -> str:
    """`value`, if it is a text that is not blank, or may be. Raises `ValueError` otherwise."""
    if not isinstance(value, str) or not (blank or value.strip()):
        got = "a blank text" if isinstance(value, str) else _kind(value)
        raise ValueError(f"{where}: {name!r} must be a text; got {got}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name!r} holds half a surrogate pair, which is no character: mend or drop the line"
        ) from error
    return value


def cuts(text: str) -> list[int]:
    """0 and the places where a text may be cut, its end the last: after a word, and inside very long ones."""
    return [0, *(piece.end() for piece in _PIECE.finditer(text))]


def shown(path: Path) -> str:
    """A path as text that can be printed and stored, whatever bytes are in its name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _parse(where: str, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}): convert the file") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON ({error.msg}, column {error.colno}): mend or drop it"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise ValueError(f"{where} cannot be read as JSON: mend or drop it") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object; got {_kind(row)}")
    return row


def _hub_set(data: str) -> HubSet:
    parts = data.removeprefix("hub:").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"a data set of the hub is given as hub:owner/name[/split]; got {data!r}")
    return HubSet("/".join(parts[:2]), split=parts[2] if len(parts) == 3 else "train")


def _unreadable(path: Path, error: OSError) -> str:
    return f"{shown(path)} cannot be read: {error.strerror or error}"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
