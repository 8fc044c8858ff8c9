"""docs/api.md is what `python docs/api.py` writes, and every public name is in it."""

from __future__ import annotations

import runpy
from pathlib import Path

import refreshkv

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "api.py"))["page"]()
    written = (DOCS / "api.md").read_text("utf-8")
    assert page == written, "run `python docs/api.py`"
    assert all(f"## refreshkv.{name}\n" in page for name in refreshkv.__all__)
