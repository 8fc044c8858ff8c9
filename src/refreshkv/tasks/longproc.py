"""LongProc's own html_to_tsv files: a JSON list beside a folder of pages (Ye et al., 2025).

An entry has `task_id`, `html_path`, `task_topic`, `task_description`, `filtering_instruction`, `tsv_header` and `gt`.
The wording of the prompt is ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refreshkv.tasks.task import Count, Example
from refreshkv.tasks.texts import place

_NEEDED = ("task_id", "html_path", "task_topic", "task_description", "tsv_header", "gt")


def html_examples(data: str, count: Count, limit: int | None) -> Iterator[Example]:
    """The first `limit` entries of a file such as `html_to_tsv_0.5k.json`, in its order.

    Raises:
        ValueError: a file or page that cannot be read, or an entry without what it needs.
    """
    path = place(data)
    for number, entry in enumerate(_entries(path)[:limit]):
        missing = [name for name in _NEEDED if not isinstance(entry.get(name), str)]
        if missing:
            raise ValueError(
                f"{path}: entry {number} lacks {missing[0]!r}: give a LongProc html_to_tsv file"
            )
        answer = entry["gt"].strip() + "\n"
        tokens = count(answer)
        prompt = _prompt(entry, _page(path, entry["html_path"]))
        yield Example(entry["task_id"], prompt, tokens + tokens // 4 + 16, answer)


def _entries(path: Path) -> list[Mapping[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}): give LongProc's JSON file"
        ) from None
    except ValueError as error:  # broken JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON ({error}): give LongProc's JSON file") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} does not hold a list of objects: give LongProc's JSON file")
    return entries


def _page(path: Path, name: str) -> str:
    """The page, wherever the file was put: `html_path` is relative to LongProc's root."""
    relative = Path(name)
    places = [folder / relative for folder in (path.parent, *path.resolve().parents)]
    places.append(path.parent / relative.parent.name / relative.name)
    for file in places:
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    raise ValueError(
        f"{path}: page {name!r} is not below any folder above it: unpack LongProc's pages there"
    )


def _prompt(entry: Mapping[str, Any], page: str) -> str:
    condition = entry.get("filtering_instruction") or ""
    header = entry["tsv_header"]
    return (
        f"Here is a web page.\n```html\n{page}\n```\n"
        f"Extract its list of: {entry['task_topic']}. For each entry give {entry['task_description']}."
        f"{' ' + condition if condition else ''}\n"
        "Write one line for each entry, in the order of the page, with a tab between columns and N/A where something"
        f" is missing, inside a ```tsv fence. The first line is this header:\n{header}\n"
    )
