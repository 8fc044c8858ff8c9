"""Which checkpoints are whole. A kill or a full disk in the middle of one leaves the one before as it was (ours).

Trainer writes a checkpoint file by file. When all are there a list of them with their sizes is added, and a checkpoint
without that list, or with other sizes, is none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

_LIST = "whole.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_whole(checkpoint: Path) -> None:
    """All files of a checkpoint are written."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != _LIST
    }
    aside = checkpoint / f"{_LIST}.tmp"
    aside.write_text(json.dumps(sizes, indent=1) + "\n")
    os.replace(aside, checkpoint / _LIST)


def last_whole(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint in a folder and its step, 0 for none.

    Raises:
        ValueError: it was written whole, and is not any more.
    """
    for step, path in reversed(_all(folder)):
        if not (path / _LIST).exists():
            continue
        for name, size in json.loads((path / _LIST).read_text()).items():
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                what = (
                    "has another size than it was written with" if file.is_file() else "is missing"
                )
                raise ValueError(
                    f"checkpoint '{path}' is damaged, its file {name} {what}: remove that folder, and the run goes on"
                    " from the one before"
                )
        return path, step
    return None, 0


def drop_unfinished(folder: Path) -> None:
    """Remove what a kill has left of a checkpoint."""
    for _, path in _all(folder):
        if not (path / _LIST).exists():
            shutil.rmtree(path)


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)
